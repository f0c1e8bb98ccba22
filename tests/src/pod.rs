//! A pod: a network namespace behind a veth, wired as a CNI plugin would.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    process::Child,
    time::Duration,
};

use anyhow::{Result, ensure};
use ipnet::Ipv4Net;

use crate::{
    namespace::{Kind, Namespace},
    node::{BRIDGE, Node},
    task::Task,
    wait,
};

/// How the host side of a pod's veth is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// A port of the bridge `cni0`, as flannel's own CNI plugin does it.
    Bridged,
    /// A host route to the veth and a link-local gateway, as Calico's plugin does it.
    Routed,
}

/// The gateway of a routed pod; nobody owns it, the neighbour entry is static.
const LINK_LOCAL_GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);

/// A running pod; it leaves the node when dropped.
#[derive(Debug)]
pub struct Pod {
    namespace: Namespace,
    node: Node,
    address: Ipv4Addr,
    interface: String,
}

impl Pod {
    pub(crate) fn start(node: &Node, last: u8, wiring: Wiring, mtu: Option<u32>) -> Result<Self> {
        let file = node.subnet_file()?;
        let address = nth(file.gateway, last);
        let namespace = Namespace::new(&format!("{}-pod-{address}", node.name()), Kind::Network)?;
        let pod = Self {
            namespace,
            node: node.clone(),
            address,
            interface: format!("veth{last}"),
        };
        let mtu = mtu.unwrap_or(file.mtu);
        let (veth, holder) = (&pod.interface, pod.namespace.pid());
        node.namespace().ip_batch(&format!(
            "link add {veth} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {holder}\n"
        ))?;
        match wiring {
            Wiring::Bridged => pod.plug_into_bridge(file.gateway)?,
            Wiring::Routed => pod.route_to(file.gateway.addr())?,
        }
        pod.namespace.wait_until_up("eth0")?;
        node.namespace().wait_until_up(veth)?;
        if wiring == Wiring::Bridged {
            pod.wait_until_forwarding()?;
        }
        Ok(pod)
    }

    fn plug_into_bridge(&self, gateway: Ipv4Net) -> Result<()> {
        let (node, veth) = (self.node.namespace(), &self.interface);
        if !node.exists(&format!("/sys/class/net/{BRIDGE}"))? {
            node.ip_batch(&format!(
                "link add {BRIDGE} type bridge\n\
                 addr add {gateway} brd + dev {BRIDGE}\n\
                 link set {BRIDGE} up\n"
            ))?;
            // Set to itself, as the CNI plugin does it: else it becomes that of the
            // lowest port and changes under the pods' neighbour entries.
            let mac = self.node.mac(BRIDGE)?;
            node.ip(&format!("link set {BRIDGE} address {mac}"))?;
        }
        node.ip_batch(&format!(
            "link set {veth} master {BRIDGE}\nlink set {veth} up\n"
        ))?;
        self.namespace.ip_batch(&format!(
            "addr add {}/{} brd + dev eth0\nlink set eth0 up\nroute add default via {}\n",
            self.address,
            gateway.prefix_len(),
            gateway.addr()
        ))
    }

    fn wait_until_forwarding(&self) -> Result<()> {
        const FORWARDING: &str = "3";
        let path = format!("/sys/class/net/{}/brport/state", self.interface);
        let what = format!("{} forwards", self.interface);
        wait::until_true(&what, Duration::from_secs(5), || {
            Ok(self.node.namespace().read(&path)?.trim() == FORWARDING)
        })
    }

    fn route_to(&self, gateway: Ipv4Addr) -> Result<()> {
        let (node, veth, address) = (self.node.namespace(), &self.interface, self.address);
        let host_mac = self.node.mac(veth)?;
        node.ip_batch(&format!(
            "link set {veth} up\nroute add {address}/32 dev {veth} scope link\n"
        ))?;
        // Traceroute answers need an address of the node that pods can tell apart.
        let owned = node.ip("-o -4 addr show")?;
        if !owned.contains(&format!(" {gateway}/")) {
            node.ip(&format!("addr add {gateway}/32 dev lo"))?;
        }
        self.namespace.ip_batch(&format!(
            "addr add {address}/32 dev eth0\n\
             link set eth0 up\n\
             neigh add {LINK_LOCAL_GATEWAY} lladdr {host_mac} dev eth0 nud permanent\n\
             route add {LINK_LOCAL_GATEWAY} dev eth0 scope link\n\
             route add default via {LINK_LOCAL_GATEWAY} dev eth0\n"
        ))
    }

    /// Its address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its address with a port.
    #[must_use]
    pub fn at(&self, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(self.address, port)
    }

    /// The node it runs on.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Name of the host side of its veth.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Starts one of the lab's traffic tools inside, `arguments` as on its command line.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn tool(&self, arguments: &str) -> Result<Task> {
        Task::start(&self.namespace, arguments)
    }

    /// Starts any other program inside.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(&self, argv: &[&str]) -> Result<Child> {
        let mut command = self.namespace.command(argv[0]);
        command.args(&argv[1..]);
        self.namespace.spawn(command)
    }

    /// Makes room for thousands of connections a second: a client finds a free port at once, where else
    /// half of its time goes into looking for one and after 28,000 in a minute there is none; a server
    /// accepts all that come at once.
    ///
    /// # Errors
    /// When the kernel does not take a setting.
    pub fn make_room(&self) -> Result<()> {
        self.namespace
            .sysctl("net.ipv4.ip_local_port_range", "1024 65535")?;
        self.namespace
            .sysctl("net.ipv4.tcp_max_tw_buckets", "1000")?;
        self.namespace.sysctl("net.core.somaxconn", "16384")
    }

    /// Sends a ping to the gateway, so that the node learns of the pod as it
    /// would from a CNI plugin's announcement.
    ///
    /// # Errors
    /// When the gateway does not answer.
    pub fn announce(&self) -> Result<()> {
        let gateway = self.node.subnet_file()?.gateway.addr().to_string();
        self.ping(&gateway, 1)
    }

    /// Pings `count` times, all of which have to be answered.
    ///
    /// # Errors
    /// When one is lost.
    pub fn ping(&self, to: &str, count: u32) -> Result<()> {
        let count_text = count.to_string();
        // iputils leaves as soon as everything came back; busybox knows no -i 0.05.
        let argv = ["ping", "-n", "-q", "-c", &count_text, "-W", "2", to];
        let said = self.namespace.run(&argv)?;
        ensure!(
            said.contains(" 0% packet loss"),
            "pings to {to} were lost:\n{said}"
        );
        Ok(())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // The veth goes with the namespace, but only some time later.
        let _ = self
            .node
            .namespace()
            .ip(&format!("link del {}", self.interface));
    }
}

/// The address number `last` in the subnet of `gateway`.
fn nth(gateway: Ipv4Net, last: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(gateway.network()) + u32::from(last))
}
