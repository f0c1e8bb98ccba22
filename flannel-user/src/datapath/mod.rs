//! The two datapaths: the kernel's own, always complete, and eBPF above it.

pub mod kernel_events;
pub mod netlink;
pub mod pods;
