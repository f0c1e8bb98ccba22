//! Which pods live on this node, found by route and link.
//!
//! Nobody tells us; the kernel knows. A pod is the other end of a veth whose peer lives in
//! another network namespace, and its packets reach it in one of two ways:
//!
//! ```text
//! bridged   10.244.1.0/24 dev cni0      veth is a port of cni0   gateway MAC = cni0's
//! routed    10.244.1.7/32 dev veth7     veth stands alone        gateway MAC = the veth's own
//! ```
//!
//! Addresses and MAC are asked of the pod's namespace through its id, without entering it, so no
//! privilege over the pod and no open namespace file is needed.

mod look;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::Ipv4Addr,
};

use ipnet::Ipv4Net;

use self::look::{Link, addresses, connected_routes, links};
use super::netlink::rtnl::{Rtnl, RtnlError};
use crate::mac::MacAddr;

/// One pod address behind one veth of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// The pod's address inside the own subnet.
    pub address: Ipv4Addr,
    /// Name of the veth's end on the host.
    pub interface: String,
    /// Its interface index.
    pub ifindex: u32,
    /// MAC address of the pod's end.
    pub mac: MacAddr,
    /// MAC address that the pod's packets to other nodes are sent to: the
    /// bridge's, or the veth's own where there is no bridge.
    pub gateway_mac: MacAddr,
    /// MTU of the veth's host end, in bytes.
    pub mtu: u32,
}

/// An address that more than one interface claims. No shortcut may be taken to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ambiguous {
    /// The address.
    pub address: Ipv4Addr,
    /// The host's interfaces in question, in order of their names: veths, or an
    /// interface that has the address itself.
    pub interfaces: Vec<String>,
}

/// What one look at the kernel found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Discovery {
    /// The pods, in order of their addresses.
    pub pods: Vec<Pod>,
    /// Addresses left out.
    pub ambiguous: Vec<Ambiguous>,
}

/// The pods with an address inside `pod_subnet`. A pod that vanishes during the look
/// is left out.
///
/// # Errors
/// The host's own links, addresses or routes could not be read.
pub async fn discover(rtnl: &mut Rtnl, pod_subnet: Ipv4Net) -> Result<Discovery, RtnlError> {
    let host = Host {
        links: links(rtnl, None).await?,
        addresses: addresses(rtnl, None).await?,
        routes: connected_routes(rtnl, pod_subnet).await?,
    };
    let candidates = host.candidates(pod_subnet);

    // One dump per namespace, not per veth.
    let namespaces: BTreeSet<i32> = candidates.iter().map(|veth| veth.namespace).collect();
    let mut inside = HashMap::with_capacity(namespaces.len());
    for id in namespaces {
        // Gone, or no longer known under that id: its pods are gone as well.
        let (Ok(links), Ok(addresses)) =
            (links(rtnl, Some(id)).await, addresses(rtnl, Some(id)).await)
        else {
            continue;
        };
        inside.insert(id, Inside { links, addresses });
    }
    Ok(assemble(pod_subnet, &host, &candidates, &inside))
}

/// The host's side of things.
#[derive(Debug, Default)]
struct Host {
    links: Vec<Link>,
    /// (interface index, address)
    addresses: Vec<(u32, Ipv4Addr)>,
    /// (destination, interface index) of gateway-less main-table routes inside the pod
    /// subnet or equal to it.
    routes: Vec<(Ipv4Net, u32)>,
}

/// What a pod's namespace says about itself.
#[derive(Debug, Default)]
struct Inside {
    links: Vec<Link>,
    addresses: Vec<(u32, Ipv4Addr)>,
}

/// A veth that may lead to a pod.
#[derive(Debug, PartialEq, Eq)]
struct Candidate<'a> {
    link: &'a Link,
    namespace: i32,
    /// Index of the pod's end in its namespace.
    peer: u32,
    gateway_mac: MacAddr,
    /// Which of the pod's addresses count.
    reached: Vec<Ipv4Net>,
}

impl Host {
    fn candidates(&self, pod_subnet: Ipv4Net) -> Vec<Candidate<'_>> {
        let bridges: BTreeMap<u32, MacAddr> = self
            .links
            .iter()
            .filter(|link| link.bridge)
            .filter(|link| {
                let has_address = |&(index, address): &(u32, Ipv4Addr)| {
                    index == link.index && pod_subnet.contains(&address)
                };
                self.addresses.iter().any(has_address)
                    || self.routes.contains(&(pod_subnet, link.index))
            })
            .map(|link| (link.index, link.mac))
            .collect();
        let mut routed: BTreeMap<u32, Vec<Ipv4Net>> = BTreeMap::new();
        for &(destination, index) in &self.routes {
            routed.entry(index).or_default().push(destination);
        }
        self.links
            .iter()
            .filter(|link| link.veth)
            .filter_map(|link| {
                let (gateway_mac, reached) = match link.master {
                    Some(master) => (*bridges.get(&master)?, vec![pod_subnet]),
                    None => (link.mac, routed.get(&link.index)?.clone()),
                };
                Some(Candidate {
                    link,
                    namespace: link.peer_namespace?,
                    peer: link.peer?,
                    gateway_mac,
                    reached,
                })
            })
            .collect()
    }
}

/// Joins both sides.
fn assemble(
    pod_subnet: Ipv4Net,
    host: &Host,
    candidates: &[Candidate<'_>],
    inside: &HashMap<i32, Inside>,
) -> Discovery {
    let mut claims: BTreeMap<Ipv4Addr, Vec<Pod>> = BTreeMap::new();
    for veth in candidates {
        let Some(namespace) = inside.get(&veth.namespace) else {
            continue;
        };
        // The id may have been given to another namespace since: the other end must point back.
        let Some(end) = namespace
            .links
            .iter()
            .find(|end| end.index == veth.peer && end.veth && end.peer == Some(veth.link.index))
        else {
            continue;
        };
        let addresses: BTreeSet<Ipv4Addr> = namespace
            .addresses
            .iter()
            .filter(|(index, _)| *index == end.index)
            .map(|(_, address)| *address)
            .filter(|address| pod_subnet.contains(address))
            .filter(|address| veth.reached.iter().any(|net| net.contains(address)))
            .collect();
        for address in addresses {
            claims.entry(address).or_default().push(Pod {
                address,
                interface: veth.link.name.clone(),
                ifindex: veth.link.index,
                mac: end.mac,
                gateway_mac: veth.gateway_mac,
                mtu: veth.link.mtu,
            });
        }
    }

    let names: HashMap<u32, &str> = host
        .links
        .iter()
        .map(|link| (link.index, link.name.as_str()))
        .collect();
    let own: HashMap<Ipv4Addr, &str> = host
        .addresses
        .iter()
        .filter_map(|(index, address)| Some((*address, *names.get(index)?)))
        .collect();
    let mut discovery = Discovery::default();
    for (address, mut pods) in claims {
        let own = own.get(&address);
        if pods.len() == 1 && own.is_none() {
            discovery.pods.append(&mut pods);
        } else {
            let mut interfaces: Vec<_> = pods.into_iter().map(|pod| pod.interface).collect();
            interfaces.extend(own.map(|name| (*name).to_owned()));
            interfaces.sort();
            discovery.ambiguous.push(Ambiguous {
                address,
                interfaces,
            });
        }
    }
    discovery
}

#[cfg(test)]
mod tests {
    use super::*;

    const BRIDGE: u32 = 10;

    fn subnet() -> Ipv4Net {
        "10.244.1.0/24".parse().expect("a subnet")
    }

    fn ip(last: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, 1, last)
    }

    fn mac(last: u8) -> MacAddr {
        MacAddr([2, 0, 0, 0, 0, last])
    }

    fn bridge() -> Link {
        Link {
            index: BRIDGE,
            name: "cni0".into(),
            mac: mac(10),
            bridge: true,
            ..Link::default()
        }
    }

    /// The host's end of a veth with index `index` to namespace `index`, whose end there is 2.
    fn veth(index: u32, master: Option<u32>) -> Link {
        Link {
            index,
            name: format!("veth{index}"),
            mac: mac(index as u8),
            mtu: 1450,
            veth: true,
            master,
            peer: Some(2),
            peer_namespace: Some(index as i32),
            ..Link::default()
        }
    }

    fn pod(index: u32, addresses: &[Ipv4Addr]) -> (i32, Inside) {
        let end = Link {
            index: 2,
            mac: mac(index as u8 + 100),
            veth: true,
            peer: Some(index),
            ..Link::default()
        };
        let inside = Inside {
            links: vec![end],
            addresses: addresses.iter().map(|address| (2, *address)).collect(),
        };
        (index as i32, inside)
    }

    fn found(host: &Host, inside: Vec<(i32, Inside)>) -> Discovery {
        let candidates = host.candidates(subnet());
        assemble(subnet(), host, &candidates, &inside.into_iter().collect())
    }

    #[test]
    fn a_bridge_with_the_subnets_address_leads_to_pods() {
        let host = Host {
            links: vec![bridge(), veth(21, Some(BRIDGE)), veth(22, Some(99))],
            addresses: vec![(BRIDGE, ip(1))],
            routes: vec![],
        };
        let discovery = found(&host, vec![pod(21, &[ip(5)]), pod(22, &[ip(6)])]);
        assert_eq!(
            discovery.pods,
            [Pod {
                address: ip(5),
                interface: "veth21".into(),
                ifindex: 21,
                mac: mac(121),
                gateway_mac: mac(10),
                mtu: 1450,
            }]
        );
        assert_eq!(discovery.ambiguous, []);
    }

    #[test]
    fn a_bridge_with_the_subnets_route_alone_does_too() {
        let host = Host {
            links: vec![bridge(), veth(21, Some(BRIDGE))],
            addresses: vec![],
            routes: vec![(subnet(), BRIDGE)],
        };
        assert_eq!(found(&host, vec![pod(21, &[ip(5)])]).pods.len(), 1);
        let without = Host {
            routes: vec![],
            ..host
        };
        assert_eq!(found(&without, vec![pod(21, &[ip(5)])]).pods, []);
    }

    #[test]
    fn of_a_routed_veth_only_routed_addresses_count() {
        let host = Host {
            links: vec![veth(21, None)],
            addresses: vec![],
            routes: vec![(Ipv4Net::from(ip(5)), 21)],
        };
        let discovery = found(&host, vec![pod(21, &[ip(5), ip(6)])]);
        assert_eq!(discovery.pods.len(), 1);
        assert_eq!(discovery.pods[0].address, ip(5));
        assert_eq!(discovery.pods[0].gateway_mac, mac(21));
    }

    #[test]
    fn addresses_outside_the_subnet_and_other_ends_do_not_count() {
        let host = Host {
            links: vec![bridge(), veth(21, Some(BRIDGE))],
            addresses: vec![(BRIDGE, ip(1))],
            routes: vec![],
        };
        let outside = Ipv4Addr::new(10, 244, 2, 5);
        assert_eq!(found(&host, vec![pod(21, &[outside])]).pods, []);

        let (id, mut reused) = pod(21, &[ip(5)]);
        reused.links[0].peer = Some(77);
        assert_eq!(
            found(&host, vec![(id, reused)]).pods,
            [],
            "another veth's end"
        );
        assert_eq!(found(&host, vec![]).pods, [], "a namespace that is gone");
    }

    #[test]
    fn an_address_with_two_claims_is_left_out() {
        let host = Host {
            links: vec![bridge(), veth(21, Some(BRIDGE)), veth(22, Some(BRIDGE))],
            addresses: vec![(BRIDGE, ip(1))],
            routes: vec![],
        };
        let discovery = found(
            &host,
            vec![pod(21, &[ip(5), ip(1)]), pod(22, &[ip(5), ip(6)])],
        );
        assert_eq!(discovery.pods.len(), 1);
        assert_eq!(discovery.pods[0].address, ip(6));
        assert_eq!(
            discovery.ambiguous,
            [
                Ambiguous {
                    address: ip(1),
                    interfaces: vec!["cni0".into(), "veth21".into()],
                },
                Ambiguous {
                    address: ip(5),
                    interfaces: vec!["veth21".into(), "veth22".into()],
                },
            ]
        );
    }
}
