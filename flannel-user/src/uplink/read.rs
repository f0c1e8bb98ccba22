//! Reading links, addresses and routes of this host.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage},
};

use super::{Address, DefaultRoute, Host, Link, Reached, UplinkChoice, UplinkError};
use crate::mac::MacAddr;

fn failed(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> UplinkError {
    move |source| UplinkError::Netlink {
        what,
        source: Box::new(source),
    }
}

/// Every link with its IPv4 addresses; no routes.
pub(super) async fn links(handle: &rtnetlink::Handle) -> Result<Host, UplinkError> {
    let links: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("links"))?;
    let addresses: Vec<_> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(failed("addresses"))?;
    let mut host = Host {
        links: links.iter().map(parse_link).collect(),
        ..Host::default()
    };
    for message in &addresses {
        if let Some(address) = parse_address(message)
            && let Some(link) = host.links.get_mut(&message.header.index)
        {
            link.addresses.push(address);
        }
    }
    Ok(host)
}

/// Adds what `choice` needs to know of routes: on a node with many peers they are many.
pub(super) async fn routes(
    handle: &rtnetlink::Handle,
    host: &mut Host,
    choice: &UplinkChoice,
) -> Result<(), UplinkError> {
    let mut all_routes = RouteMessage::default();
    all_routes.header.address_family = AddressFamily::Inet;
    let routes: Vec<_> = handle
        .route()
        .get(all_routes)
        .execute()
        .try_collect()
        .await
        .map_err(failed("routes"))?;
    host.defaults = defaults_of(&routes);
    if let Some(value) = &choice.iface_can_reach
        && let Ok(target) = value.parse()
    {
        let answer = route_to(handle, target).await;
        host.reach.insert(target, answer);
    }
    Ok(())
}

fn parse_link(message: &LinkMessage) -> (u32, Link) {
    let mut link = Link {
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => {
                link.mac = MacAddr(bytes.as_slice().try_into().unwrap_or_default());
            }
            _ => {}
        }
    }
    (message.header.index, link)
}

pub(super) fn parse_address(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut peer = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(ip)) => local = Some(*ip),
            AddressAttribute::Address(IpAddr::V4(ip)) => peer = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(Address {
        ip: local.or(peer)?,
        permanent: flags.contains(AddressFlags::Permanent),
        // The bit says "temporary" for IPv6 and "secondary" for IPv4; flannel reads it so as well.
        temporary: flags.contains(AddressFlags::Secondary),
        deprecated: flags.contains(AddressFlags::Deprecated),
    })
}

/// The default routes of the main table, least metric first.
pub(super) fn defaults_of(routes: &[RouteMessage]) -> Vec<DefaultRoute> {
    let mut defaults: Vec<(u32, DefaultRoute)> = routes
        .iter()
        .filter(|route| {
            route.header.table == RouteHeader::RT_TABLE_MAIN
                && route.header.destination_prefix_length == 0
        })
        .map(|route| {
            let mut metric = 0;
            let mut kind = DefaultRoute::WithoutInterface;
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Priority(value) => metric = *value,
                    RouteAttribute::Oif(index) => kind = DefaultRoute::Through(*index),
                    RouteAttribute::MultiPath(_) => kind = DefaultRoute::Multipath,
                    _ => {}
                }
            }
            (metric, kind)
        })
        .collect();
    defaults.sort_by_key(|(metric, _)| *metric);
    defaults.into_iter().map(|(_, route)| route).collect()
}

/// Asks the kernel how it would send to `target`.
async fn route_to(handle: &rtnetlink::Handle, target: Ipv4Addr) -> Result<Reached, String> {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    question.header.destination_prefix_length = 32;
    question
        .attributes
        .push(RouteAttribute::Destination(RouteAddress::Inet(target)));
    let answer = handle.route().get(question).execute().try_next().await;
    let route = match answer {
        Ok(Some(route)) => route,
        Ok(None) => return Err("the kernel gave no answer".into()),
        Err(rtnetlink::Error::NetlinkError(refused)) => return Err(refused.to_io().to_string()),
        Err(error) => return Err(error.to_string()),
    };
    let mut index = None;
    let mut source = None;
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Oif(out) => index = Some(*out),
            RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => source = Some(*ip),
            _ => {}
        }
    }
    let index = index.ok_or("the route has no interface")?;
    Ok(Reached { index, source })
}
