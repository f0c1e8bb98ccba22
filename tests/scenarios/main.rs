//! Every scenario, one module per subject. They share the machine's two cores
//! and the agents' places, so run them one at a time:
//!
//! ```text
//! cargo test --release -p lab --test scenarios -- --test-threads=1 [pairings::]
//! ```

mod bad_input;
mod forged;
mod health;
mod lab_itself;
mod mixed_cluster;
mod offload;
mod pairings;
mod pods;
mod repair;
mod restart;
mod restart_firewall;
mod several_agents;
mod switching;
mod uplink_changes;
mod wire;
