//! A node as the original flannel configures it (contract section 9), by the
//! commands that an administrator would use to do the same.
//!
//! It is the reference that the eBPF path is compared with, and the other
//! half of a mixed cluster.

use std::{fs, net::Ipv4Addr};

use anyhow::{Context, Result};
use flannel_user::mac::MacAddr;
use ipnet::Ipv4Net;

use crate::{
    lab::Lab,
    node::{Node, SUBNET_FILE, TUNNEL, UPLINK},
};

/// What VXLAN over IPv4 adds to a packet.
const OVERHEAD: u32 = 50;

/// What a node has to know of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    /// Its pod subnet.
    pub subnet: Ipv4Net,
    /// Its address on the underlay.
    pub public_ip: Ipv4Addr,
    /// MAC address of its tunnel device.
    pub vtep_mac: MacAddr,
}

/// A node that runs the original flannel, as far as others can tell.
#[derive(Debug, Clone)]
pub struct OriginalFlannel {
    node: Node,
    identity: Peer,
}

impl OriginalFlannel {
    /// Makes `flannel.1` and the subnet file.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn start(node: &Node, subnet: Ipv4Net) -> Result<Self> {
        let vtep_mac = MacAddr::random_local();
        let namespace = node.namespace();
        let uplink_mtu: u32 = namespace
            .read(&format!("/sys/class/net/{UPLINK}/mtu"))?
            .trim()
            .parse()?;
        let (local, base) = (node.public_ip(), subnet.network());
        let mtu = uplink_mtu - OVERHEAD;
        // Port 8472 is what the kernel itself takes when no port is asked for.
        namespace.ip_batch(&format!(
            "link add {TUNNEL} address {vtep_mac} mtu {mtu} txqueuelen 0 \
             type vxlan id 1 dev {UPLINK} local {local} dstport 8472 nolearning\n\
             addr add {base}/32 dev {TUNNEL}\n\
             link set {TUNNEL} up\n"
        ))?;
        let network = subnet_network();
        let gateway = Ipv4Addr::from(u32::from(base) + 1);
        let env = format!(
            "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={gateway}/{}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n",
            subnet.prefix_len()
        );
        namespace
            .within(|| {
                fs::create_dir_all("/run/flannel")?;
                fs::write(SUBNET_FILE, env)
            })?
            .with_context(|| format!("{}: cannot write {SUBNET_FILE}", node.name()))?;
        Ok(Self {
            node: node.clone(),
            identity: Peer {
                subnet,
                public_ip: local,
                vtep_mac,
            },
        })
    }

    /// What others have to know of this node.
    #[must_use]
    pub fn identity(&self) -> Peer {
        self.identity
    }

    /// Neighbour, FDB entry, route, in this order.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn add_peer(&self, peer: &Peer) -> Result<()> {
        let Peer {
            subnet,
            public_ip,
            vtep_mac,
        } = peer;
        let (namespace, base) = (self.node.namespace(), subnet.network());
        namespace.ip(&format!(
            "neigh replace {base} lladdr {vtep_mac} dev {TUNNEL} nud permanent"
        ))?;
        namespace.bridge(&format!(
            "fdb replace {vtep_mac} dev {TUNNEL} dst {public_ip} self permanent"
        ))?;
        namespace.ip(&format!(
            "route replace {subnet} via {base} dev {TUNNEL} proto boot onlink"
        ))?;
        Ok(())
    }

    /// Publishes the lease where the agents of the lab look for leases.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn publish_lease(&self) -> Result<()> {
        let directory = self.node.lease_dir().join("subnets");
        fs::create_dir_all(&directory)?;
        let subnet = self.identity.subnet;
        let name = format!("{}-{}", subnet.network(), subnet.prefix_len());
        // Written beside and renamed, as the file source demands of every writer.
        let temporary = directory.join(format!(".{name}.tmp"));
        fs::write(&temporary, self.lease_json())?;
        fs::rename(&temporary, directory.join(&name))
            .with_context(|| format!("cannot publish lease {name}"))
    }

    /// The lease attributes, byte for byte as flannel writes them.
    #[must_use]
    pub fn lease_json(&self) -> String {
        format!(
            r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{}"}}}}"#,
            self.identity.public_ip, self.identity.vtep_mac
        )
    }

    /// Learns the agent of `other` as flannel would from the registry.
    ///
    /// # Errors
    /// When the agent does not answer.
    pub fn learn_from_agent(&self, other: &Node) -> Result<()> {
        let status = other.status()?;
        self.add_peer(&Peer {
            subnet: status.node.subnet,
            public_ip: status.node.public_ip,
            vtep_mac: status.node.vtep_mac.parse()?,
        })
    }
}

/// Every node of `lab` as an original-flannel node with subnet `10.244.<n>.0/24`.
///
/// # Errors
/// When the kernel refuses.
pub fn configure_all(lab: &Lab) -> Result<Vec<OriginalFlannel>> {
    let flannels = lab
        .nodes()
        .iter()
        .zip(1..)
        .map(|(node, number)| OriginalFlannel::start(node, subnet(number)))
        .collect::<Result<Vec<_>>>()?;
    for one in &flannels {
        for other in &flannels {
            if one.identity != other.identity {
                one.add_peer(&other.identity)?;
            }
        }
    }
    Ok(flannels)
}

/// The subnet that original-flannel node `number` gets.
#[must_use]
pub fn subnet(number: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 244, number, 0), 24)
}

fn subnet_network() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16)
}
