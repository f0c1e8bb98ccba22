//! What an operator can see: the status document.

pub mod status;
pub mod text;
