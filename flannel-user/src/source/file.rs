//! Leases in a directory that the agents of a machine share.
