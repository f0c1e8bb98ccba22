//! What an operator can see: the documents of status and flows, and their texts.

pub mod classes;
pub mod flows;
pub mod flows_text;
pub mod status;
pub mod text;
