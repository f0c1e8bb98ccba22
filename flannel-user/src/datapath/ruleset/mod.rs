//! Does any rule depend on more than a class of connections holds?
//!
//! A class answers for a source and a destination pod, TCP, the port of the
//! service, a direction and a TOS. Where a verdict depends on anything else (the
//! client's port, a rate, a quota, chance, the time, what packets carry), or where
//! a rule must see every packet (queue, log, a set that packets change), no class
//! can stand for it, and connections have to be asked for one by one. So the rule
//! sets are read, and whatever is not known to be harmless is named.
//!
//! Which rules concern a class:
//!
//! * Chains that forwarded packets meet: prerouting, forward and postrouting of
//!   every type, all hooks of bridge and netdev, and the chains they jump to.
//! * Only where TCP from one pod to another gets that far. A rule for UDP, for
//!   another destination, for a local address or for INVALID packets alone does not
//!   count, nor what it jumps to. This is why kube-proxy's `statistic` is no reason:
//!   its chains are entered by the address of a Service, and a translated connection
//!   never forms a class. The same match in front of a pod's address is one,
//!   in a nat chain as well: it may translate one connection and not the next.
//! * Conditions count in their order: a limit in front of the condition that rules
//!   pods out is used up by pods too.
//!
//! What stays open: the destination port of an answer is the client's port, and a
//! rule by destination port is taken to mean the service's.
//!
//! The decisions are pure (`judge`, `nft_rule`, `xt`, `legacy`); `nft`, `ipset` and
//! `watcher` talk to the kernel. All of it blocks and belongs on a thread of its own.

mod attribute;
mod held;
mod ipset;
mod judge;
mod legacy;
mod legacy_tables;
mod nft;
mod nft_field;
mod nft_rule;
mod nft_set;
mod pods;
mod watcher;
mod xt;

pub use self::{
    judge::Finding,
    watcher::{Look, RulesetError, Watcher},
};
