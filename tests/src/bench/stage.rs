//! Where one side is measured: a lab of its own, so that no side meets the
//! connections, caches or rules of another.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use ipnet::Ipv4Net;

use super::{
    measure::{Offloads, Target},
    peer,
    proof::{At, Flows, Seen, Way},
    side::{Agent as AgentKind, Ends, Side},
};
use crate::{
    agent::{Agent, AgentOptions},
    cluster,
    lab::Lab,
    namespace::{Kind, Namespace},
    node::{Node, TUNNEL, UPLINK},
    paths::{self, Taken},
    pod::Pod,
    services::Rules,
    traffic::request_response::Protocol,
};

/// As flannel's own manifest has it: agents get their ways by flags, and a peer its own default.
const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
/// The Service's address.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// What the server's ports for the Service have on top of those for itself: the
/// same ones would make conntrack move one of two connections to another port.
const SERVICE_PORTS: u16 = 1000;
/// First port of a server, plain.
const FIRST_PORT: u16 = 6000;

/// What a server is for; each has a port of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Port {
    /// Request and response.
    RequestResponse,
    /// Short connections.
    Connections,
    /// One way.
    Flood,
    /// iperf3.
    Streams,
    /// The first of many, for many flows.
    Flows,
}

impl Port {
    const ALL: [Self; 5] = [
        Self::RequestResponse,
        Self::Connections,
        Self::Flood,
        Self::Streams,
        Self::Flows,
    ];

    const fn number(self, target: Target) -> u16 {
        let plain = FIRST_PORT + self as u16;
        match target {
            Target::Pod => plain,
            Target::Service => plain + SERVICE_PORTS,
        }
    }
}

/// A side with its lab, ready for traffic.
#[derive(Debug)]
pub struct Stage {
    /// The row of the table.
    pub side: Side,
    field: Field,
}

#[derive(Debug)]
enum Field {
    Nodes {
        _agents: Vec<Agent>,
        lab: Lab,
    },
    Pods(Box<Cast>),
    Joined {
        client: Namespace,
        server: Namespace,
    },
}

/// Agents and pods on nodes, in the order in which they have to end.
#[derive(Debug)]
struct Cast {
    client: Pod,
    server: Pod,
    agents: Vec<Agent>,
    _registry: Option<peer::Registry>,
    lab: Lab,
}

/// Address of the server of two joined pods.
const JOINED_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

impl Stage {
    /// Builds the lab of `side`.
    ///
    /// # Errors
    /// When agents or pods do not get ready.
    pub fn set(side: &Side) -> Result<Self> {
        Self::with_config(
            side,
            CONFIG,
            Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16),
        )
    }

    /// The same with another network config, whose pods are in `network`.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn with_config(side: &Side, config: &str, network: Ipv4Net) -> Result<Self> {
        let lab = || {
            let lab = Lab::with_nodes(2)?;
            lab.write_config(config)?;
            Ok::<_, anyhow::Error>(lab)
        };
        let field = match &side.ends {
            Ends::BareNodes => Field::Nodes {
                _agents: Vec::new(),
                lab: lab()?,
            },
            Ends::Nodes => {
                let lab = lab()?;
                let options = AgentOptions {
                    datapath: "netlink",
                    fast_path: "off",
                    ..AgentOptions::default()
                };
                let agents = crate::agent::start_everywhere(&lab, &options)?;
                let (a, b) = lab.pair();
                rules(network, b.public_ip()).apply_to(&[a, b])?;
                // A Service's address needs a route until it is translated.
                a.namespace()
                    .ip(&format!("route add default via {}", b.public_ip()))?;
                Field::Nodes {
                    _agents: agents,
                    lab,
                }
            }
            Ends::Pods(AgentKind::Own {
                datapath,
                fast_path,
                classes,
            }) => {
                let lab = lab()?;
                let mut options = AgentOptions {
                    datapath,
                    fast_path,
                    ..AgentOptions::default()
                };
                if !*classes {
                    options = options.argument("--fast-path-classes=off");
                }
                let agents = crate::agent::start_everywhere(&lab, &options)?;
                with_pods(lab, network, agents, None)?
            }
            Ends::Pods(AgentKind::Other(program)) => {
                let lab = lab()?;
                let (agents, registry) = peer::start_everywhere(&lab, program, config)?;
                with_pods(lab, network, agents, registry)?
            }
            Ends::Joined => joined()?,
        };
        let stage = Self {
            side: side.clone(),
            field,
        };
        for end in [stage.client(), stage.server()] {
            // Thousands of connections a second: neither ports nor TIME_WAIT may run out.
            end.sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
            end.sysctl("net.ipv4.tcp_max_tw_buckets", "64")?;
        }
        stage.warm_up()?;
        Ok(stage)
    }

    /// The namespace of the client.
    #[must_use]
    pub fn client(&self) -> &Namespace {
        match &self.field {
            Field::Nodes { lab, .. } => lab.pair().0.namespace(),
            Field::Pods(cast) => cast.client.namespace(),
            Field::Joined { client, .. } => client,
        }
    }

    /// The namespace of the server.
    #[must_use]
    pub fn server(&self) -> &Namespace {
        match &self.field {
            Field::Nodes { lab, .. } => lab.pair().1.namespace(),
            Field::Pods(cast) => cast.server.namespace(),
            Field::Joined { server, .. } => server,
        }
    }

    /// Its own address.
    #[must_use]
    pub fn server_address(&self) -> Ipv4Addr {
        match &self.field {
            Field::Nodes { lab, .. } => lab.pair().1.public_ip(),
            Field::Pods(cast) => cast.server.address(),
            Field::Joined { .. } => JOINED_SERVER,
        }
    }

    /// What the client connects to; the server listens on that port.
    #[must_use]
    pub fn way_to(&self, port: Port, target: Target) -> SocketAddrV4 {
        let address = match target {
            Target::Pod => self.server_address(),
            Target::Service => SERVICE,
        };
        SocketAddrV4::new(address, port.number(target))
    }

    /// The two nodes, if there are any.
    #[must_use]
    pub fn nodes(&self) -> Option<(&Node, &Node)> {
        match &self.field {
            Field::Nodes { lab, .. } => Some(lab.pair()),
            Field::Pods(cast) => Some(cast.lab.pair()),
            Field::Joined { .. } => None,
        }
    }

    /// The two pods of a side between pods on nodes.
    #[must_use]
    pub fn pods(&self) -> Option<(&Pod, &Pod)> {
        match &self.field {
            Field::Pods(cast) => Some((&cast.client, &cast.server)),
            _ => None,
        }
    }

    /// The agents of a side between pods on nodes, and the directory of their leases.
    pub fn agents(&mut self) -> Option<(&mut [Agent], PathBuf)> {
        match &mut self.field {
            Field::Pods(cast) => Some((&mut cast.agents, cast.lab.lease_dir())),
            _ => None,
        }
    }

    /// Lets every neighbour be resolved.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn warm_up(&self) -> Result<()> {
        let server = self.server_address().to_string();
        self.client()
            .run(&["ping", "-n", "-q", "-c", "1", "-W", "2", &server])
            .map(drop)
            .with_context(|| format!("side {}", self.side.name))
    }

    /// Sets the offloads of the uplinks.
    ///
    /// # Errors
    /// When ethtool refuses.
    pub fn set_offloads(&self, offloads: Offloads) -> Result<()> {
        let state = match offloads {
            Offloads::Veth => "on",
            Offloads::Nic => "off",
        };
        // A network card merges on the way in; a veth does so only if told.
        let gro = match offloads {
            Offloads::Veth => "off",
            Offloads::Nic => "on",
        };
        for end in [At::Client, At::Server] {
            self.link_owner(end).run(&[
                "ethtool",
                "-K",
                UPLINK,
                "tso",
                state,
                "gso",
                state,
                "tx-udp_tnl-segmentation",
                state,
                "gro",
                gro,
            ])?;
        }
        Ok(())
    }

    /// Whose `eth0` joins the two ends.
    fn link_owner(&self, at: At) -> &Namespace {
        match (self.nodes(), at) {
            (Some((a, _)), At::Client) => a.namespace(),
            (Some((_, b)), At::Server) => b.namespace(),
            (None, At::Client) => self.client(),
            (None, At::Server) => self.server(),
        }
    }

    /// The counters of one node: to peers, from peers.
    fn seen(&self, at: At) -> Result<(Seen, Seen)> {
        let (received, sent) = self.link_owner(at).packets_of(UPLINK)?;
        let node = self.nodes().map(|(a, b)| match at {
            At::Client => a,
            At::Server => b,
        });
        let taken = match (&self.side.ends, node) {
            (Ends::Pods(_) | Ends::Nodes, Some(node)) => Taken::now(node)
                .with_context(|| format!("counters of {} and {TUNNEL}", node.name()))?,
            _ => Taken::default(),
        };
        Ok((
            Seen {
                programs: taken.encapsulated,
                tunnel: taken.tunnel.sent,
                link: sent,
            },
            Seen {
                programs: taken.decapsulated,
                tunnel: taken.tunnel.received,
                link: received,
            },
        ))
    }

    /// Notes all counters.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn watch(&self) -> Result<Watch<'_>> {
        Ok(Watch {
            stage: self,
            before: [self.seen(At::Client)?, self.seen(At::Server)?],
        })
    }

    /// For the message of a failure.
    fn describe(&self) -> String {
        match self.nodes() {
            Some((a, b)) => format!("{}\n{}", paths::describe(a), paths::describe(b)),
            None => String::new(),
        }
    }
}

/// Counters before the traffic of one measurement.
#[derive(Debug)]
pub struct Watch<'a> {
    stage: &'a Stage,
    before: [(Seen, Seen); 2],
}

/// Packets that must have gone one way, at the least.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// From client to server.
    pub there: u64,
    /// From server to client.
    pub back: u64,
}

impl Watch<'_> {
    /// Demands that `packets` took `way` on both nodes, both ways, and none another.
    ///
    /// # Errors
    /// Names the node, the direction and its counters.
    pub fn expect(&self, way: Way, flows: Flows, packets: Passed) -> Result<()> {
        for (at, (out_before, in_before)) in [At::Client, At::Server].into_iter().zip(self.before) {
            let (out_now, in_now) = self.stage.seen(at)?;
            let (sends, receives) = match at {
                At::Client => (packets.there, packets.back),
                At::Server => (packets.back, packets.there),
            };
            for (direction, seen, wanted) in [
                ("out", out_now.since(out_before), sends),
                ("in", in_now.since(in_before), receives),
            ] {
                if !way.holds(flows, seen, wanted) {
                    bail!(
                        "wrong path on the {at:?}'s node: {wanted} packets were to go {direction} by {way:?} alone, but: {seen}\n{}",
                        self.stage.describe()
                    );
                }
            }
        }
        Ok(())
    }
}

fn rules(network: Ipv4Net, server: Ipv4Addr) -> Rules {
    let mut rules = Rules::new(network);
    for port in Port::ALL {
        let number = port.number(Target::Service);
        let endpoint = SocketAddrV4::new(server, number);
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            rules = rules.service(SERVICE, number, protocol, &[endpoint]);
        }
    }
    rules
}

fn with_pods(
    lab: Lab,
    network: Ipv4Net,
    agents: Vec<Agent>,
    registry: Option<peer::Registry>,
) -> Result<Field> {
    let (a, b) = lab.pair();
    let (client, server) = (a.add_pod()?, b.add_pod()?);
    rules(network, server.address()).apply_to(&[a, b])?;
    for pod in [&client, &server] {
        if pod.node().exists_agent()? {
            cluster::introduce(pod)?;
        } else {
            pod.announce()?;
        }
    }
    Ok(Field::Pods(Box::new(Cast {
        client,
        server,
        agents,
        _registry: registry,
        lab,
    })))
}

fn joined() -> Result<Field> {
    let client = Namespace::new("joined-client", Kind::Network)?;
    let server = Namespace::new("joined-server", Kind::Network)?;
    // The MTU of the pods on nodes: else streams would differ by it.
    client.ip_batch(&format!(
        "link add {UPLINK} mtu 1450 type veth peer name {UPLINK} mtu 1450 netns {}\n\
         addr add 10.0.0.1/24 dev {UPLINK}\n\
         link set {UPLINK} up\n",
        server.pid()
    ))?;
    server.ip_batch(&format!(
        "addr add {JOINED_SERVER}/24 dev {UPLINK}\nlink set {UPLINK} up\n"
    ))?;
    client.wait_until_up(UPLINK)?;
    server.wait_until_up(UPLINK)?;
    Ok(Field::Joined { client, server })
}
