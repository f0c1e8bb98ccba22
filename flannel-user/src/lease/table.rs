//! Every known lease, kept from a snapshot and the changes after it.
