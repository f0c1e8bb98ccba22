//! Every scenario, one module per subject. They share the machine's two cores
//! and the agents' places, so run them one at a time:
//!
//! ```text
//! cargo test --release -p lab --test scenarios -- --test-threads=1 [pairings::]
//! ```

mod bad_input;
mod bench;
mod classes;
mod classes_address_reuse;
mod classes_counts;
mod classes_flood;
mod classes_handshakes;
mod classes_path_mtu;
mod classes_rules;
mod direct;
mod etcd_faults;
mod flows;
mod forged;
mod handshaken;
mod health;
mod kernel_rewrite;
mod lab_itself;
mod learned;
mod learned_attack;
mod learned_closing;
mod learned_conntrack_idle;
mod learned_conntrack_restore;
mod learned_many_flows;
mod learned_policy;
mod learned_shaped;
mod learned_switching;
mod learned_works;
mod mixed_cluster;
mod offload;
mod own_handover;
mod pairings;
mod pods;
mod repair;
mod restart;
mod restart_firewall;
mod ruleset;
mod several_agents;
mod switching;
mod uplink_changes;
mod wire;
