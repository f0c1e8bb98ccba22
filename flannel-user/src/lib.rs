//! The agent of flannel-ebpf as a library: `flanneld` and `flannelctl` are thin.
//!
//! Arrows go one way: `source` → `lease` → `backend` → `forwarding` →
//! `reconcile` → `datapath`. Kernel events and the control socket only wake
//! the reconcile loop. `firewall` stands beside it: its rules depend on the own
//! lease alone.

pub mod agent;
mod atomic_file;
pub mod backend;
pub mod config;
pub mod control;
pub mod datapath;
pub mod docker_opts;
mod error_chain;
pub mod firewall;
pub mod forwarding;
pub mod health;
pub mod json_object;
pub mod lease;
pub mod mac;
pub mod network;
pub mod observe;
pub mod reconcile;
pub mod renewal;
pub mod source;
pub mod subnet_file;
pub mod uplink;
