//! Which subnet a node gets (contract section 6.3), decided without I/O.
