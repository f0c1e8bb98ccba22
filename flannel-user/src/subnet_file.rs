//! subnet.env (contract section 13).
