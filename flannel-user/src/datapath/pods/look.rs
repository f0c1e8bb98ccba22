//! What the kernel says of links, addresses and routes, cut down to what pods need.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkExtentMask, LinkInfo, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage},
};

use crate::{
    datapath::netlink::{
        local_address,
        rtnl::{Rtnl, RtnlError},
    },
    mac::MacAddr,
};

/// A link as far as pods are concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: MacAddr,
    pub(super) mtu: u32,
    pub(super) bridge: bool,
    pub(super) veth: bool,
    /// Index of the bridge it is a port of.
    pub(super) master: Option<u32>,
    /// Index of the veth's other end, in the namespace below.
    pub(super) peer: Option<u32>,
    /// Id of the other end's namespace; `None` if that is our own.
    pub(super) peer_namespace: Option<i32>,
}

/// The links of this namespace or of the one with the id.
pub(super) async fn links(rtnl: &mut Rtnl, namespace: Option<i32>) -> Result<Vec<Link>, RtnlError> {
    let mut request = LinkMessage::default();
    // Counters make up most of a link message and nobody here reads them.
    request
        .attributes
        .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    request
        .attributes
        .extend(namespace.map(LinkAttribute::IfNetnsId));
    let objects = rtnl.dump(RouteNetlinkMessage::GetLink(request)).await?;
    Ok(objects
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewLink(link) => Some(Link::parse(link)),
            _ => None,
        })
        .collect())
}

impl Link {
    fn parse(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            ..Self::default()
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Address(bytes) => {
                    link.mac = MacAddr(bytes.try_into().unwrap_or_default());
                }
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::Controller(index) => link.master = Some(index),
                LinkAttribute::Link(index) => link.peer = Some(index),
                LinkAttribute::LinkNetNsId(id) => {
                    link.peer_namespace = Some(id).filter(|id| *id >= 0)
                }
                LinkAttribute::LinkInfo(infos) => {
                    link.bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                    link.veth = infos.contains(&LinkInfo::Kind(InfoKind::Veth));
                }
                _ => {}
            }
        }
        link
    }
}

/// The IPv4 addresses of this namespace or of the one with the id.
pub(super) async fn addresses(
    rtnl: &mut Rtnl,
    namespace: Option<i32>,
) -> Result<Vec<(u32, Ipv4Addr)>, RtnlError> {
    let mut request = AddressMessage::default();
    request.header.family = AddressFamily::Inet;
    request
        .attributes
        .extend(namespace.map(AddressAttribute::TargetNetNsId));
    let objects = rtnl.dump(RouteNetlinkMessage::GetAddress(request)).await?;
    Ok(objects
        .into_iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewAddress(found) => {
                Some((found.header.index, local_address(&found)?))
            }
            _ => None,
        })
        .collect())
}

/// Gateway-less routes of the main table inside `pod_subnet` or equal to it.
pub(super) async fn connected_routes(
    rtnl: &mut Rtnl,
    pod_subnet: Ipv4Net,
) -> Result<Vec<(Ipv4Net, u32)>, RtnlError> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    request.header.table = RouteHeader::RT_TABLE_MAIN;
    let objects = rtnl.dump(RouteNetlinkMessage::GetRoute(request)).await?;
    Ok(objects
        .into_iter()
        .filter_map(|object| {
            let RouteNetlinkMessage::NewRoute(route) = object else {
                return None;
            };
            if route.header.table != RouteHeader::RT_TABLE_MAIN {
                return None;
            }
            let mut destination = Ipv4Addr::UNSPECIFIED;
            let mut out = None;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = *ip,
                    RouteAttribute::Oif(index) => out = Some(*index),
                    RouteAttribute::Gateway(_) | RouteAttribute::Via(_) => return None,
                    _ => {}
                }
            }
            let net = Ipv4Net::new(destination, route.header.destination_prefix_length).ok()?;
            pod_subnet.contains(&net).then_some((net, out?))
        })
        .collect())
}
