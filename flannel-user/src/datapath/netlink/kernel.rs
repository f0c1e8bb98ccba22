//! Between values and routing netlink messages: what the kernel has on the device, and the requests
//! that set or delete one entry. Each message stands once.

use std::{collections::BTreeSet, net::Ipv4Addr};

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkSerializable};
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
    entries::{Actual, Form, FoundFdb, FoundNeighbour, FoundRoute},
    next_hop_object::{NextHop, NextHopMessage, id_of, is_through_object},
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
    /// Next hop object of a base.
    NextHop(Ipv4Addr),
    /// Route of a subnet through its base.
    Route(Ipv4Net, Form),
}

impl std::fmt::Display for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fdb(mac, Some(node)) => write!(f, "FDB entry {mac} dst {node}"),
            Self::Fdb(mac, None) => write!(f, "FDB entry {mac}"),
            Self::Neighbour(base, Some(mac)) => write!(f, "neighbour {base} lladdr {mac}"),
            Self::Neighbour(base, None) => write!(f, "neighbour {base}"),
            Self::NextHop(base) => write!(f, "next hop object {} via {base}", id_of(*base)),
            Self::Route(subnet, _) => write!(f, "route {subnet} via {}", subnet.network()),
        }
    }
}

/// One request about one entry.
#[derive(Debug)]
pub(super) enum Message {
    Known(RouteNetlinkMessage),
    NextHop(NextHopMessage),
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        match self {
            Self::Known(message) => message.message_type(),
            Self::NextHop(message) => message.message_type(),
        }
    }

    fn buffer_len(&self) -> usize {
        match self {
            Self::Known(message) => NetlinkSerializable::buffer_len(message),
            Self::NextHop(message) => message.buffer_len(),
        }
    }

    fn serialize(&self, buffer: &mut [u8]) {
        match self {
            Self::Known(message) => message.serialize(buffer),
            Self::NextHop(message) => message.serialize(buffer),
        }
    }
}

impl Entry {
    /// The request that sets the entry on the device with index `device`.
    pub(super) fn set(self, device: u32) -> Request<Message> {
        let known = |message| (Message::Known(message), REPLACE);
        let (message, flags) = match self {
            Self::Fdb(..) | Self::Neighbour(..) => known(RouteNetlinkMessage::NewNeighbour(
                self.neighbour_message(device),
            )),
            // Never another one's.
            Self::NextHop(gateway) => (
                Message::NextHop(NextHopMessage::New(NextHop { gateway, device })),
                NLM_F_CREATE | NLM_F_EXCL,
            ),
            Self::Route(subnet, form) => known(RouteNetlinkMessage::NewRoute(route_message(
                subnet, form, device,
            ))),
        };
        Request { message, flags }
    }

    /// The request that deletes it.
    pub(super) fn delete(self, device: u32) -> Request<Message> {
        let message = match self {
            Self::Fdb(..) | Self::Neighbour(..) => Message::Known(
                RouteNetlinkMessage::DelNeighbour(self.neighbour_message(device)),
            ),
            Self::NextHop(gateway) => Message::NextHop(NextHopMessage::Delete(gateway)),
            Self::Route(subnet, form) => Message::Known(RouteNetlinkMessage::DelRoute(
                route_message(subnet, form, device),
            )),
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
            Self::NextHop(_) | Self::Route(..) => (None, None),
        };
        let destination =
            address.map(|ip| NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)));
        let lladdr = mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        message.attributes = destination.into_iter().chain(lladdr).collect();
        message
    }
}

fn route_message(subnet: Ipv4Net, form: Form, device: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: subnet.prefix_len(),
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    let base = subnet.network();
    message.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(base))];
    match form {
        Form::Plain => {
            message.header.flags = RouteFlags::Onlink;
            message.attributes.extend([
                RouteAttribute::Gateway(RouteAddress::Inet(base)),
                RouteAttribute::Oif(device),
            ]);
        }
        // The kernel refuses to be told both.
        Form::Object => message.attributes.push(RouteAttribute::NhId(id_of(base))),
    }
    message
}

/// What the kernel has: FDB, neighbours and next hop objects of the device, routes of the main
/// table.
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

    actual.next_hops = next_hops(rtnl, device).await?;
    let mut filter = RouteMessage::default();
    filter.header.address_family = AddressFamily::Inet;
    filter.header.table = RouteHeader::RT_TABLE_MAIN;
    let objects = actual.next_hops.as_ref();
    for object in rtnl.dump(RouteNetlinkMessage::GetRoute(filter)).await? {
        if let RouteNetlinkMessage::NewRoute(route) = object
            && let Some((subnet, found)) = found_route(&route, device, objects)
        {
            actual.routes.entry(subnet).or_default().push(found);
        }
    }
    Ok(actual)
}

/// Bases that have an object of ours on the device; `None` from a kernel that has no objects.
async fn next_hops(rtnl: &mut Rtnl, device: u32) -> Result<Option<BTreeSet<Ipv4Addr>>, RtnlError> {
    match rtnl.dump(NextHopMessage::List(device)).await {
        Ok(objects) => {
            let ours = objects.into_iter().filter_map(|object| match object {
                NextHopMessage::New(NextHop {
                    gateway,
                    device: index,
                }) if index == device => Some(gateway),
                _ => None,
            });
            Ok(Some(ours.collect()))
        }
        Err(RtnlError::Refused { .. }) => Ok(None),
        Err(error) => Err(error),
    }
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

/// `None` for routes of another key than ours: other tables, a TOS, a metric. `objects` are ours.
fn found_route(
    route: &RouteMessage,
    device: u32,
    objects: Option<&BTreeSet<Ipv4Addr>>,
) -> Option<(Ipv4Net, FoundRoute)> {
    let header = &route.header;
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut gateway = None;
    let mut out = None;
    let mut refers = false;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = *ip,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => gateway = Some(*ip),
            RouteAttribute::Oif(index) => out = Some(*index),
            RouteAttribute::NhId(_) => refers = true,
            RouteAttribute::Priority(metric) if *metric != 0 => return None,
            _ => {}
        }
    }
    if header.table != RouteHeader::RT_TABLE_MAIN || header.tos != 0 {
        return None;
    }
    let subnet = Ipv4Net::new(destination, header.destination_prefix_length).ok()?;
    let is_of_our_kind = header.protocol == RouteProtocol::Boot
        && header.scope == RouteScope::Universe
        && header.kind == RouteType::Unicast;
    let is_plain = !refers
        && out == Some(device)
        && gateway == Some(subnet.network())
        && header.flags.contains(RouteFlags::Onlink);
    let form = if is_plain {
        Some(Form::Plain)
    } else {
        let objects = objects.filter(|_| is_through_object(route));
        objects
            .is_some_and(|objects| objects.contains(&subnet.network()))
            .then_some(Form::Object)
    };
    let ours = form.filter(|_| is_of_our_kind);
    Some((subnet, FoundRoute { ours }))
}

fn mac_from(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}
