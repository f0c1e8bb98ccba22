//! Which address to resolve on the uplink to reach a node.

use std::net::Ipv4Addr;

use netlink_packet_route::{
    RouteNetlinkMessage,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
};
use rtnetlink::RouteMessageBuilder;

use super::netlink::{Rtnl, RtnlError};

/// The next hop to each of `nodes` where a unicast route by `uplink` leads there: a
/// router, or the node itself. Without one the kernel path says what the
/// routing table says. Answers stand in the order of `nodes`.
///
/// Asked the way the tunnel device asks: bound to the uplink.
///
/// # Errors
/// The socket failed; what the kernel refused stands in its place.
pub async fn resolve(
    rtnl: &mut Rtnl,
    uplink: u32,
    nodes: &[Ipv4Addr],
) -> Result<Vec<Result<Option<Ipv4Addr>, RtnlError>>, RtnlError> {
    let question = |node: &Ipv4Addr| {
        let question = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(*node, 32)
            .output_interface(uplink)
            .build();
        RouteNetlinkMessage::GetRoute(strict(question))
    };
    let answers = rtnl.get_all(nodes.iter().map(question).collect()).await?;
    let hops = nodes
        .iter()
        .zip(answers)
        .map(|(node, answer)| match answer {
            Ok(Some(RouteNetlinkMessage::NewRoute(answer))) => {
                Ok(next_hop_of(&answer, uplink, *node))
            }
            Ok(_) => Ok(None),
            // No route, or one that prohibits: the kernel path answers as it should.
            Err(error) if is_no_route(error.errno()) => Ok(None),
            Err(error) => Err(error),
        });
    Ok(hops.collect())
}

/// Strict checking wants a question's header bare.
fn strict(mut question: RouteMessage) -> RouteMessage {
    question.header.table = 0;
    question.header.protocol = RouteProtocol::Unspec;
    question.header.scope = RouteScope::Universe;
    question.header.kind = RouteType::Unspec;
    question.attributes.retain(|attribute| {
        matches!(
            attribute,
            RouteAttribute::Destination(_) | RouteAttribute::Oif(_)
        )
    });
    question
}

fn is_no_route(errno: i32) -> bool {
    matches!(
        errno,
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL | libc::ENODEV
    )
}

/// Reads the kernel's answer.
fn next_hop_of(answer: &RouteMessage, uplink: u32, node: Ipv4Addr) -> Option<Ipv4Addr> {
    if answer.header.kind != RouteType::Unicast {
        return None;
    }
    let mut hop = node;
    let mut by_uplink = false;
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => hop = *gateway,
            // An IPv6 gateway for an IPv4 route: the kernel's business.
            RouteAttribute::Via(_) | RouteAttribute::Gateway(_) => return None,
            RouteAttribute::Oif(index) => by_uplink = *index == uplink,
            _ => {}
        }
    }
    by_uplink.then_some(hop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: RouteType, attributes: Vec<RouteAttribute>) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header.kind = kind;
        message.attributes = attributes;
        message
    }

    const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 9);
    const ROUTER: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 254);

    #[test]
    fn a_node_on_the_link_is_its_own_next_hop() {
        let answer = answer(RouteType::Unicast, vec![RouteAttribute::Oif(2)]);
        assert_eq!(next_hop_of(&answer, 2, NODE), Some(NODE));
    }

    #[test]
    fn a_router_is_taken_from_the_answer() {
        let gateway = RouteAttribute::Gateway(RouteAddress::Inet(ROUTER));
        let answer = answer(RouteType::Unicast, vec![gateway, RouteAttribute::Oif(2)]);
        assert_eq!(next_hop_of(&answer, 2, NODE), Some(ROUTER));
    }

    #[test]
    fn another_interface_or_another_kind_of_route_is_the_kernels() {
        let by_other = answer(RouteType::Unicast, vec![RouteAttribute::Oif(3)]);
        let local = answer(RouteType::Local, vec![RouteAttribute::Oif(2)]);
        let blackhole = answer(RouteType::BlackHole, vec![]);
        for answer in [by_other, local, blackhole] {
            assert_eq!(next_hop_of(&answer, 2, NODE), None);
        }
    }
}
