//! Next hop objects: a gateway and a device under an id, to which a route refers (Linux 5.3).
//!
//! The id is the gateway's address read as a number, so it needs no bookkeeping: a peer has the
//! same one after every start and on every node. Ids that the kernel or routing daemons count up
//! from 1 never come that far; should somebody hold the id nevertheless, that peer's route is
//! made plain. `netlink-packet-route` does not know these messages.

use std::net::Ipv4Addr;

use netlink_packet_core::{
    DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteFlags, RouteMessage};

/// Says in `ip nexthop` who made an object. Nobody has registered it, and iproute2 has no name
/// for it.
const PROTOCOL: u8 = 241;

/// Length of an object's fixed part (`struct nhmsg`).
pub(in crate::datapath) const HEADER: usize = 8;
/// Length and kind.
const ATTRIBUTE_HEADER: usize = 4;
pub(in crate::datapath) const RTM_NEWNEXTHOP: u16 = 104;
pub(in crate::datapath) const RTM_DELNEXTHOP: u16 = 105;
const RTM_GETNEXTHOP: u16 = 106;
const NHA_ID: u16 = 1;
pub(in crate::datapath) const NHA_OIF: u16 = 5;
const NHA_GATEWAY: u16 = 6;
const RTNH_F_ONLINK: u32 = 4;

/// A request, or an object in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NextHopMessage {
    /// Make this object; in an answer, there is this one.
    New(NextHop),
    /// In an answer, there is one that is not as we make them.
    Foreign,
    /// Delete the object of this gateway.
    Delete(Ipv4Addr),
    /// List the objects of this device.
    List(u32),
}

/// An object as we make them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NextHop {
    pub(super) gateway: Ipv4Addr,
    pub(super) device: u32,
}

/// The id of the object of a gateway.
pub(super) fn id_of(gateway: Ipv4Addr) -> u32 {
    u32::from(gateway)
}

/// Does the route refer to the next hop object that is ours by its id?
///
/// Unlike gateway and device, which the kernel leaves out under `net.ipv4.nexthop_compat_mode=0`,
/// this is always to be seen.
pub(super) fn is_through_object(route: &RouteMessage) -> bool {
    let id = object_of(route);
    id.is_some() && id == base_of(route).map(id_of)
}

/// Is this the route to a peer, in either form: through the base of its own subnet?
#[must_use]
pub fn is_of_peer(route: &RouteMessage) -> bool {
    let base = base_of(route);
    let is_gateway = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Gateway(RouteAddress::Inet(gateway)) => Some(*gateway) == base,
        _ => false,
    };
    let is_plain = route.header.flags.contains(RouteFlags::Onlink)
        && object_of(route).is_none()
        && route.attributes.iter().any(is_gateway);
    is_plain || is_through_object(route)
}

fn object_of(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::NhId(id) => Some(*id),
            _ => None,
        })
}

fn base_of(route: &RouteMessage) -> Option<Ipv4Addr> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
            _ => None,
        })
}

impl NetlinkSerializable for NextHopMessage {
    fn message_type(&self) -> u16 {
        match self {
            Self::New(_) | Self::Foreign => RTM_NEWNEXTHOP,
            Self::Delete(_) => RTM_DELNEXTHOP,
            Self::List(_) => RTM_GETNEXTHOP,
        }
    }

    fn buffer_len(&self) -> usize {
        HEADER + self.attributes().count() * (ATTRIBUTE_HEADER + size_of::<u32>())
    }

    fn serialize(&self, buffer: &mut [u8]) {
        let (header, mut rest) = buffer.split_at_mut(HEADER);
        header.fill(0);
        if let Self::New(_) = self {
            header[0] = libc::AF_INET as u8;
            header[2] = PROTOCOL;
            header[4..].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
        }
        for (kind, value) in self.attributes() {
            let (attribute, behind) = rest.split_at_mut(ATTRIBUTE_HEADER + value.len());
            attribute[..2].copy_from_slice(&8_u16.to_ne_bytes());
            attribute[2..4].copy_from_slice(&kind.to_ne_bytes());
            attribute[4..].copy_from_slice(&value);
            rest = behind;
        }
    }
}

impl NextHopMessage {
    fn attributes(&self) -> impl Iterator<Item = (u16, [u8; 4])> + use<> {
        let id = |gateway| (NHA_ID, id_of(gateway).to_ne_bytes());
        let device = |index: u32| (NHA_OIF, index.to_ne_bytes());
        let attributes = match *self {
            Self::New(NextHop {
                gateway,
                device: index,
            }) => [
                Some(id(gateway)),
                Some(device(index)),
                Some((NHA_GATEWAY, gateway.octets())),
            ],
            Self::Foreign => [None; 3],
            Self::Delete(gateway) => [Some(id(gateway)), None, None],
            Self::List(index) => [Some(device(index)), None, None],
        };
        attributes.into_iter().flatten()
    }
}

impl NetlinkDeserializable for NextHopMessage {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        if header.message_type != RTM_NEWNEXTHOP {
            return Err("no next hop object".into());
        }
        let (head, attributes) = payload
            .split_at_checked(HEADER)
            .ok_or("the header of a next hop object is cut")?;
        let flags = u32::from_ne_bytes([head[4], head[5], head[6], head[7]]);
        let is_of_our_kind = i32::from(head[0]) == libc::AF_INET
            && head[2] == PROTOCOL
            && flags & RTNH_F_ONLINK != 0;
        let (mut id, mut device, mut gateway) = (None, None, None);
        // Whatever else an object has (group, encapsulation, …) makes it something else.
        let mut is_plain = true;
        for attribute in NlasIterator::new(attributes) {
            let attribute = attribute?;
            let value = <[u8; 4]>::try_from(attribute.value()).ok();
            match attribute.kind() {
                NHA_ID => id = value.map(u32::from_ne_bytes),
                NHA_OIF => device = value.map(u32::from_ne_bytes),
                NHA_GATEWAY => gateway = value.map(Ipv4Addr::from),
                _ => is_plain = false,
            }
        }
        Ok(match (gateway, device) {
            (Some(gateway), Some(device))
                if is_of_our_kind && is_plain && id == Some(id_of(gateway)) =>
            {
                Self::New(NextHop { gateway, device })
            }
            _ => Self::Foreign,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: NextHop = NextHop {
        gateway: Ipv4Addr::new(10, 244, 1, 0),
        device: 7,
    };

    fn bytes(message: NextHopMessage) -> Vec<u8> {
        let mut bytes = vec![0xff; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn read(payload: &[u8]) -> Result<NextHopMessage, DecodeError> {
        let mut header = NetlinkHeader::default();
        header.message_type = RTM_NEWNEXTHOP;
        NextHopMessage::deserialize(&header, payload)
    }

    #[test]
    fn an_object_reads_as_it_was_written() {
        let written = bytes(NextHopMessage::New(OURS));
        assert_eq!(read(&written).expect("good"), NextHopMessage::New(OURS));
        for cut in 0..written.len() {
            assert!(!matches!(read(&written[..cut]), Ok(NextHopMessage::New(_))));
        }
    }

    #[test]
    fn what_differs_in_anything_is_foreign() {
        let written = bytes(NextHopMessage::New(OURS));
        // Family, protocol, onlink, id, gateway.
        for place in [0, 2, 4, HEADER + 4, written.len() - 1] {
            let mut other = written.clone();
            other[place] ^= 0xff;
            let message = read(&other).expect("readable");
            assert_eq!(message, NextHopMessage::Foreign, "byte {place}");
        }
        let group = [&written[..], &[4, 0, 2, 0]].concat();
        assert_eq!(read(&group).expect("readable"), NextHopMessage::Foreign);
    }

    #[test]
    fn requests_name_what_they_need_and_no_more() {
        let id = [8, 0, 1, 0, 0, 1, 244, 10];
        let device = [8, 0, 5, 0, 7, 0, 0, 0];
        assert_eq!(
            bytes(NextHopMessage::Delete(OURS.gateway)),
            [&[0; HEADER][..], &id].concat()
        );
        assert_eq!(
            bytes(NextHopMessage::List(OURS.device)),
            [&[0; HEADER][..], &device].concat()
        );
        assert_eq!(
            bytes(NextHopMessage::New(OURS)),
            [
                &[2, 0, 241, 0, 4, 0, 0, 0][..],
                &id,
                &device,
                &[8, 0, 6, 0, 10, 244, 1, 0]
            ]
            .concat()
        );
    }

    #[test]
    fn a_route_of_ours_is_known_by_its_id_or_its_gateway() {
        let mut route = RouteMessage::default();
        let base = RouteAddress::Inet(OURS.gateway);
        route.attributes = vec![RouteAttribute::Destination(base)];
        assert!(!is_through_object(&route));
        route
            .attributes
            .push(RouteAttribute::NhId(id_of(OURS.gateway)));
        assert!(is_through_object(&route));
        assert!(is_of_peer(&route));
        route.attributes[1] = RouteAttribute::NhId(1);
        assert!(!is_through_object(&route) && !is_of_peer(&route));

        // Plain, and then through another gateway.
        route.header.flags = RouteFlags::Onlink;
        for (gateway, expected) in [(OURS.gateway, true), (Ipv4Addr::new(10, 244, 2, 0), false)] {
            route.attributes[1] = RouteAttribute::Gateway(RouteAddress::Inet(gateway));
            assert_eq!(is_of_peer(&route), expected);
            assert!(!is_through_object(&route));
        }
    }
}
