//! Between values and routing netlink messages: what the kernel has on the device, and the requests
//! that set or delete one entry. Each message stands once.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
    },
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
        RouteScope, RouteType,
    },
};

use super::{
    entries::{Actual, FoundFdb, FoundNeighbour, FoundRoute},
    rtnl::{Request, Rtnl, RtnlError},
};
use crate::mac::MacAddr;

/// Set, or replace what stands under the same key.
const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// One entry of the kernel, displayed as the `ip` and `bridge` commands write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// FDB entry; without a node only for deleting.
    Fdb(MacAddr, Option<Ipv4Addr>),
    /// Permanent neighbour; without a MAC only for deleting.
    Neighbour(Ipv4Addr, Option<MacAddr>),
    /// Route of a subnet through its base.
    Route(Ipv4Net),
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fdb(mac, Some(node)) => write!(f, "FDB entry {mac} dst {node}"),
            Self::Fdb(mac, None) => write!(f, "FDB entry {mac}"),
            Self::Neighbour(base, Some(mac)) => write!(f, "neighbour {base} lladdr {mac}"),
            Self::Neighbour(base, None) => write!(f, "neighbour {base}"),
            Self::Route(subnet) => write!(f, "route {subnet} via {}", subnet.network()),
        }
    }
}

impl Entry {
    /// The request that sets the entry on the device with index `device`.
    pub(super) fn set(self, device: u32) -> Request {
        let message = match self {
            Self::Fdb(..) | Self::Neighbour(..) => {
                RouteNetlinkMessage::NewNeighbour(self.neighbour_message(device))
            }
            Self::Route(subnet) => RouteNetlinkMessage::NewRoute(route_message(subnet, device)),
        };
        Request {
            message,
            flags: REPLACE,
        }
    }

    /// The request that deletes it.
    pub(super) fn delete(self, device: u32) -> Request {
        let message = match self {
            Self::Fdb(..) | Self::Neighbour(..) => {
                RouteNetlinkMessage::DelNeighbour(self.neighbour_message(device))
            }
            Self::Route(subnet) => RouteNetlinkMessage::DelRoute(route_message(subnet, device)),
        };
        Request { message, flags: 0 }
    }

    fn neighbour_message(self, device: u32) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.ifindex = device;
        message.header.state = NeighbourState::Permanent;
        let (address, mac) = match self {
            Self::Fdb(mac, node) => {
                message.header.family = AddressFamily::Bridge;
                message.header.flags = NeighbourFlags::Own;
                (node, Some(mac))
            }
            Self::Neighbour(base, mac) => {
                message.header.family = AddressFamily::Inet;
                message.header.kind = RouteType::Unicast;
                (Some(base), mac)
            }
            Self::Route(_) => (None, None),
        };
        let destination =
            address.map(|ip| NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)));
        let lladdr = mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        message.attributes = destination.into_iter().chain(lladdr).collect();
        message
    }
}

fn route_message(subnet: Ipv4Net, device: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: subnet.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        flags: RouteFlags::Onlink,
        ..RouteHeader::default()
    };
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(subnet.network())),
        RouteAttribute::Gateway(RouteAddress::Inet(subnet.network())),
        RouteAttribute::Oif(device),
    ];
    message
}

/// What the kernel has: FDB and neighbours of the device, routes of the main table.
pub(super) async fn observe(rtnl: &mut Rtnl, device: u32) -> Result<Actual, RtnlError> {
    let mut actual = Actual::default();

    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Bridge;
    filter.header.ifindex = device;
    for object in rtnl.dump(RouteNetlinkMessage::GetNeighbour(filter)).await? {
        if let RouteNetlinkMessage::NewNeighbour(entry) = object
            && entry.header.ifindex == device
            && let Some((mac, found)) = found_fdb(&entry)
        {
            actual.fdb.insert(mac, found);
        }
    }

    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Inet;
    filter.attributes.push(NeighbourAttribute::IfIndex(device));
    for object in rtnl.dump(RouteNetlinkMessage::GetNeighbour(filter)).await? {
        if let RouteNetlinkMessage::NewNeighbour(entry) = object
            && entry.header.ifindex == device
            && let Some((base, found)) = found_neighbour(&entry)
        {
            actual.neighbours.insert(base, found);
        }
    }

    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    filter.header.table = RouteHeader::RT_TABLE_MAIN;
    for object in rtnl.dump(RouteNetlinkMessage::GetRoute(filter)).await? {
        if let RouteNetlinkMessage::NewRoute(route) = object
            && let Some((subnet, found)) = found_route(&route, device)
        {
            actual.routes.entry(subnet).or_default().push(found);
        }
    }
    Ok(actual)
}

/// `None` for entries under the zero or a multicast MAC: flannel makes none of those.
fn found_fdb(entry: &NeighbourMessage) -> Option<(MacAddr, FoundFdb)> {
    let mut mac = None;
    let mut found = FoundFdb {
        node: None,
        ours: entry.header.state == NeighbourState::Permanent
            && entry.header.flags == NeighbourFlags::Own,
    };
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = mac_from(bytes),
            // The family is AF_BRIDGE, so the parser cannot know that this is an address.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                found.node = <[u8; 4]>::try_from(bytes.as_slice())
                    .ok()
                    .map(Ipv4Addr::from);
            }
            NeighbourAttribute::Port(_)
            | NeighbourAttribute::Vni(_)
            | NeighbourAttribute::SourceVni(_)
            | NeighbourAttribute::IfIndex(_) => found.ours = false,
            _ => {}
        }
    }
    mac.filter(|mac| mac.0 != [0; 6] && mac.0[0] & 1 == 0)
        .map(|mac| (mac, found))
}

fn found_neighbour(entry: &NeighbourMessage) -> Option<(Ipv4Addr, FoundNeighbour)> {
    let mut address = None;
    let mut found = FoundNeighbour {
        mac: None,
        permanent: entry.header.state == NeighbourState::Permanent,
    };
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(*ip),
            NeighbourAttribute::LinkLayerAddress(bytes) => found.mac = mac_from(bytes),
            _ => {}
        }
    }
    address.map(|address| (address, found))
}

/// `None` for routes of another key than ours: other tables, a TOS, a metric.
fn found_route(route: &RouteMessage, device: u32) -> Option<(Ipv4Net, FoundRoute)> {
    let header = &route.header;
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut gateway = None;
    let mut out = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = *ip,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(*ip),
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::Priority(metric) if *metric != 0 => return None,
            _ => {}
        }
    }
    if header.table != RouteHeader::RT_TABLE_MAIN || header.tos != 0 {
        return None;
    }
    let subnet = Ipv4Net::new(destination, header.destination_prefix_length).ok()?;
    let ours = out == Some(device)
        && gateway == Some(subnet.network())
        && header.protocol == RouteProtocol::Boot
        && header.scope == RouteScope::Universe
        && header.kind == RouteType::Unicast
        && header.flags.contains(RouteFlags::Onlink);
    Some((subnet, FoundRoute { ours }))
}

fn mac_from(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}
