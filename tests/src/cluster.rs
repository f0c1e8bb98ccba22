//! The usual cast: an agent on every node, a client pod on the first and a
//! server pod on the second, everything warm.

use anyhow::Result;
use flannel_user::observe::status::Mode;

use crate::{
    agent::{Agent, AgentOptions},
    lab::Lab,
    node::Node,
    paths::{Packets, Path, PathWatch},
    pod::Pod,
};

/// Agents and the two pods that talk.
#[derive(Debug)]
pub struct Cluster {
    /// One per node, in order.
    pub agents: Vec<Agent>,
    /// On the first node.
    pub client: Pod,
    /// On the second node.
    pub server: Pod,
}

impl Cluster {
    /// Starts agents in the given modes, the last one repeated for further nodes.
    ///
    /// # Errors
    /// When an agent does not get ready or pods do not reach each other.
    pub fn start(lab: &Lab, modes: &[Mode]) -> Result<Self> {
        let options: Vec<AgentOptions> = modes.iter().copied().map(AgentOptions::in_mode).collect();
        Self::start_with(lab, &options)
    }

    /// The same with all the agents' options.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(lab: &Lab, options: &[AgentOptions]) -> Result<Self> {
        let mut agents = Vec::new();
        for (index, node) in lab.nodes().iter().enumerate() {
            let options = &options[index.min(options.len() - 1)];
            agents.push(Agent::start(node, options)?);
        }
        let peers = agents.len() - 1;
        for agent in &mut agents {
            agent.wait_for_peers(peers)?;
        }
        let (a, b) = lab.pair();
        let cluster = Self {
            client: a.add_pod()?,
            server: b.add_pod()?,
            agents,
        };
        cluster.warm_up()?;
        Ok(cluster)
    }

    /// Lets every node learn its pod and every neighbour be resolved.
    ///
    /// # Errors
    /// When the pods do not reach each other.
    pub fn warm_up(&self) -> Result<()> {
        for pod in [&self.client, &self.server] {
            introduce(pod)?;
        }
        self.client.ping(&self.server.address().to_string(), 2)
    }

    /// The nodes of the two pods.
    #[must_use]
    pub fn nodes(&self) -> (&Node, &Node) {
        (self.client.node(), self.server.node())
    }

    /// Notes the counters of both nodes.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn watch(&self) -> Result<PathWatch> {
        let (a, b) = self.nodes();
        PathWatch::start(&[a, b])
    }

    /// Demands that `request` packets went from client to server and `reply`
    /// packets back, on each node by the path of its mode.
    ///
    /// # Errors
    /// When a counter disagrees.
    pub fn expect_paths_of_modes(
        &self,
        watch: &PathWatch,
        request: impl Into<Packets>,
        reply: impl Into<Packets>,
    ) -> Result<()> {
        let (a, b) = self.nodes();
        let path = |node: &Node| Ok::<_, anyhow::Error>(path_of(node.status()?.mode));
        watch.expect_exchange((a, path(a)?), (b, path(b)?), request, reply)
    }

    /// Demands the same of packets that programs leave to the kernel in every mode.
    ///
    /// # Errors
    /// When a counter disagrees.
    pub fn expect_kernel_path(
        &self,
        watch: &PathWatch,
        request: impl Into<Packets>,
        reply: impl Into<Packets>,
    ) -> Result<()> {
        let (a, b) = self.nodes();
        watch.expect_exchange((a, Path::Kernel), (b, Path::Kernel), request, reply)
    }
}

/// The path that known packets take in a mode.
#[must_use]
pub fn path_of(mode: Mode) -> Path {
    match mode {
        Mode::Ebpf => Path::Ebpf,
        Mode::Netlink => Path::Kernel,
    }
}

/// Announces a new pod and waits until its agent knows it.
///
/// # Errors
/// When that does not happen in time.
pub fn introduce(pod: &Pod) -> Result<()> {
    pod.announce()?;
    pod.node().wait_until_pod_is_known(pod)
}
