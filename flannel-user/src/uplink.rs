//! Choice of the uplink and the public address (contract section 16).
