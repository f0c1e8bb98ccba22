//! The two datapaths: the kernel's own, always complete, and eBPF above it.

pub mod conntrack;
pub mod conntrack_restore;
pub mod conntrack_table;
pub mod ebpf;
pub mod exclusion;
pub mod kernel_events;
mod kernel_file;
pub mod netlink;
pub mod next_hop;
pub mod node_config;
pub mod pods;
pub mod remotes;
pub mod ruleset;
pub mod shaping;
pub mod switch;
pub mod tunnel_mtu;
