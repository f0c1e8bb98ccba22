//! The lab: a flannel cluster in network namespaces on one machine, and the
//! traffic, captures and counters with which scenarios ask it questions.
//!
//! ```text
//!  node-a (network + mounts)              node-b
//!   pod ─ veth ─ cni0 ─ flannel.1 ┐      ┌ flannel.1 ─ cni0 ─ veth ─ pod
//!                          eth0 ══╧══════╧══ eth0
//! ```
//!
//! Every namespace is unnamed and held by a small process that the kernel kills
//! with the lab, so nothing stays behind, however the lab ends.

pub mod agent;
pub mod bench;
pub mod binaries;
pub mod capture;
pub mod classes;
pub mod closing;
pub mod cluster;
pub mod conntrack;
pub mod demo;
pub mod door;
pub mod ends;
pub mod etcd;
pub mod etcd_cluster;
pub mod exchange;
pub mod guest;
pub mod host;
pub mod kube;
pub mod lab;
pub mod load;
pub mod namespace;
pub mod node;
pub mod original;
pub mod paths;
pub mod pod;
pub mod policy;
pub mod scale;
pub mod scenario;
pub mod scratch;
pub mod services;
pub mod spawner;
pub mod task;
pub mod traffic;
pub mod wait;
