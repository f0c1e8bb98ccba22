//! A whole cluster: nodes and the underlay between them.

use std::{
    collections::BTreeSet,
    fs,
    net::Ipv4Addr,
    ops::Index,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use crate::{
    namespace::{Kind, Namespace},
    node::{Node, UPLINK},
    scratch::Scratch,
};

/// What connects the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Underlay {
    /// One veth pair between two nodes.
    Direct,
    /// A bridge in a namespace of its own: all nodes in one IP network.
    Switch,
    /// A router in a namespace of its own: every node in a network of its own.
    Router,
}

/// The network config that labs use unless told otherwise. Subnets above 10.244.63.0 are for leases
/// that scenarios write by hand: no agent chooses them.
pub const DEFAULT_CONFIG: &str = r#"{"Network":"10.244.0.0/16","SubnetMax":"10.244.63.0","Backend":{"Type":"vxlan","FastPath":"direct"}}"#;

/// Nodes and what is between them; everything disappears with the value.
#[derive(Debug)]
pub struct Lab {
    nodes: Vec<Node>,
    fabric: Option<Namespace>,
    scratch: Scratch,
}

impl Lab {
    /// `count` nodes: two face to face, more around a switch.
    ///
    /// # Errors
    /// Without root, or when the kernel refuses.
    pub fn with_nodes(count: u8) -> Result<Self> {
        let underlay = if count == 2 {
            Underlay::Direct
        } else {
            Underlay::Switch
        };
        Self::over(underlay, count)
    }

    /// `count` nodes over the given underlay.
    ///
    /// # Errors
    /// As [`Self::with_nodes`].
    pub fn over(underlay: Underlay, count: u8) -> Result<Self> {
        ensure!(
            underlay != Underlay::Direct || count == 2,
            "a direct link joins two nodes, not {count}"
        );
        ensure!(count <= 26, "nodes are named by letters");
        let scratch = Scratch::new()?;
        let (leases, logs) = (scratch.path().join("leases"), scratch.path().join("logs"));
        fs::create_dir(&leases)?;
        fs::create_dir(&logs)?;
        let nodes = (0..count)
            .map(|index| {
                let name = format!("node-{}", char::from(b'a' + index));
                let address = address(underlay, index);
                Node::new(&name, address, &leases, &logs)
            })
            .collect::<Result<Vec<_>>>()?;
        let lab = Self {
            fabric: wire(underlay, &nodes)?,
            nodes,
            scratch,
        };
        lab.write_config(DEFAULT_CONFIG)?;
        Ok(lab)
    }

    /// All nodes.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The first two nodes, the usual cast of a scenario.
    #[must_use]
    pub fn pair(&self) -> (&Node, &Node) {
        (&self.nodes[0], &self.nodes[1])
    }

    /// The namespace of switch or router, where a third party can listen or inject.
    #[must_use]
    pub fn fabric(&self) -> Option<&Namespace> {
        self.fabric.as_ref()
    }

    /// The directory with one file per lease, shared by all nodes.
    #[must_use]
    pub fn lease_dir(&self) -> PathBuf {
        self.scratch.path().join("leases")
    }

    /// A directory for captures and the like.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Replaces the network config.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_config(&self, json: &str) -> Result<()> {
        fs::write(self.lease_dir().join("config"), json).context("cannot write the network config")
    }

    /// Inode numbers of every namespace of nodes and underlay.
    ///
    /// # Errors
    /// When a handle cannot be read.
    pub fn inodes(&self) -> Result<BTreeSet<u64>> {
        let mut all = BTreeSet::new();
        for namespace in self
            .nodes
            .iter()
            .map(Node::namespace)
            .chain(self.fabric.as_ref())
        {
            all.extend(namespace.inodes()?);
        }
        Ok(all)
    }
}

impl Index<usize> for Lab {
    type Output = Node;

    fn index(&self, index: usize) -> &Node {
        &self.nodes[index]
    }
}

fn address(underlay: Underlay, index: u8) -> Ipv4Addr {
    match underlay {
        Underlay::Direct | Underlay::Switch => Ipv4Addr::new(172, 18, 0, index + 1),
        Underlay::Router => Ipv4Addr::new(172, 18, index + 1, 1),
    }
}

fn wire(underlay: Underlay, nodes: &[Node]) -> Result<Option<Namespace>> {
    let fabric = match underlay {
        Underlay::Direct => {
            let other = nodes[1].namespace().pid();
            nodes[0].namespace().ip(&format!(
                "link add {UPLINK} type veth peer name {UPLINK} netns {other}"
            ))?;
            None
        }
        Underlay::Switch => {
            let switch = Namespace::new("switch", Kind::Network)?;
            switch.ip_batch("link add br0 type bridge mcast_snooping 0\nlink set br0 up\n")?;
            for (index, node) in nodes.iter().enumerate() {
                let holder = node.namespace().pid();
                switch.ip_batch(&format!(
                    "link add port{index} type veth peer name {UPLINK} netns {holder}\n\
                     link set port{index} master br0\n\
                     link set port{index} up\n"
                ))?;
            }
            Some(switch)
        }
        Underlay::Router => {
            let router = Namespace::new("router", Kind::Network)?;
            router.sysctl("net.ipv4.ip_forward", "1")?;
            for (index, node) in nodes.iter().enumerate() {
                let holder = node.namespace().pid();
                router.ip_batch(&format!(
                    "link add port{index} type veth peer name {UPLINK} netns {holder}\n\
                     addr add 172.18.{}.254/24 dev port{index}\n\
                     link set port{index} up\n",
                    index + 1
                ))?;
            }
            Some(router)
        }
    };
    for node in nodes {
        let address = node.public_ip();
        node.namespace().ip_batch(&format!(
            "addr add {address}/24 brd + dev {UPLINK}\nlink set {UPLINK} up\n"
        ))?;
        if underlay == Underlay::Router {
            let [a, b, c, _] = address.octets();
            node.namespace()
                .ip(&format!("route add default via {a}.{b}.{c}.254"))?;
        }
    }
    for node in nodes {
        node.namespace().wait_until_up(UPLINK)?;
    }
    if let Some(fabric) = &fabric {
        for index in 0..nodes.len() {
            fabric.wait_until_up(&format!("port{index}"))?;
        }
    }
    Ok(fabric)
}
