//! A node: a machine of the cluster, with an uplink and a bridge for its pods.

use std::{
    fmt,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_user::{
    mac::MacAddr,
    observe::status::{Mode, Status},
};
use ipnet::Ipv4Net;

use crate::{
    binaries,
    namespace::{Kind, Namespace},
    pod::{Pod, Wiring},
    wait,
};

/// Where the agent writes what pods need to know.
pub const SUBNET_FILE: &str = "/run/flannel/subnet.env";
/// Where the agent listens for `flannelctl`.
pub const CONTROL_SOCKET: &str = "/run/flannel/control.sock";
/// The uplink of every node.
pub const UPLINK: &str = "eth0";
/// The tunnel device of VNI 1.
pub const TUNNEL: &str = "flannel.1";
/// The bridge that the CNI plugin makes.
pub const BRIDGE: &str = "cni0";

/// A cheap handle; the namespace lives until the last one is dropped.
#[derive(Clone)]
pub struct Node(Arc<Inner>);

struct Inner {
    namespace: Namespace,
    public_ip: Ipv4Addr,
    lease_dir: PathBuf,
    log_dir: PathBuf,
    /// Last byte of the next pod's address, as host-local counts them.
    next_pod: AtomicU8,
}

/// What `subnet.env` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetFile {
    /// All pods of the cluster.
    pub network: Ipv4Net,
    /// The gateway's address with the length of the node's subnet.
    pub gateway: Ipv4Net,
    /// MTU of pods.
    pub mtu: u32,
}

/// Counters of one interface, as the kernel keeps them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterfaceCounters {
    /// Packets received.
    pub received: u64,
    /// Packets sent.
    pub sent: u64,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({} {})", self.name(), self.public_ip())
    }
}

impl Node {
    /// An unconnected node; [`crate::lab::Lab`] wires it.
    pub(crate) fn new(
        name: &str,
        public_ip: Ipv4Addr,
        lease_dir: &Path,
        log_dir: &Path,
    ) -> Result<Self> {
        let namespace = Namespace::new(name, Kind::Node)?;
        namespace.sysctl("net.ipv4.ip_forward", "1")?;
        Ok(Self(Arc::new(Inner {
            namespace,
            public_ip,
            lease_dir: lease_dir.to_owned(),
            log_dir: log_dir.to_owned(),
            next_pod: AtomicU8::new(2),
        })))
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        self.namespace().name()
    }

    /// Its namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.0.namespace
    }

    /// Its address on the underlay.
    #[must_use]
    pub fn public_ip(&self) -> Ipv4Addr {
        self.0.public_ip
    }

    /// The lease directory that all nodes of the lab share.
    #[must_use]
    pub fn lease_dir(&self) -> &Path {
        &self.0.lease_dir
    }

    pub(crate) fn log_dir(&self) -> &Path {
        &self.0.log_dir
    }

    /// Reads the subnet file.
    ///
    /// # Errors
    /// When it is missing or says nothing useful.
    pub fn subnet_file(&self) -> Result<SubnetFile> {
        let text = self.namespace().read(SUBNET_FILE)?;
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .with_context(|| format!("{SUBNET_FILE} has no {key}:\n{text}"))
        };
        Ok(SubnetFile {
            network: value("FLANNEL_NETWORK")?.parse()?,
            gateway: value("FLANNEL_SUBNET")?.parse()?,
            mtu: value("FLANNEL_MTU")?.parse()?,
        })
    }

    /// The node's pod subnet.
    ///
    /// # Errors
    /// As [`Self::subnet_file`].
    pub fn subnet(&self) -> Result<Ipv4Net> {
        Ok(self.subnet_file()?.gateway.trunc())
    }

    /// Starts a pod on the bridge, with the next free address.
    ///
    /// # Errors
    /// When the node has no subnet yet, or the kernel refuses.
    pub fn add_pod(&self) -> Result<Pod> {
        self.add_pod_with(Wiring::Bridged, None)
    }

    /// Starts a pod wired as told; `mtu` replaces that of the subnet file.
    ///
    /// # Errors
    /// As [`Self::add_pod`].
    pub fn add_pod_with(&self, wiring: Wiring, mtu: Option<u32>) -> Result<Pod> {
        let last = self.0.next_pod.fetch_add(1, Ordering::Relaxed);
        ensure!(last < 255, "{}: no pod address is left", self.name());
        Pod::start(self, last, wiring, mtu)
    }

    /// Starts a pod with a given last byte of its address, as host-local does
    /// when it hands out an address again.
    ///
    /// # Errors
    /// As [`Self::add_pod`], and when the address is in use.
    pub fn add_pod_numbered(&self, last: u8) -> Result<Pod> {
        Pod::start(self, last, Wiring::Bridged, None)
    }

    /// Counters of an interface of this node.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn interface_counters(&self, interface: &str) -> Result<InterfaceCounters> {
        let read = |name: &str| -> Result<u64> {
            let path = format!("/sys/class/net/{interface}/statistics/{name}");
            Ok(self.namespace().read(&path)?.trim().parse()?)
        };
        Ok(InterfaceCounters {
            received: read("rx_packets")?,
            sent: read("tx_packets")?,
        })
    }

    /// Has what comes in by an interface worked off by the CPUs of the mask `cpus`, chosen by flow,
    /// as a card with several queues does. A veth pair leaves it to the CPU of whoever sent it.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn steer(&self, interface: &str, cpus: u32) -> Result<()> {
        let path = format!("/sys/class/net/{interface}/queues/rx-0/rps_cpus");
        let write = format!("echo {cpus:x} > {path}");
        self.namespace().run(&["sh", "-c", &write]).map(drop)
    }

    /// The interface index, which changes when something is made anew.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn interface_index(&self, interface: &str) -> Result<u32> {
        let path = format!("/sys/class/net/{interface}/ifindex");
        Ok(self.namespace().read(&path)?.trim().parse()?)
    }

    /// The MAC address of an interface.
    ///
    /// # Errors
    /// When there is no such interface.
    pub fn mac(&self, interface: &str) -> Result<MacAddr> {
        let path = format!("/sys/class/net/{interface}/address");
        Ok(self.namespace().read(&path)?.trim().parse()?)
    }

    /// Runs `flannelctl` inside; it has to succeed.
    ///
    /// # Errors
    /// When it fails, with what it said.
    pub fn flannelctl(&self, arguments: &[&str]) -> Result<String> {
        let path = binaries::flannelctl()?;
        let path = path.to_str().context("flannelctl lies in an odd place")?;
        let argv: Vec<&str> = [path, "--socket", CONTROL_SOCKET]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        self.namespace().run(&argv)
    }

    /// The agent's status document.
    ///
    /// # Errors
    /// When no agent answers.
    pub fn status(&self) -> Result<Status> {
        let text = self.flannelctl(&["status", "-o", "json"])?;
        serde_json::from_str(&text)
            .with_context(|| format!("{}: this is no status document:\n{text}", self.name()))
    }

    /// Asks the agent for another datapath; returns once it is in force.
    ///
    /// # Errors
    /// When the agent refuses, or says it did and did not.
    pub fn mode(&self, mode: Mode) -> Result<()> {
        self.request_mode(mode)?;
        let now = self.status()?;
        ensure!(
            now.mode == mode,
            "{}: flannelctl mode {mode:?} succeeded, yet the mode is {:?} ({})",
            self.name(),
            now.mode,
            now.mode_reason
        );
        Ok(())
    }

    /// The same without asking back, for quick toggling.
    ///
    /// # Errors
    /// When the agent refuses.
    pub fn request_mode(&self, mode: Mode) -> Result<()> {
        let word = match mode {
            Mode::Ebpf => "ebpf",
            Mode::Netlink => "netlink",
        };
        self.flannelctl(&["mode", word])?;
        Ok(())
    }

    /// Waits until an agent in ebpf mode has a program on the veth of `pod`; in
    /// netlink mode it has no use for pods and does not list them.
    ///
    /// # Errors
    /// When that does not happen within five seconds.
    pub fn wait_until_pod_is_known(&self, pod: &Pod) -> Result<()> {
        let what = format!("{} knows pod {}", self.name(), pod.address());
        wait::until_true(&what, Duration::from_secs(5), || {
            let status = self.status()?;
            let mut pods = status.pods.iter();
            Ok(status.mode == Mode::Netlink
                || pods.any(|row| row.address == pod.address() && row.attached))
        })
    }
}
