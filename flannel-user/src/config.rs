//! Flags and environment (contract section 2).
