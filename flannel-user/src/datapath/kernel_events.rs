//! Kernel link, address, route, next hop object, neighbour and FDB changes as wake-ups.
//!
//! The listener hears its own network namespace and every namespace that has an id in it, which
//! the other end of each pod's veth has: a pod that gets its address late wakes us too.
//! Events say where to look, never what is true; after an [`KernelEvent::Overrun`] anything may
//! have changed.

use std::{io, mem, os::fd::AsRawFd, time::Duration};

use netlink_packet_core::NlasIterator;
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};
use tokio::{io::unix::AsyncFd, sync::mpsc, time::Instant};
use tracing::{debug, warn};

use super::netlink::{next_hop_object, socket::NetlinkFd};

/// Receive buffer in bytes: several thousand events while nobody reads.
const RECEIVE_BUFFER: usize = 8 << 20;

/// Events that may wait for the consumer. When more do, an overrun is reported instead.
const QUEUE: usize = 4096;

/// Longest time [`next_batch`] lets more events arrive.
const LONGEST_BATCH: Duration = Duration::from_millis(20);

const GROUP_LINKS: u32 = 1;
/// FDB included.
const GROUP_NEIGHBOURS: u32 = 3;
const GROUP_TC: u32 = 4;
const GROUP_IPV4_ADDRESSES: u32 = 5;
const GROUP_IPV4_ROUTES: u32 = 7;
/// RTNLGRP_NEXTHOP, which kernels before Linux 5.3 do not have.
const GROUP_NEXT_HOPS: u32 = 32;
const NETLINK_LISTEN_ALL_NSID: libc::c_int = 8;
const NLMSG_HEADER: usize = 16;
/// Of the port in a message's header.
const PORT_OFFSET: u32 = 12;
const RTA_OIF: u16 = 4;
const ROUTE_HEADER: usize = 12;

/// Where an event comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Id of the other network namespace; `None` is our own.
    pub namespace: Option<i32>,
    /// Netlink port of the socket whose request caused it, 0 if the kernel does not say.
    /// Compare with [`NetlinkDatapath::port`](super::netlink::NetlinkDatapath::port) to
    /// skip one's own noise.
    pub port: u32,
}

/// Something changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelEvent {
    /// A link appeared, changed or went.
    Links {
        /// Where.
        origin: Origin,
        /// Interface index there.
        index: u32,
        /// It went.
        removed: bool,
    },
    /// An IPv4 address appeared or went.
    Addresses {
        /// Where.
        origin: Origin,
        /// Interface index there.
        index: u32,
        /// It went.
        removed: bool,
    },
    /// An IPv4 route appeared, changed or went.
    Routes {
        /// Where.
        origin: Origin,
        /// Interface index of the next hop, if there is exactly one.
        index: Option<u32>,
        /// Routing table; 254 is main. Tables above 255 show as 252 (compat).
        table: u8,
        /// It went.
        removed: bool,
    },
    /// A next hop object appeared, changed or went; routes through it go with it and are not told.
    NextHops {
        /// Where.
        origin: Origin,
        /// Interface index of the next hop, if it has one.
        index: Option<u32>,
    },
    /// A neighbour or FDB entry appeared, changed or went.
    Neighbours {
        /// Where.
        origin: Origin,
        /// Interface index there.
        index: u32,
        /// An FDB entry.
        fdb: bool,
        /// It went.
        removed: bool,
    },
    /// A queueing discipline or a traffic filter appeared, changed or went.
    Queueing {
        /// Where.
        origin: Origin,
        /// Interface index there.
        index: u32,
    },
    /// Events were lost: anything may have changed.
    Overrun,
}

impl KernelEvent {
    /// Where it comes from; `None` for an overrun, which comes from everywhere.
    #[must_use]
    pub fn origin(&self) -> Option<Origin> {
        match self {
            Self::Links { origin, .. }
            | Self::Addresses { origin, .. }
            | Self::Routes { origin, .. }
            | Self::NextHops { origin, .. }
            | Self::Neighbours { origin, .. }
            | Self::Queueing { origin, .. } => Some(*origin),
            Self::Overrun => None,
        }
    }
}

/// Starts listening in the network namespace of the calling thread. What the socket of port
/// `except` causes is not heard at all: ten thousand peers are thirty thousand events. Other
/// events that `relevant` refuses are dropped before they wake anybody; an overrun is never asked
/// about. Listening ends when the receiver is dropped.
///
/// # Errors
/// The socket's. Must be called within a tokio runtime.
pub fn listen(
    except: Option<u32>,
    relevant: impl Fn(&KernelEvent) -> bool + Send + Sync + 'static,
) -> io::Result<mpsc::Receiver<KernelEvent>> {
    let socket = Socket::new(NETLINK_ROUTE)?;
    if let Err(error) = socket.set_listen_all_namespaces(true) {
        // Needs CAP_NET_BROADCAST. Without it a change inside a pod is seen by the slow check.
        warn!(%error, "changes inside pods are noticed late: CAP_NET_BROADCAST is missing");
    }
    if let Some(port) = except {
        deafen(&socket, port)?;
    }
    let groups = [
        GROUP_LINKS,
        GROUP_NEIGHBOURS,
        GROUP_TC,
        GROUP_IPV4_ADDRESSES,
        GROUP_IPV4_ROUTES,
    ];
    let socket = NetlinkFd::listening(socket, RECEIVE_BUFFER, &groups)?;
    if let Err(error) = socket.0.add_membership(GROUP_NEXT_HOPS) {
        debug!(%error, "the kernel has no next hop objects");
    }
    spawn(socket, relevant)
}

/// The same for links and addresses of this network namespace alone.
///
/// # Errors
/// As [`listen`].
pub fn listen_to_links(
    relevant: impl Fn(&KernelEvent) -> bool + Send + Sync + 'static,
) -> io::Result<mpsc::Receiver<KernelEvent>> {
    let groups = [GROUP_LINKS, GROUP_IPV4_ADDRESSES];
    let socket = NetlinkFd::listening(Socket::new(NETLINK_ROUTE)?, RECEIVE_BUFFER, &groups)?;
    spawn(socket, relevant)
}

fn spawn(
    socket: NetlinkFd,
    relevant: impl Fn(&KernelEvent) -> bool + Send + Sync + 'static,
) -> io::Result<mpsc::Receiver<KernelEvent>> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(forward(socket.register()?, relevant, sender));
    Ok(receiver)
}

/// Has the kernel drop what the socket of `port` causes before it is queued here.
fn deafen(socket: &Socket, port: u32) -> io::Result<()> {
    let step = |code: u32, if_true: u8, if_false: u8, operand: u32| libc::sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k: operand,
    };
    // The port is in the message's header as this machine writes it; loads take network order.
    let port = u32::from_be_bytes(port.to_ne_bytes());
    let mut program = [
        step(
            libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
            0,
            0,
            PORT_OFFSET,
        ),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, port),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
    ];
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program behind `filter`, which lives longer than the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The next event and everything that follows within 20 ms, or sooner once the kernel is
/// quiet for `quiet`. `None` when the listener ended.
pub async fn next_batch(
    events: &mut mpsc::Receiver<KernelEvent>,
    quiet: Duration,
) -> Option<Vec<KernelEvent>> {
    let mut batch = vec![events.recv().await?];
    let end = Instant::now() + LONGEST_BATCH;
    while let Ok(Some(event)) =
        tokio::time::timeout_at(end.min(Instant::now() + quiet), events.recv()).await
    {
        batch.push(event);
    }
    Some(batch)
}

async fn forward(
    socket: AsyncFd<NetlinkFd>,
    relevant: impl Fn(&KernelEvent) -> bool + Send + Sync,
    sender: mpsc::Sender<KernelEvent>,
) {
    let mut datagram = vec![0; 64 << 10];
    loop {
        let ready = tokio::select! {
            ready = socket.readable() => ready,
            () = sender.closed() => return,
        };
        let received =
            ready.map(|mut guard| guard.try_io(|fd| receive(fd.get_ref(), &mut datagram)));
        match received {
            Err(error) => {
                warn!(%error, "kernel events end: the runtime is shutting down");
                return;
            }
            Ok(Err(_would_block)) => {}
            Ok(Ok(Ok((length, namespace)))) => {
                for event in events(&datagram[..length], namespace).filter(&relevant) {
                    if sender.try_send(event).is_err() {
                        // The consumer is behind: this event is lost, and it is told so.
                        if sender.send(KernelEvent::Overrun).await.is_err() {
                            return;
                        }
                    }
                }
            }
            Ok(Ok(Err(error))) => {
                if error.raw_os_error() != Some(libc::ENOBUFS) {
                    warn!(%error, "cannot read kernel events");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                if sender.send(KernelEvent::Overrun).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// One datagram, and the id of the namespace it comes from unless that is ours.
fn receive(socket: &NetlinkFd, datagram: &mut [u8]) -> io::Result<(usize, Option<i32>)> {
    let mut part = libc::iovec {
        iov_base: datagram.as_mut_ptr().cast(),
        iov_len: datagram.len(),
    };
    // u64 for the alignment of a control message header.
    let mut control = [0_u64; 8];
    // SAFETY: all-zero bytes are a valid msghdr: null pointers and zero lengths.
    let mut message: libc::msghdr = unsafe { mem::zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = mem::size_of_val(&control) as _;
    // SAFETY: every pointer in `message` is to a live buffer of the stated length.
    let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, 0) };
    let length = usize::try_from(length).map_err(|_| io::Error::last_os_error())?;

    let mut namespace = None;
    // SAFETY: `message` was filled by recvmsg and its control buffer is still alive.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    // SAFETY: FIRSTHDR and NXTHDR return null or a header inside the control buffer.
    while let Some(found) = unsafe { header.as_ref() } {
        if found.cmsg_level == libc::SOL_NETLINK && found.cmsg_type == NETLINK_LISTEN_ALL_NSID {
            // SAFETY: the kernel puts an int there; its alignment is not promised.
            namespace = Some(unsafe { libc::CMSG_DATA(header).cast::<i32>().read_unaligned() });
        }
        // SAFETY: as for CMSG_FIRSTHDR.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    Ok((length, namespace))
}

/// The events in one datagram. Reads fixed offsets only, because neighbour events of a busy node
/// are many and nearly all of them are refused.
fn events(mut datagram: &[u8], namespace: Option<i32>) -> impl Iterator<Item = KernelEvent> {
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(number(datagram, 0)?).ok()?;
            if length < NLMSG_HEADER || length > datagram.len() {
                return None;
            }
            let message = &datagram[..length];
            datagram = &datagram[((length + 3) & !3).min(datagram.len())..];
            if let Some(event) = event(message, namespace) {
                return Some(event);
            }
        }
    })
}

fn event(message: &[u8], namespace: Option<i32>) -> Option<KernelEvent> {
    let kind = u16::from_ne_bytes(message.get(4..6)?.try_into().ok()?);
    let origin = Origin {
        namespace,
        port: number(message, PORT_OFFSET as usize)?,
    };
    let body = &message[NLMSG_HEADER..];
    let family = i32::from(*body.first()?);
    Some(match kind {
        // The bridge repeats its ports' link changes under its own family.
        libc::RTM_NEWLINK | libc::RTM_DELLINK if family == libc::AF_UNSPEC => KernelEvent::Links {
            origin,
            index: number(body, 4)?,
            removed: kind == libc::RTM_DELLINK,
        },
        // A port that leaves its bridge is reported as a deletion of that family.
        libc::RTM_NEWLINK | libc::RTM_DELLINK => KernelEvent::Links {
            origin,
            index: number(body, 4)?,
            removed: false,
        },
        libc::RTM_NEWADDR | libc::RTM_DELADDR => KernelEvent::Addresses {
            origin,
            index: number(body, 4)?,
            removed: kind == libc::RTM_DELADDR,
        },
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => KernelEvent::Routes {
            origin,
            index: out_interface(body.get(ROUTE_HEADER..)?, RTA_OIF),
            table: *body.get(4)?,
            removed: kind == libc::RTM_DELROUTE,
        },
        next_hop_object::RTM_NEWNEXTHOP | next_hop_object::RTM_DELNEXTHOP => {
            KernelEvent::NextHops {
                origin,
                index: out_interface(
                    body.get(next_hop_object::HEADER..)?,
                    next_hop_object::NHA_OIF,
                ),
            }
        }
        libc::RTM_NEWQDISC | libc::RTM_DELQDISC | libc::RTM_NEWTFILTER | libc::RTM_DELTFILTER => {
            KernelEvent::Queueing {
                origin,
                index: number(body, 4)?,
            }
        }
        libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => KernelEvent::Neighbours {
            origin,
            index: number(body, 4)?,
            fdb: family == libc::AF_BRIDGE,
            removed: kind == libc::RTM_DELNEIGH,
        },
        _ => return None,
    })
}

fn number(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..offset + 4)?.try_into().ok()?;
    Some(u32::from_ne_bytes(bytes))
}

fn out_interface(attributes: &[u8], kind: u16) -> Option<u32> {
    NlasIterator::new(attributes)
        .flatten()
        .find(|attribute| attribute.kind() == kind)
        .and_then(|attribute| number(attribute.value(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((NLMSG_HEADER as u32 + body.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 6]);
        bytes.extend(77_u32.to_ne_bytes());
        bytes.extend(body);
        bytes
    }

    #[test]
    fn one_datagram_may_hold_several_events_and_strangers() {
        let link = [0, 0, 1, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let fdb = [7, 0, 0, 0, 6, 0, 0, 0, 0x80, 0, 2, 0];
        let route = [
            2, 24, 0, 0, 254, 3, 0, 1, 4, 0, 0, 0, 8, 0, 4, 0, 6, 0, 0, 0,
        ];
        let next_hop = [
            2, 0, 241, 0, 4, 0, 0, 0, 8, 0, 1, 0, 1, 2, 3, 4, 8, 0, 5, 0, 6, 0, 0, 0,
        ];
        let datagram = [
            message(libc::RTM_DELLINK, &link),
            message(libc::RTM_NEWRULE, &[2; 12]),
            message(libc::RTM_NEWNEIGH, &fdb),
            message(libc::RTM_DELROUTE, &route),
            message(next_hop_object::RTM_DELNEXTHOP, &next_hop),
        ]
        .concat();
        let origin = Origin {
            namespace: Some(3),
            port: 77,
        };
        let found: Vec<_> = events(&datagram, Some(3)).collect();
        assert_eq!(
            found,
            [
                KernelEvent::Links {
                    origin,
                    index: 9,
                    removed: true
                },
                KernelEvent::Neighbours {
                    origin,
                    index: 6,
                    fdb: true,
                    removed: false
                },
                KernelEvent::Routes {
                    origin,
                    index: Some(6),
                    table: 254,
                    removed: true
                },
                KernelEvent::NextHops {
                    origin,
                    index: Some(6)
                },
            ]
        );
        for cut in 0..datagram.len() {
            assert!(events(&datagram[..cut], None).count() <= 4);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_ends_when_it_is_quiet_and_after_20_ms_at_the_latest() {
        let (sender, mut receiver) = mpsc::channel(100);
        tokio::spawn(async move {
            for _ in 0..40 {
                sender.send(KernelEvent::Overrun).await.expect("heard");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        });
        let begin = Instant::now();
        let first = next_batch(&mut receiver, Duration::from_millis(5)).await;
        assert!(begin.elapsed() <= Duration::from_millis(21));
        let rest = next_batch(&mut receiver, Duration::from_millis(5)).await;
        let count = |batch: Option<Vec<_>>| batch.expect("events").len();
        assert!(count(first) < 40);
        assert!(count(rest) > 10);
    }
}
