//! Which path did the packets take? Answered by counters, never by assumption.
//!
//! The kernel path shows in the counters of `flannel.1`, the eBPF path in those
//! of the programs. A claim names the path, the node, the direction and the
//! number of packets, and both counters have to agree with it.

use std::fmt;

use anyhow::{Result, ensure};

use crate::node::{InterfaceCounters, Node, TUNNEL};

/// One of the two ways through a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// The programs.
    Ebpf,
    /// Bridge, routing, `flannel.1`.
    Kernel,
}

/// Seen from the node's pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// From a pod to a peer.
    Out,
    /// From a peer to a pod.
    In,
}

/// How many packets a claim speaks of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packets {
    /// So many, neither more nor less.
    Exactly(u64),
    /// Segmentation offload and acknowledgements: a lower bound.
    AtLeast(u64),
}

impl From<u64> for Packets {
    fn from(count: u64) -> Self {
        Self::Exactly(count)
    }
}

impl Packets {
    fn include(self, count: u64) -> bool {
        match self {
            Self::Exactly(wanted) => count == wanted,
            Self::AtLeast(wanted) => count >= wanted,
        }
    }
}

/// Packets of a few flows that the kernel sees before the programs take over.
const FIRST_PACKETS: u64 = 8;

/// What both counters of one node show at one moment, or between two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Taken {
    /// Packets that the programs encapsulated.
    pub encapsulated: u64,
    /// Packets that the programs delivered.
    pub decapsulated: u64,
    /// Copies of delivered packets that only asked the kernel.
    pub copies: u64,
    /// What `flannel.1` counted, such copies included.
    pub tunnel: InterfaceCounters,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "programs {} out, {} in; {TUNNEL} {} out, {} in",
            self.encapsulated, self.decapsulated, self.tunnel.sent, self.tunnel.received
        )
    }
}

impl Taken {
    /// Reads the counters of `node`; one without an agent of ours has no programs.
    ///
    /// # Errors
    /// When there is no tunnel device, or an agent that does not answer.
    pub fn now(node: &Node) -> Result<Self> {
        let mut taken = Self::default();
        if node.exists_agent()? {
            let status = node.status()?;
            taken.encapsulated = status.packets("encapsulated");
            taken.decapsulated = status.packets("decapsulated");
            taken.copies = status.packets("in_probe");
        }
        taken.tunnel = node.interface_counters(TUNNEL)?;
        Ok(taken)
    }

    /// What happened since `before`. Counters of programs start anew with their maps.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        let grown = |now: u64, then: u64| now.checked_sub(then).unwrap_or(now);
        Self {
            encapsulated: grown(self.encapsulated, before.encapsulated),
            decapsulated: grown(self.decapsulated, before.decapsulated),
            copies: grown(self.copies, before.copies),
            tunnel: InterfaceCounters {
                sent: grown(self.tunnel.sent, before.tunnel.sent),
                received: grown(self.tunnel.received, before.tunnel.received),
            },
        }
    }

    /// Packets in one direction: by the programs, by the tunnel device.
    #[must_use]
    pub fn on(self, way: Way) -> (u64, u64) {
        match way {
            Way::Out => (self.encapsulated, self.tunnel.sent),
            Way::In => (
                self.decapsulated,
                self.tunnel.received.saturating_sub(self.copies),
            ),
        }
    }
}

impl Node {
    /// Whether an agent of ours listens here.
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn exists_agent(&self) -> Result<bool> {
        self.namespace().exists(crate::node::CONTROL_SOCKET)
    }
}

/// Every counter of `node` that is not zero, for the message of a failure.
#[must_use]
pub fn describe(node: &Node) -> String {
    let mut text = match Taken::now(node) {
        Ok(taken) => format!("{}: {taken}", node.name()),
        Err(error) => return format!("{}: no counters: {error:#}", node.name()),
    };
    if let Ok(status) = node.status() {
        for row in status.counters.iter().filter(|row| row.packets > 0) {
            text += &format!("\n    {:<22} {:>9}  {}", row.reason, row.packets, row.text);
        }
        for pod in &status.pods {
            let attached = if pod.attached { "" } else { ", no program" };
            text += &format!("\n    pod {} on {}{attached}", pod.address, pod.interface);
        }
    }
    text
}

/// The counters of some nodes before the traffic of a scenario.
#[derive(Debug)]
pub struct PathWatch(Vec<(Node, Taken)>);

impl PathWatch {
    /// Notes the counters now.
    ///
    /// # Errors
    /// As [`Taken::now`].
    pub fn start(nodes: &[&Node]) -> Result<Self> {
        nodes
            .iter()
            .map(|node| Ok(((*node).clone(), Taken::now(node)?)))
            .collect::<Result<Vec<_>>>()
            .map(Self)
    }

    /// What `node` has seen since the start.
    ///
    /// # Errors
    /// When the node is not watched, or as [`Taken::now`].
    pub fn taken(&self, node: &Node) -> Result<Taken> {
        let before = self.0.iter().find(|(known, _)| known.name() == node.name());
        let (_, before) =
            before.ok_or_else(|| anyhow::anyhow!("{} is not watched", node.name()))?;
        Ok(Taken::now(node)?.since(*before))
    }

    /// Demands that `packets` took `path` on `node`, and none the other one but those that
    /// the programs let the kernel have to learn from.
    ///
    /// # Errors
    /// When one of the counters disagrees.
    pub fn expect(
        &self,
        node: &Node,
        way: Way,
        path: Path,
        packets: impl Into<Packets>,
    ) -> Result<()> {
        let taken = self.taken(node)?;
        let (programs, tunnel) = taken.on(way);
        let (used, other) = match path {
            Path::Ebpf => (programs, tunnel),
            Path::Kernel => (tunnel, programs),
        };
        let wanted = packets.into();
        // Before the programs carry UDP, or TCP that is older than they, its flow shows itself to
        // the kernel; later single packets ask whether that still holds.
        let shown = match path {
            Path::Ebpf => FIRST_PACKETS.max(used / 20),
            Path::Kernel => 0,
        };
        ensure!(
            wanted.include(used + other) && other <= shown && used >= other,
            "{}: {wanted:?} packets were to go {way:?} by the {path:?} path alone, but: {taken}",
            node.name()
        );
        Ok(())
    }

    /// Demands the same for both directions of traffic between pods of two
    /// nodes: `request` packets from `a` to `b`, `reply` packets back.
    ///
    /// # Errors
    /// As [`Self::expect`].
    pub fn expect_exchange(
        &self,
        (a, path_a): (&Node, Path),
        (b, path_b): (&Node, Path),
        request: impl Into<Packets>,
        reply: impl Into<Packets>,
    ) -> Result<()> {
        let (request, reply) = (request.into(), reply.into());
        self.expect(a, Way::Out, path_a, request)?;
        self.expect(b, Way::In, path_b, request)?;
        self.expect(b, Way::Out, path_b, reply)?;
        self.expect(a, Way::In, path_a, reply)
    }
}
