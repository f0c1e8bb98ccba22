//! `--ip-blackhole-route`: what no pod of this node takes ends here, instead of going back to the
//! router it came from.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType},
};

use crate::datapath::netlink::rtnl::{Request, Rtnl, RtnlError};

/// The last choice among routes to the same prefix. With flannel's metric 0 the route either
/// cannot be added, because the bridge of the pods has the same prefix, or it comes before the
/// bridge's and cuts off every pod of the node.
const LAST_CHOICE: u32 = u32::MAX;

/// Adds a blackhole route for `subnet` unless there is one, whoever made it. Returns true if it
/// was added.
///
/// # Errors
/// The kernel's refusal, or the socket's fault.
pub async fn ensure(rtnl: &mut Rtnl, subnet: Ipv4Net) -> Result<bool, RtnlError> {
    let mut question = RouteMessage::default();
    question.header.address_family = AddressFamily::Inet;
    question.header.kind = RouteType::BlackHole;
    let routes = rtnl.dump(RouteNetlinkMessage::GetRoute(question)).await?;
    if routes.iter().any(|route| is_there(route, subnet)) {
        return Ok(false);
    }
    let added = rtnl
        .change(Request {
            message: RouteNetlinkMessage::NewRoute(route(subnet)),
            flags: NLM_F_CREATE | NLM_F_EXCL,
        })
        .await;
    match added {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == libc::EEXIST => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_there(route: &RouteNetlinkMessage, subnet: Ipv4Net) -> bool {
    let RouteNetlinkMessage::NewRoute(route) = route else {
        return false;
    };
    let to = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        });
    route.header.kind == RouteType::BlackHole
        && route.header.destination_prefix_length == subnet.prefix_len()
        && to.unwrap_or(Ipv4Addr::UNSPECIFIED) == subnet.network()
}

fn route(subnet: Ipv4Net) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.destination_prefix_length = subnet.prefix_len();
    route.header.table = RouteHeader::RT_TABLE_MAIN;
    route.header.kind = RouteType::BlackHole;
    // What `ip route add` and flannel say of themselves.
    route.header.protocol = RouteProtocol::Boot;
    route.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(subnet.network())),
        RouteAttribute::Priority(LAST_CHOICE),
    ];
    route
}
