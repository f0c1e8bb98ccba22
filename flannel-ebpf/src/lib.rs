//! Everything the kernel programs decide, and the layout they share with the agent.
//!
//! `no_std` and free of I/O: the same functions run behind the hooks in
//! `main.rs` and under `cargo test` on the host. A packet's way through the
//! modules:
//!
//! * out of a pod: [`encap::encapsulate`] decides, [`outer`] makes the new headers;
//! * in from a peer: [`decap::deliver`] decides;
//! * both look first for what was learned of the flow: [`learned`] with [`validity`];
//! * [`own`] carries connections from their SYN on;
//! * [`sighting`], [`candidate`], [`handshaken`] and [`learn`] watch what the stack does with the rest;
//! * whatever is not forwarded has one [`reason::Reason`].

#![cfg_attr(not(any(test, feature = "rows")), no_std)]

pub mod candidate;
pub mod checksum;
pub mod decap;
pub mod ecn;
pub mod encap;
pub mod flow;
pub mod frame;
pub mod handshaken;
pub mod hash;
pub mod header;
pub mod layout;
pub mod learn;
pub mod learned;
pub mod outer;
pub mod own;
pub mod packet;
#[cfg(any(test, feature = "rows"))]
pub mod random;
pub mod reason;
#[cfg(any(test, feature = "rows"))]
pub mod rewrite;
#[cfg(any(test, feature = "rows"))]
pub mod rows;
pub mod sighting;
pub mod tables;
pub mod validity;
