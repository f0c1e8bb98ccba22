//! Ends or rechecks verdicts when what they rest on changes.
//!
//! A thread of its own, so that a changed rule takes effect however busy the
//! agent is. It hears of changes of rule sets (nftables, and with it
//! iptables-nft), of IPsec policies and states, of routes and routing rules and
//! of neighbours; each raises the generation. Once a second it looks at what
//! makes no event: conntrack's settings, programs that take packets from
//! netfilter, and how many flows are confirmed, from which the validity follows.

use std::{
    collections::BTreeMap,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc::Sender,
    },
    thread,
    time::{Duration, Instant},
};

use aya::maps::{MapData, PerCpuArray};
use flannel_ebpf::{
    layout::{COUNTERS, Tally},
    reason::Reason,
};
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{NeighbourAttribute, NeighbourMessage},
    route::RouteAttribute,
};
use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, info, warn};

use super::{
    EbpfError,
    epoch::{Generation, pinned},
    own::Command,
};
use crate::datapath::{
    conntrack::{Conntrack, Standing},
    netlink::is_through_object,
};

const GROUP_NFTABLES: u32 = 7;
const GROUP_XFRM_SA: u32 = 3;
const GROUP_XFRM_POLICY: u32 = 4;
const GROUP_NEIGHBOURS: u32 = 3;
const GROUP_IPV4_ROUTES: u32 = 7;
const GROUP_IPV4_RULES: u32 = 8;
/// Table `local`: addresses, not ways.
const TABLE_LOCAL: u8 = 255;

/// How often the things without an event are looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// The least time between two generations, while few flows have to be rechecked.
const LEAST_GAP: Duration = Duration::from_millis(50);
/// The most, however many there are.
const MOST_GAP: Duration = Duration::from_secs(1);
/// What one flow's recheck may take of the gap: about five times what it costs.
const RECHECK_COST: Duration = Duration::from_micros(50);
/// Confirmations per second, both directions of a flow counted, that may be spent on time alone.
const PROBE_BUDGET: f64 = 2_000.0;
/// The longest that a verdict may hold without being confirmed.
pub const LONGEST_VALIDITY: Duration = Duration::from_secs(30);
/// How long TCP stays with the stack after somebody changed conntrack's settings again.
const QUARREL: Duration = Duration::from_secs(10);

/// How the bypass fares.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Bypass {
    /// Nothing bypasses the stack, for this reason.
    pub held: Option<String>,
    /// TCP does not, for this reason.
    pub tcp_held: Option<String>,
    /// How long a confirmed verdict holds.
    pub validity: Duration,
    /// How often the generation was raised since this agent opened the datapath.
    pub raised: u64,
}

/// The running watch; it ends when this is dropped.
pub struct Invalidation {
    _stop: UnixStream,
    state: Arc<Mutex<Bypass>>,
}

impl Invalidation {
    /// Starts watching in the network namespace of the calling thread. Before this returns
    /// conntrack has been prepared and the programs know what may bypass the stack.
    ///
    /// # Errors
    /// A socket could not be opened, a map not read, or the thread not started.
    pub(super) fn start(
        maps: &Path,
        generation: Generation,
        conntrack: Conntrack,
        validity: Duration,
        own: Option<Sender<Command>>,
        tunnel: Arc<AtomicU32>,
    ) -> Result<Self, EbpfError> {
        let counters = pinned(maps, COUNTERS)?;
        let failed = |source| EbpfError::Watch { source };
        let (stop, stopped) = UnixStream::pair().map_err(failed)?;
        let state = Arc::new(Mutex::new(Bypass {
            validity,
            ..Bypass::default()
        }));
        let mut watch = Watch {
            stopped,
            nftables: listen(NETLINK_NETFILTER, &[GROUP_NFTABLES]).map_err(failed)?,
            // A kernel without IPsec has no policies to watch.
            xfrm: listen(NETLINK_XFRM, &[GROUP_XFRM_SA, GROUP_XFRM_POLICY]).ok(),
            routes: listen(
                NETLINK_ROUTE,
                &[GROUP_NEIGHBOURS, GROUP_IPV4_ROUTES, GROUP_IPV4_RULES],
            )
            .map_err(failed)?,
            generation,
            own,
            tunnel,
            conntrack,
            counters,
            state: Arc::clone(&state),
            neighbours: BTreeMap::new(),
            least_validity: validity,
            gap: LEAST_GAP,
            raised: Instant::now(),
            pending: false,
            looked: Instant::now(),
            confirmed: None,
            quarrel: None,
            buffer: vec![0; 64 << 10],
        };
        watch.look();
        thread::Builder::new()
            .name("invalidation".to_owned())
            .spawn(move || watch.run())
            .map_err(failed)?;
        Ok(Self { _stop: stop, state })
    }

    /// How the bypass fares now.
    #[must_use]
    pub fn state(&self) -> Bypass {
        self.state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn listen(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.set_non_blocking(true)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.add_membership(*group)?;
    }
    Ok(socket)
}

struct Watch {
    stopped: UnixStream,
    nftables: Socket,
    xfrm: Option<Socket>,
    routes: Socket,
    generation: Generation,
    /// Who hands over what conntrack does not know yet.
    own: Option<Sender<Command>>,
    conntrack: Conntrack,
    tunnel: Arc<AtomicU32>,
    counters: PerCpuArray<MapData, Tally>,
    state: Arc<Mutex<Bypass>>,
    /// Link addresses of neighbours: their states come and go without the way changing.
    neighbours: BTreeMap<(u32, Vec<u8>), Vec<u8>>,
    least_validity: Duration,
    gap: Duration,
    raised: Instant,
    pending: bool,
    looked: Instant,
    confirmed: Option<u64>,
    quarrel: Option<Instant>,
    buffer: Vec<u8>,
}

impl Watch {
    fn run(mut self) {
        loop {
            let until_look = PERIOD.saturating_sub(self.looked.elapsed());
            let until_raise = self.gap.saturating_sub(self.raised.elapsed());
            let wait = if self.pending {
                until_look.min(until_raise)
            } else {
                until_look
            };
            let Some(ready) = self.wait(wait) else {
                return;
            };
            if ready.rules {
                // A program may have been put before the rules it serves.
                self.hold_while_queued();
            }
            if ready.rules || ready.ways {
                self.generation.raise_classes();
                self.hand_over_own();
                self.pending = true;
            }
            if self.pending && self.raised.elapsed() >= self.gap {
                self.generation.raise();
                self.raised = Instant::now();
                self.pending = false;
                self.with_state(|state| state.raised += 1);
            }
            if self.looked.elapsed() >= PERIOD {
                self.look();
            }
        }
    }

    /// Waits for events; `None` when told to stop.
    fn wait(&mut self, timeout: Duration) -> Option<Ready> {
        // Rounded up, so that what is waited for is due afterwards.
        let timeout = u16::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut descriptors = vec![
            PollFd::new(self.stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(descriptor(&self.nftables), PollFlags::POLLIN),
            PollFd::new(descriptor(&self.routes), PollFlags::POLLIN),
        ];
        if let Some(xfrm) = &self.xfrm {
            descriptors.push(PollFd::new(descriptor(xfrm), PollFlags::POLLIN));
        }
        if let Err(error) = poll(&mut descriptors, PollTimeout::from(timeout)) {
            if error != nix::errno::Errno::EINTR {
                warn!(%error, "cannot wait for changes: verdicts end by time alone");
                thread::sleep(PERIOD);
            }
            return Some(Ready::default());
        }
        let is_ready: Vec<bool> = descriptors
            .iter()
            .map(|one| one.any().unwrap_or(false))
            .collect();
        drop(descriptors);
        if is_ready[0] && self.stopped.read(&mut [0]).map_or(true, |read| read == 0) {
            return None;
        }
        let mut ready = Ready::default();
        if is_ready[1] {
            ready.rules = self.drain(Kind::Rules);
        }
        if is_ready[2] {
            ready.ways = self.drain(Kind::Ways);
        }
        if is_ready.get(3) == Some(&true) {
            ready.rules |= self.drain(Kind::Policies);
        }
        Some(ready)
    }

    /// Reads all that is there; `true` if a verdict may depend on it.
    fn drain(&mut self, kind: Kind) -> bool {
        let mut concerns = false;
        loop {
            let socket = match kind {
                Kind::Rules => &self.nftables,
                Kind::Ways => &self.routes,
                Kind::Policies => match &self.xfrm {
                    Some(socket) => socket,
                    None => return false,
                },
            };
            match socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => {
                    concerns |= match kind {
                        Kind::Rules | Kind::Policies => true,
                        Kind::Ways => is_way(
                            &mut self.neighbours,
                            self.tunnel.load(Ordering::Relaxed),
                            &self.buffer[..length],
                        ),
                    };
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return concerns,
                // Events were lost: anything may have changed.
                Err(_) => concerns = true,
            }
        }
    }

    fn hand_over_own(&self) {
        if let Some(own) = &self.own {
            let _ = own.send(Command::HandOver);
        }
    }

    fn with_state(&self, change: impl FnOnce(&mut Bypass)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Everything that makes no event.
    fn look(&mut self) {
        self.looked = Instant::now();
        self.hold_while_queued();
        self.keep_conntrack();
        let (held, tcp_held) = {
            let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            (state.held.is_some(), state.tcp_held.is_some())
        };
        self.generation.allow(!held, !held && !tcp_held);
        self.adapt();
    }

    /// A packet that netfilter gives to a program leaves the stack later and from elsewhere; as
    /// its flow cannot be told from others, nothing bypasses while there is such a program.
    fn hold_while_queued(&mut self) {
        let queues = std::fs::read_to_string("/proc/net/netfilter/nfnetlink_queue");
        let held = bound_queue(&queues.unwrap_or_default()).map(|(queue, pid)| {
            format!(
                "process {pid} takes packets from netfilter (NFQUEUE {queue}): they all take the stack"
            )
        });
        let changed = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let changed = state.held != held;
            let tcp = state.tcp_held.is_none();
            state.held.clone_from(&held);
            changed.then_some(tcp)
        };
        if let Some(tcp) = changed {
            self.generation.allow(held.is_none(), held.is_none() && tcp);
            self.hand_over_own();
            match held {
                Some(reason) => warn!(reason, "no packet bypasses the stack"),
                None => info!("packets may bypass the stack"),
            }
        }
    }

    /// Keeps conntrack's settings, and TCP with the stack where somebody else holds them otherwise.
    fn keep_conntrack(&mut self) {
        let standing = match (self.conntrack.standing(), self.quarrel) {
            (Standing::Fit, None) => Standing::Fit,
            (Standing::Fit, Some(since)) if since.elapsed() >= QUARREL => {
                self.quarrel = None;
                Standing::Fit
            }
            (Standing::Fit, Some(_)) => Standing::Unfit(
                "conntrack's settings were changed by somebody else and set again; waiting to see whether they stay".to_owned(),
            ),
            (Standing::Unfit(_), _) => {
                // Flows that are under way must not meet the stack unprepared, nor the stack them.
                self.generation.allow(
                    self.state
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .held
                        .is_none(),
                    false,
                );
                self.hand_over_own();
                let first = !self.conntrack.is_changed();
                match self.conntrack.prepare() {
                    Standing::Fit if first => Standing::Fit,
                    Standing::Fit => {
                        self.quarrel = Some(Instant::now());
                        Standing::Unfit(
                            "somebody else changed conntrack's settings; they were set again"
                                .to_owned(),
                        )
                    }
                    unfit => unfit,
                }
            }
        };
        let reason = match standing {
            Standing::Fit => None,
            Standing::Unfit(reason) => Some(reason),
        };
        self.with_state(|state| {
            if state.tcp_held != reason {
                match &reason {
                    Some(reason) => warn!(reason, "TCP does not bypass the stack"),
                    None => info!("TCP may bypass the stack"),
                }
                state.tcp_held = reason;
            }
        });
    }

    /// The validity follows from how many flows there are: each is confirmed about twice per
    /// validity, and only so many confirmations may be spent.
    fn adapt(&mut self) {
        let confirmed = match self.confirmations() {
            Ok(confirmed) => confirmed,
            Err(error) => {
                debug!(%error, "cannot read counters");
                return;
            }
        };
        let Some(before) = self.confirmed.replace(confirmed) else {
            return;
        };
        let rate = confirmed.saturating_sub(before) as f64 / PERIOD.as_secs_f64();
        let now = self
            .state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .validity;
        let validity = adapted(now, rate, self.least_validity);
        // One direction is confirmed each half validity.
        let flows = rate * now.as_secs_f64() / 2.0;
        self.gap = RECHECK_COST.mul_f64(flows).clamp(LEAST_GAP, MOST_GAP);
        if validity != now {
            self.generation.set_validity(validity);
            self.with_state(|state| state.validity = validity);
        }
    }

    fn confirmations(&self) -> Result<u64, aya::maps::MapError> {
        let mut sum = 0;
        for reason in [Reason::LearnOutConfirmed, Reason::LearnInConfirmed] {
            let per_cpu = self.counters.get(&reason.index(), 0)?;
            sum += per_cpu.iter().map(|tally| tally.packets).sum::<u64>();
        }
        Ok(sum)
    }
}

/// The validity at which `rate` confirmations per second become the budget.
fn adapted(now: Duration, rate: f64, least: Duration) -> Duration {
    let wanted = now.mul_f64(rate / PROBE_BUDGET);
    let most = LONGEST_VALIDITY.max(least);
    // Down by halves: a pause of one second is not yet a quiet network.
    let wanted = wanted.max(now / 2).clamp(least, most);
    // Small steps are not worth a write.
    if wanted.abs_diff(now) * 8 < now && wanted != least {
        now
    } else {
        wanted
    }
}

fn descriptor(socket: &Socket) -> BorrowedFd<'_> {
    // SAFETY: borrowed for as long as the socket.
    unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Rules,
    Policies,
    Ways,
}

#[derive(Debug, Default)]
struct Ready {
    rules: bool,
    ways: bool,
}

/// Can one of these messages change a packet's way?
///
/// A route to `tunnel` that goes is none: either its peer went, which ends that peer's verdicts, or
/// the agent puts it back, and whoever asked the stack meanwhile would be lost.
fn is_way(
    neighbours: &mut BTreeMap<(u32, Vec<u8>), Vec<u8>>,
    tunnel: u32,
    mut datagram: &[u8],
) -> bool {
    let mut concerns = false;
    while !datagram.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(datagram) else {
            return true;
        };
        let length = (message.header.length as usize + 3) & !3;
        concerns |= match message.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRoute(route))
                if route.attributes.contains(&RouteAttribute::Oif(tunnel))
                    || is_through_object(&route) =>
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
        let Some(rest) = datagram.get(length.max(16)..) else {
            break;
        };
        datagram = rest;
    }
    concerns
}

/// Has a neighbour another link address than before? New ones concern nobody's verdict.
fn has_moved(
    neighbours: &mut BTreeMap<(u32, Vec<u8>), Vec<u8>>,
    message: &NeighbourMessage,
) -> bool {
    if message.header.family != AddressFamily::Inet {
        return false;
    }
    let mut address = Vec::new();
    let mut link = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(destination) => {
                address = format!("{destination:?}").into_bytes();
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => link.clone_from(bytes),
            _ => {}
        }
    }
    if address.is_empty() || link.is_empty() {
        return false;
    }
    // A bound for hosts on networks with very many neighbours.
    if neighbours.len() > 65_536 {
        neighbours.clear();
    }
    neighbours
        .insert((message.header.ifindex, address), link.clone())
        .is_some_and(|before| before != link)
}

/// First netfilter queue that a process has bound: its number and the process.
fn bound_queue(text: &str) -> Option<(u32, u32)> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_queue_is_found() {
        assert_eq!(bound_queue(""), None);
        let text = "    3  12345     0 2 65531     0     0        0  1\n";
        assert_eq!(bound_queue(text), Some((3, 12345)));
    }

    #[test]
    fn the_validity_follows_the_number_of_flows() {
        let least = Duration::from_secs(2);
        assert_eq!(adapted(least, 0.0, least), least);
        // 2,000 flows, two directions, confirmed every second: twice the budget's share.
        assert_eq!(adapted(least, 2_000.0, least), least);
        assert_eq!(adapted(least, 30_000.0, least), Duration::from_secs(30));
        assert_eq!(
            adapted(LONGEST_VALIDITY, 1_000_000.0, least),
            LONGEST_VALIDITY
        );
        // Quiet again: back by halves.
        assert_eq!(
            adapted(LONGEST_VALIDITY, 0.0, least),
            Duration::from_secs(15)
        );
        assert_eq!(adapted(Duration::from_secs(3), 0.0, least), least);
    }

    #[test]
    fn a_validity_that_the_operator_made_long_stays() {
        let long = Duration::from_secs(60);
        assert_eq!(adapted(long, 1_000_000.0, long), long);
    }
}
