//! A cluster with the rules of a Kubernetes node, to compare two datapaths under
//! the same traffic: what the learned fast path must not do worse than the kernel.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    sync::Mutex,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Mode;

use crate::{
    agent::AgentOptions,
    cluster::Cluster,
    ends::Ends,
    exchange::{ECHO_PORT, RECEIVE_PORT, RR_PORT, RunningPing, RunningStream, STREAM_PORT},
    lab::Lab,
    namespace::Namespace,
    node::Node,
    paths::{self, Taken, Way},
    pod::Pod,
    scenario::scenario,
    services::Rules,
    traffic::{
        connections::{ConnectionsReport, Ending},
        many_flows::ManyReport,
        request_response::Protocol,
    },
};

/// The Service behind which the server pod is.
pub const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// `connections-serve`.
pub const CONNECTIONS_PORT: u16 = 6200;
/// `many-serve`.
pub const MANY_PORT: u16 = 6100;

const TCP_PORTS: [u16; 4] = [STREAM_PORT, RR_PORT, MANY_PORT, CONNECTIONS_PORT];
const UDP_PORTS: [u16; 4] = [ECHO_PORT, RR_PORT, MANY_PORT, RECEIVE_PORT];

/// Which datapath the nodes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The kernel's: the reference.
    Netlink,
    /// The learned fast path, where every connection opens and ends in the kernel.
    Learned,
    /// The same with short connections by classes: the default.
    Classes,
    /// The learned fast path, and TCP between pods from its SYN on.
    Direct,
}

impl Side {
    /// How agents of this side are started.
    #[must_use]
    pub fn options(self) -> AgentOptions {
        match self {
            Self::Netlink => AgentOptions::in_mode(Mode::Netlink),
            Self::Learned => Self::Classes.options().argument("--fast-path-classes=off"),
            Self::Classes => AgentOptions::in_mode(Mode::Ebpf).fast_path("learned"),
            Self::Direct => AgentOptions::in_mode(Mode::Ebpf).fast_path("direct"),
        }
    }
}

/// What the client addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// The server pod itself.
    Pod,
    /// [`SERVICE`], which the node translates.
    Service,
}

impl Via {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Pod, Self::Service];
}

/// A cluster and its nodes' rules.
#[derive(Debug)]
pub struct Kube {
    /// Agents and pods.
    pub cluster: Cluster,
    /// As applied to both nodes at the start.
    pub rules: Rules,
    side: Side,
}

impl Kube {
    /// Starts agents of `side` and applies the rules to both nodes.
    ///
    /// # Errors
    /// When an agent does not get ready or a rule is refused.
    pub fn start(lab: &Lab, side: Side) -> Result<Self> {
        Self::start_with(lab, side, &side.options())
    }

    /// The same with the agents' options changed.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_with(lab: &Lab, side: Side, options: &AgentOptions) -> Result<Self> {
        let cluster = Cluster::start_with(lab, std::slice::from_ref(options))?;
        let (a, b) = cluster.nodes();
        let rules = rules_for(a, &cluster.server)?;
        rules.apply_to(&[a, b])?;
        // Passes with rules as without, and resolves what is to be resolved.
        cluster
            .client
            .ping(&cluster.server.address().to_string(), 2)?;
        Ok(Self {
            cluster,
            rules,
            side,
        })
    }

    /// Which datapath this is.
    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// Whether packets can be expected on the fast path.
    #[must_use]
    pub fn is_bypassing(&self) -> bool {
        self.side != Side::Netlink
    }

    /// The client pod.
    #[must_use]
    pub fn client(&self) -> &Pod {
        &self.cluster.client
    }

    /// The server pod.
    #[must_use]
    pub fn server(&self) -> &Pod {
        &self.cluster.server
    }

    /// Where a client finds the server's `port`.
    #[must_use]
    pub fn target(&self, via: Via, port: u16) -> SocketAddrV4 {
        match via {
            Via::Pod => self.server().at(port),
            Via::Service => SocketAddrV4::new(SERVICE, port),
        }
    }

    /// Starts a TCP stream to the server.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn stream(&self, via: Via, arguments: &str) -> Result<RunningStream> {
        let to = (self.server().namespace(), self.target(via, STREAM_PORT));
        RunningStream::start_at(self.client().namespace(), to, arguments)
    }

    /// As [`Self::stream`], with both ends on one CPU.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn stream_on_one_cpu(&self, via: Via, arguments: &str) -> Result<RunningStream> {
        let to = (self.server().namespace(), self.target(via, STREAM_PORT));
        RunningStream::start_on_one_cpu(self.client().namespace(), to, arguments)
    }

    /// Starts datagrams to an echo in the server.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn ping(&self, via: Via, arguments: &str) -> Result<RunningPing> {
        let to = (self.server().namespace(), self.target(via, ECHO_PORT));
        RunningPing::start_at(self.client().namespace(), to, arguments)
    }

    /// Runs connections that end in the given way; the client's and the server's report.
    ///
    /// # Errors
    /// When a tool failed; connections that did are a result.
    pub fn connections(
        &self,
        via: Via,
        ending: Ending,
        arguments: &str,
    ) -> Result<(ConnectionsReport, ConnectionsReport)> {
        let to = (
            self.server().namespace(),
            self.target(via, CONNECTIONS_PORT),
        );
        connections(self.client().namespace(), to, ending, arguments)
    }

    /// Runs many request/response flows of one process to one process; with
    /// `cpu` both stay there.
    ///
    /// # Errors
    /// When a tool failed; flows that did are a result.
    pub fn many_flows(
        &self,
        via: Via,
        protocol: Protocol,
        arguments: &str,
        cpu: Option<usize>,
    ) -> Result<ManyReport> {
        let common = format!("--protocol {}", protocol.name());
        let place = cpu.map_or_else(String::new, |cpu| format!("--cpu {cpu}"));
        let server = self
            .server()
            .tool(&format!("many-serve {common} --port {MANY_PORT} {place}"))?;
        let target = self.target(via, MANY_PORT);
        let report = self
            .client()
            .tool(&format!("many {common} --to {target} {arguments} {place}"))?
            .result()?;
        drop(server);
        Ok(report)
    }

    /// Demands that since `before` the programs took at least `share` of the
    /// packets in both directions on both nodes; of the kernel path nothing.
    ///
    /// # Errors
    /// Names the node and the direction.
    pub fn expect_bypassed(&self, before: &[Taken; 2], share: f64) -> Result<()> {
        if !self.is_bypassing() {
            return Ok(());
        }
        let (a, b) = self.cluster.nodes();
        for (node, before) in [a, b].into_iter().zip(before) {
            let taken = Taken::now(node)?.since(*before);
            for way in [Way::Out, Way::In] {
                let (programs, tunnel) = taken.on(way);
                let all = programs + tunnel;
                ensure!(
                    programs as f64 >= share * all as f64 && all > 0,
                    "{}: only {programs} of {all} packets bypassed the kernel {way:?}\n{}",
                    node.name(),
                    paths::describe(node)
                );
            }
        }
        Ok(())
    }

    /// The counters of both nodes now.
    ///
    /// # Errors
    /// When an agent does not answer.
    pub fn taken(&self) -> Result<[Taken; 2]> {
        let (a, b) = self.cluster.nodes();
        Ok([Taken::now(a)?, Taken::now(b)?])
    }
}

/// The rules of `node`'s cluster with `server` behind [`SERVICE`].
///
/// # Errors
/// When the node has no subnet yet.
pub fn rules_for(node: &Node, server: &Pod) -> Result<Rules> {
    let rules = Rules::new(node.subnet_file()?.network);
    Ok(with_endpoint(rules, server))
}

/// Every port of [`SERVICE`] leads to `server` alone.
#[must_use]
pub fn with_endpoint(rules: Rules, server: &Pod) -> Rules {
    let tcp = TCP_PORTS.map(|port| (port, Protocol::Tcp));
    let udp = UDP_PORTS.map(|port| (port, Protocol::Udp));
    tcp.into_iter()
        .chain(udp)
        .fold(rules, |rules, (port, protocol)| {
            rules.service(SERVICE, port, protocol, &[server.at(port)])
        })
}

/// Runs connections from one namespace to another; the client's and the server's report.
///
/// # Errors
/// When a tool failed.
pub fn connections(
    from: &Namespace,
    to: (&Namespace, SocketAddrV4),
    ending: Ending,
    arguments: &str,
) -> Result<(ConnectionsReport, ConnectionsReport)> {
    let ask = format!("connections --ending {} {arguments}", ending.name());
    Ends::start(from, to, "connections-serve", &ask)?.result()
}

/// What the same body gave on both sides.
#[derive(Debug)]
pub struct Compared<T> {
    /// The reference.
    pub netlink: T,
    /// What is judged.
    pub learned: T,
}

/// Runs `body` in a fresh cluster on each side.
///
/// # Panics
/// When it fails on one of them.
pub fn compare<T>(body: impl Fn(&Kube) -> Result<T>) -> Compared<T> {
    Compared {
        netlink: on(Side::Netlink, &body),
        learned: on(Side::Learned, &body),
    }
}

/// What `body` gives in a fresh cluster of that side.
///
/// # Panics
/// When it fails.
pub fn on<T>(side: Side, body: impl Fn(&Kube) -> Result<T>) -> T {
    let result = Mutex::new(None);
    scenario(2, |lab| {
        let kube = Kube::start(lab, side)?;
        let value = body(&kube).with_context(|| format!("{side:?}"))?;
        *result.lock().expect("nobody panicked") = Some(value);
        Ok(())
    });
    let value = result.into_inner().expect("nobody panicked");
    value.expect("the scenario has ended well")
}

/// Runs `body` in a cluster of the learned fast path.
///
/// # Panics
/// When it fails.
pub fn learned(body: impl FnOnce(&Kube) -> Result<()>) {
    scenario(2, |lab| body(&Kube::start(lab, Side::Learned)?));
}

/// Sleeps; what a scenario waits for has no event.
pub fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}
