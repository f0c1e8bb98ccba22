//! Every scenario, one module per subject. They share the machine's two cores
//! and the agents' places, so run them one at a time:
//!
//! ```text
//! cargo test --release -p lab --test scenarios -- --test-threads=1 [pairings::]
//! ```

mod bad_input;
mod bench;
mod forged;
mod lab_itself;
mod learned_works;
mod mixed_cluster;
mod offload;
mod pairings;
mod pods;
mod repair;
mod restart;
mod switching;
mod wire;
