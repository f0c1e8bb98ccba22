//! What the kernel tells of rule sets, IPsec, routes and neighbours, reduced to: may a verdict
//! depend on it?

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    net::Ipv4Addr,
    os::{fd::AsFd as _, unix::net::UnixStream},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage},
    route::RouteAttribute,
};
use netlink_sys::{
    Socket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::warn;

use crate::datapath::netlink::{is_of_peer, socket::NetlinkFd};

const GROUP_NFTABLES: u32 = 7;
const GROUP_XFRM_SA: u32 = 3;
const GROUP_XFRM_POLICY: u32 = 4;
const GROUP_NEIGHBOURS: u32 = 3;
const GROUP_IPV4_ROUTES: u32 = 7;
const GROUP_IPV4_RULES: u32 = 8;
/// Table `local`: addresses, not ways.
const TABLE_LOCAL: u8 = 255;
/// Bytes that events may take while they wait: thousands of peers' entries go and come back within
/// milliseconds. A socket that overflows has lost what happened, so everything would count as changed.
const RECEIVE_BUFFER: usize = 16 << 20;
/// A bound for hosts on networks with very many neighbours.
const MOST_NEIGHBOURS: usize = 65_536;
/// The pause after a wait that failed.
const AFTER_FAILURE: Duration = Duration::from_secs(1);

/// Interface and address.
type Neighbour = (u32, Ipv4Addr);

/// Listens in the network namespace of the thread that opened it.
pub(super) struct Events {
    stopped: UnixStream,
    nftables: NetlinkFd,
    xfrm: Option<NetlinkFd>,
    routes: NetlinkFd,
    /// Index of the tunnel device.
    tunnel: Arc<AtomicU32>,
    /// Link addresses: states of neighbours come and go without the way changing.
    neighbours: BTreeMap<Neighbour, Vec<u8>>,
    buffer: Vec<u8>,
}

/// What may have changed.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Changed {
    /// A rule set or an IPsec policy.
    pub(super) rules: bool,
    /// A route, a routing rule or a neighbour's link address.
    pub(super) ways: bool,
}

impl Events {
    /// Starts listening. `stopped` ends the wait once its other end is closed.
    ///
    /// # Errors
    /// A socket could not be opened.
    pub(super) fn listen(stopped: UnixStream, tunnel: Arc<AtomicU32>) -> io::Result<Self> {
        Ok(Self {
            stopped,
            nftables: listen(NETLINK_NETFILTER, &[GROUP_NFTABLES])?,
            // A kernel without IPsec has no policies to watch.
            xfrm: listen(NETLINK_XFRM, &[GROUP_XFRM_SA, GROUP_XFRM_POLICY]).ok(),
            routes: listen(
                NETLINK_ROUTE,
                &[GROUP_NEIGHBOURS, GROUP_IPV4_ROUTES, GROUP_IPV4_RULES],
            )?,
            tunnel,
            neighbours: BTreeMap::new(),
            buffer: vec![0; 64 << 10],
        })
    }

    /// Waits for events; `None` when told to stop. A rule set's events are told before all of them
    /// are read: one is enough, and what comes after it is told by the next call.
    pub(super) fn wait(&mut self, timeout: Duration) -> Option<Changed> {
        // Rounded up, so that what is waited for is due afterwards.
        let timeout = u16::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut descriptors = vec![
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.nftables.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.routes.as_fd(), PollFlags::POLLIN),
        ];
        if let Some(xfrm) = &self.xfrm {
            descriptors.push(PollFd::new(xfrm.as_fd(), PollFlags::POLLIN));
        }
        if let Err(error) = poll(&mut descriptors, PollTimeout::from(timeout)) {
            if error != nix::errno::Errno::EINTR {
                warn!(%error, "cannot wait for changes: verdicts end by time alone");
                thread::sleep(AFTER_FAILURE);
            }
            return Some(Changed::default());
        }
        let is_ready: Vec<bool> = descriptors
            .iter()
            .map(|one| one.any().unwrap_or(false))
            .collect();
        drop(descriptors);
        if is_ready[0] && self.stopped.read(&mut [0]).map_or(true, |read| read == 0) {
            return None;
        }
        Some(Changed {
            rules: is_ready[1] || is_ready.get(3) == Some(&true),
            ways: is_ready[2] && self.read_ways(),
        })
    }

    /// Empties the sockets whose events need no reading.
    pub(super) fn discard_rules(&mut self) {
        for socket in [Some(&self.nftables), self.xfrm.as_ref()]
            .into_iter()
            .flatten()
        {
            loop {
                match socket.0.recv(&mut &mut self.buffer[..], 0) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // Lost events were events as well.
                    Ok(_) | Err(_) => {}
                }
            }
        }
    }

    /// Reads all that is there; `true` if a packet's way may have changed.
    fn read_ways(&mut self) -> bool {
        let tunnel = self.tunnel.load(Ordering::Relaxed);
        let mut concerns = false;
        loop {
            match self.routes.0.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => {
                    concerns |= is_way(&mut self.neighbours, tunnel, &self.buffer[..length]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return concerns,
                // Events were lost: anything may have changed.
                Err(_) => concerns = true,
            }
        }
    }
}

fn listen(protocol: isize, groups: &[u32]) -> io::Result<NetlinkFd> {
    NetlinkFd::listening(Socket::new(protocol)?, RECEIVE_BUFFER, groups)
}

/// Can one of these messages change a packet's way?
///
/// A route to a peer that comes or goes is none, nor is any to `tunnel` that goes: what a peer means
/// for verdicts follows from the tables of peers, and of routes that the agent puts back, whoever
/// asked the stack because of the first would be lost for want of its own.
fn is_way(neighbours: &mut BTreeMap<Neighbour, Vec<u8>>, tunnel: u32, mut datagram: &[u8]) -> bool {
    let mut concerns = false;
    while !datagram.is_empty() {
        let Ok(header) = NetlinkBuffer::new_checked(datagram) else {
            return true;
        };
        let (kind, length) = (header.message_type(), header.length() as usize);
        let rest = datagram.get((length.max(16) + 3) & !3..);
        // Thousands at once when the tunnel goes down: not worth reading.
        if kind == libc::RTM_DELNEIGH {
            datagram = rest.unwrap_or_default();
            continue;
        }
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
            return true;
        };
        concerns |= match message.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) if is_of_peer(&route) => false,
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route))
                if route.attributes.contains(&RouteAttribute::Oif(tunnel)) =>
            {
                false
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
            ) => {
                route.header.address_family == AddressFamily::Inet
                    && route.header.table != TABLE_LOCAL
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRule(_) | RouteNetlinkMessage::DelRule(_),
            ) => true,
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(neighbour)) => {
                has_moved(neighbours, &neighbour)
            }
            _ => false,
        };
        datagram = rest.unwrap_or_default();
    }
    concerns
}

/// Has a neighbour another link address than before? New ones concern nobody's verdict.
fn has_moved(neighbours: &mut BTreeMap<Neighbour, Vec<u8>>, message: &NeighbourMessage) -> bool {
    // Entries of a bridge or tunnel device are no neighbours.
    if message.header.family != AddressFamily::Inet {
        return false;
    }
    let mut address = None;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(found)) => {
                address = Some(*found);
            }
            NeighbourAttribute::LinkLayerAddress(found) if !found.is_empty() => link = Some(found),
            _ => {}
        }
    }
    let (Some(address), Some(link)) = (address, link) else {
        return false;
    };
    if neighbours.len() > MOST_NEIGHBOURS {
        neighbours.clear();
    }
    neighbours
        .insert((message.header.ifindex, address), link.clone())
        .is_some_and(|before| before != *link)
}

#[cfg(test)]
mod tests {
    use netlink_packet_route::route::{RouteAddress, RouteFlags, RouteMessage};

    use super::*;

    fn neighbour(interface: u32, address: [u8; 4], link: &[u8]) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = interface;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address.into())),
            NeighbourAttribute::LinkLayerAddress(link.to_vec()),
        ];
        message
    }

    #[test]
    fn a_neighbour_moves_when_its_link_address_changes() {
        let mut known = BTreeMap::new();
        let mut moved = |interface, last, link: &[u8]| {
            has_moved(&mut known, &neighbour(interface, [10, 0, 0, last], link))
        };
        assert!(!moved(1, 1, &[2, 0]), "new");
        assert!(!moved(1, 1, &[2, 0]), "as before");
        assert!(!moved(2, 1, &[2, 1]), "of another interface");
        assert!(!moved(1, 1, &[]), "being asked for");
        assert!(moved(1, 1, &[2, 1]));
    }

    #[test]
    fn a_route_is_a_way_unless_it_is_a_peers() {
        const TUNNEL: u32 = 7;
        let base = RouteAddress::Inet([10, 244, 1, 0].into());
        let route = |gateway: [u8; 4], out| {
            let mut route = RouteMessage::default();
            route.header.address_family = AddressFamily::Inet;
            route.header.table = 254;
            route.header.flags = RouteFlags::Onlink;
            route.attributes = vec![
                RouteAttribute::Destination(base.clone()),
                RouteAttribute::Gateway(RouteAddress::Inet(gateway.into())),
                RouteAttribute::Oif(out),
            ];
            route
        };
        let is_way = |message| {
            let mut message = NetlinkMessage::from(message);
            message.finalize();
            let mut bytes = vec![0; message.buffer_len()];
            message.serialize(&mut bytes);
            is_way(&mut BTreeMap::new(), TUNNEL, &bytes)
        };
        let (peer, other) = ([10, 244, 1, 0], [10, 244, 2, 0]);
        // A device made anew has another index.
        for out in [TUNNEL, TUNNEL + 1] {
            assert!(!is_way(RouteNetlinkMessage::NewRoute(route(peer, out))));
            assert!(!is_way(RouteNetlinkMessage::DelRoute(route(peer, out))));
            assert!(is_way(RouteNetlinkMessage::NewRoute(route(other, out))));
        }
        assert!(!is_way(RouteNetlinkMessage::DelRoute(route(other, TUNNEL))));
        assert!(is_way(RouteNetlinkMessage::DelRoute(route(other, 2))));
    }
}
