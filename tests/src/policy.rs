//! A network policy between two pods, in the ways that policy engines write it.

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::{namespace::Namespace, node::Node};

/// How the denial stands in the node's netfilter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// A rule in a table of its own, added and deleted by `nft`.
    Nft,
    /// A rule in FORWARD, written by the `iptables` command.
    Iptables,
    /// The same by `iptables-legacy`, which tells nobody.
    Legacy,
    /// A standing rule that looks into a set; only the set's members change.
    Ipset,
}

impl By {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Nft, Self::Iptables, Self::Legacy, Self::Ipset];

    /// Does a change make no event?
    #[must_use]
    pub const fn is_silent(self) -> bool {
        matches!(self, Self::Legacy | Self::Ipset)
    }
}

const TABLE: &str = "lab-policy";

/// What can deny the packets of one pair of pods, in one direction; it does not yet.
#[derive(Debug, Clone)]
pub struct Policy {
    node: Node,
    by: By,
    from: Ipv4Addr,
    to: Ipv4Addr,
}

impl Policy {
    /// Prepares the place on `node`: the table, or the set and its rule. What
    /// comes later is one change and nothing else.
    ///
    /// # Errors
    /// When a command refuses.
    pub fn prepare(node: &Node, by: By, from: Ipv4Addr, to: Ipv4Addr) -> Result<Self> {
        let namespace = node.namespace();
        match by {
            By::Nft => {
                let text = format!(
                    "table ip {TABLE} {{ chain forward {{ type filter hook forward priority -10; policy accept; }}; }}\n"
                );
                namespace.run_with_input(&["nft", "-f", "-"], &text)?;
            }
            By::Iptables | By::Legacy => {}
            By::Ipset => {
                let set = set_for(to);
                run(namespace, &format!("ipset create {set} hash:ip"))?;
                run(
                    namespace,
                    &format!("iptables -I FORWARD -s {from} -m set --match-set {set} dst -j DROP"),
                )?;
            }
        }
        Ok(Self {
            node: node.clone(),
            by,
            from,
            to,
        })
    }

    /// The packets are dropped from now on.
    ///
    /// # Errors
    /// When the command refuses.
    pub fn deny(&self) -> Result<()> {
        let (from, to) = (self.from, self.to);
        self.run(&match self.by {
            By::Nft => {
                format!("nft add rule ip {TABLE} forward ip saddr {from} ip daddr {to} drop")
            }
            By::Iptables => format!("iptables -I FORWARD -s {from} -d {to} -j DROP"),
            By::Legacy => format!("iptables-legacy -I FORWARD -s {from} -d {to} -j DROP"),
            By::Ipset => format!("ipset add {} {to}", set_for(to)),
        })
    }

    /// They pass again.
    ///
    /// # Errors
    /// When the command refuses.
    pub fn allow(&self) -> Result<()> {
        let (from, to) = (self.from, self.to);
        self.run(&match self.by {
            By::Nft => format!("nft flush chain ip {TABLE} forward"),
            By::Iptables => format!("iptables -D FORWARD -s {from} -d {to} -j DROP"),
            By::Legacy => format!("iptables-legacy -D FORWARD -s {from} -d {to} -j DROP"),
            By::Ipset => format!("ipset del {} {to}", set_for(to)),
        })
    }

    fn run(&self, words: &str) -> Result<()> {
        run(self.node.namespace(), words)
    }
}

/// A set for each destination.
fn set_for(to: Ipv4Addr) -> String {
    format!("lab-{to}")
}

fn run(namespace: &Namespace, words: &str) -> Result<()> {
    let argv: Vec<&str> = words.split_whitespace().collect();
    namespace.run(&argv).map(drop)
}
