//! Many request/response flows of one process at the same time, with what they
//! achieved in every tenth of a second: nothing hides behind an average.

use std::{
    collections::VecDeque,
    io::{self, Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, RawFd},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    epoll::{self, Epoll},
    pin_to, ready,
    request_response::{Protocol, ServeReport},
    share,
    socket::{self, is_timeout},
    stream::SAMPLE,
    told_to_finish,
};

/// Bytes of a message: flow, number, padding.
const MESSAGE: usize = 64;
/// After so long a datagram is lost, and the flow asks again.
const LOST: Duration = Duration::from_millis(1000);
/// A TCP flow without an answer for so long is dead.
const DEAD: Duration = Duration::from_secs(15);
/// The number under which the server's own socket is known.
const LISTENER: u64 = u64::MAX;
/// When `--idle` begins.
const BEFORE_IDLE: f64 = 2.0;
/// How long one turn waits.
const TURN: Duration = Duration::from_millis(20);

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// What carries the requests.
    #[arg(long, value_enum)]
    protocol: Protocol,
    /// Port.
    #[arg(long, default_value_t = 6100)]
    port: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
    /// The other end is there as well, and both take turns.
    #[arg(long)]
    shared: bool,
}

/// Arguments of the client.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// What carries the requests.
    #[arg(long, value_enum)]
    protocol: Protocol,
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// How many flows.
    #[arg(long, default_value_t = 16)]
    flows: usize,
    /// How many of them wait for an answer at a time, in turn; all when missing.
    #[arg(long)]
    window: Option<usize>,
    /// Seconds to measure; until told when missing.
    #[arg(long)]
    seconds: Option<f64>,
    /// At most so many requests per second in all; as fast as it goes when missing.
    #[arg(long)]
    rate: Option<f64>,
    /// Seconds of silence, once, after the first two.
    #[arg(long, default_value_t = 0.0)]
    idle: f64,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
    /// The other end is there as well, and both take turns.
    #[arg(long)]
    shared: bool,
}

/// What the flows achieved.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ManyReport {
    /// Flows that began.
    pub flows: usize,
    /// Flows that never got an answer.
    pub silent: usize,
    /// TCP connections that broke or stood still.
    pub broken: usize,
    /// Why the first of them did.
    pub first_break: Option<String>,
    /// Datagrams without an answer within a second.
    pub lost: u64,
    /// Answers that were not to the question.
    pub corrupt: u64,
    /// Requests sent, repetitions included.
    pub sent: u64,
    /// Answers.
    pub transactions: u64,
    /// Answers in each 100 ms.
    pub samples: Vec<u64>,
    /// Time of measuring.
    pub seconds: f64,
    /// The longest that any answer took, in milliseconds.
    pub longest_ms: f64,
}

impl ManyReport {
    /// Answers per second.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.transactions as f64 / self.seconds
    }

    /// The lowest rate of any whole second after the first half one.
    #[must_use]
    pub fn worst_second(&self) -> f64 {
        const SECOND: usize = 10;
        const START: usize = 5;
        let steady = self.samples.get(START..).unwrap_or_default();
        let steady = &steady[..steady.len().saturating_sub(1)];
        let worst = steady
            .windows(SECOND)
            .map(|window| window.iter().sum::<u64>())
            .min();
        worst.unwrap_or(0) as f64
    }

    /// Demands that every flow lived to the end and every answer was right.
    ///
    /// # Errors
    /// Says what broke.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.broken == 0 && self.lost == 0 && self.corrupt == 0 && self.silent == 0,
            "of {} flows {} broke ({:?}), {} never got an answer; {} datagrams lost, {} answers wrong, {} right",
            self.flows,
            self.broken,
            self.first_break,
            self.silent,
            self.lost,
            self.corrupt,
            self.transactions
        );
        Ok(())
    }
}

/// Answers every message with itself, until told.
///
/// # Errors
/// When a socket of its own fails.
pub fn serve(args: &ServeArgs) -> Result<ServeReport> {
    if args.shared {
        share(args.cpu)?;
    } else {
        pin_to(args.cpu)?;
    }
    epoll::allow_many_sockets()?;
    let finish = told_to_finish();
    let at = (Ipv4Addr::UNSPECIFIED, args.port);
    let answered = match args.protocol {
        Protocol::Udp => {
            let server = UdpSocket::bind(at)?;
            socket::make_roomy(&server)?;
            server.set_read_timeout(Some(TURN))?;
            ready()?;
            serve_udp(&server, || finish.load(Ordering::Relaxed))?
        }
        Protocol::Tcp => {
            let listener = socket::tcp_listener(args.port)?;
            ready()?;
            serve_tcp(&listener, || finish.load(Ordering::Relaxed))?
        }
    };
    Ok(ServeReport { answered })
}

fn serve_udp(server: &UdpSocket, finish: impl Fn() -> bool) -> Result<u64> {
    let mut message = [0; MESSAGE];
    let mut answered = 0;
    while !finish() {
        match server.recv_from(&mut message) {
            Ok((length, from)) => match server.send_to(&message[..length], from) {
                Ok(_) => answered += 1,
                // An ICMP answer to an earlier datagram, or a client that has gone.
                Err(error) if is_answer(&error) => {}
                Err(error) => return Err(error).context("cannot answer"),
            },
            Err(error) if is_timeout(&error) || is_answer(&error) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(answered)
}

fn serve_tcp(listener: &TcpListener, finish: impl Fn() -> bool) -> Result<u64> {
    let epoll = Epoll::new()?;
    epoll.add(listener, LISTENER)?;
    let mut connections: Vec<Option<TcpStream>> = Vec::new();
    let (mut readable, mut message, mut answered) = (Vec::new(), [0; MESSAGE], 0);
    while !finish() {
        epoll.wait(TURN, &mut readable)?;
        for &number in &readable {
            if number == LISTENER {
                while let Ok((connection, _)) = listener.accept() {
                    connection.set_nonblocking(true)?;
                    connection.set_nodelay(true)?;
                    epoll.add(&connection, connections.len() as u64)?;
                    connections.push(Some(connection));
                }
                continue;
            }
            let place = &mut connections[number as usize];
            let Some(connection) = place else { continue };
            match connection.read(&mut message) {
                // Small messages come whole, and go whole: at most one is under way.
                Ok(MESSAGE) if connection.write(&message).is_ok() => answered += 1,
                Err(error) if is_timeout(&error) => {}
                _ => *place = None,
            }
        }
    }
    Ok(answered)
}

/// Asks.
///
/// # Errors
/// When no flow can begin; flows that break later are a result.
pub fn client(args: &ClientArgs) -> Result<ManyReport> {
    if args.shared {
        share(args.cpu)?;
    } else {
        pin_to(args.cpu)?;
    }
    epoll::allow_many_sockets()?;
    ensure!(args.flows > 0, "no flow at all");
    let mut flows = (0..args.flows)
        .map(|number| Flow::open(args.protocol, args.to, number))
        .collect::<Result<Vec<_>>>()?;
    let finish = told_to_finish();
    ready()?;
    let epoll = Epoll::new()?;
    for (number, flow) in flows.iter().enumerate() {
        epoll.add(flow, number as u64)?;
    }
    let window = args.window.unwrap_or(args.flows).min(args.flows);
    let mut idle: VecDeque<usize> = (0..args.flows).collect();
    let mut waiting = 0;
    let mut report = ManyReport {
        flows: args.flows,
        ..ManyReport::default()
    };
    let start = Instant::now();
    let limit = args.seconds.map(Duration::from_secs_f64);
    let mut looked = start;
    let mut readable = Vec::new();
    loop {
        let now = Instant::now();
        if limit.is_some_and(|limit| now - start >= limit) || finish.load(Ordering::Relaxed) {
            break;
        }
        let at = (now - start).as_secs_f64();
        let allowed = if (BEFORE_IDLE..BEFORE_IDLE + args.idle).contains(&at) {
            0
        } else {
            args.rate.map_or(u64::MAX, |rate| (at * rate) as u64)
        };
        while waiting < window && report.sent < allowed {
            let Some(number) = idle.pop_front() else {
                break;
            };
            waiting += usize::from(flows[number].ask(now, &mut report));
        }
        let turn = if args.rate.is_some() { 1 } else { 20 };
        epoll.wait(Duration::from_millis(turn), &mut readable)?;
        for &number in &readable {
            let number = number as usize;
            if flows[number].hear(start, &mut report) {
                waiting -= 1;
                if flows[number].lives() {
                    idle.push_back(number);
                }
            }
        }
        if looked.elapsed() > Duration::from_millis(100) {
            looked = Instant::now();
            for (number, flow) in flows.iter_mut().enumerate() {
                if flow.give_up(looked, &mut report) {
                    waiting -= 1;
                    if flow.lives() {
                        idle.push_back(number);
                    }
                }
            }
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    report.silent = flows.iter().filter(|flow| flow.answers == 0).count();
    Ok(report)
}

enum Carrier {
    Udp(UdpSocket),
    Tcp(TcpStream),
    Broken,
}

struct Flow {
    carrier: Carrier,
    number: u64,
    asked: u64,
    answers: u64,
    since: Option<Instant>,
}

impl AsRawFd for Flow {
    fn as_raw_fd(&self) -> RawFd {
        match &self.carrier {
            Carrier::Udp(socket) => socket.as_raw_fd(),
            Carrier::Tcp(socket) => socket.as_raw_fd(),
            Carrier::Broken => -1,
        }
    }
}

impl Flow {
    fn open(protocol: Protocol, to: SocketAddrV4, number: usize) -> Result<Self> {
        let carrier = match protocol {
            Protocol::Udp => {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect(to)?;
                socket.set_nonblocking(true)?;
                Carrier::Udp(socket)
            }
            Protocol::Tcp => {
                let socket = TcpStream::connect_timeout(&to.into(), DEAD)
                    .with_context(|| format!("flow {number} cannot connect to {to}"))?;
                socket.set_nodelay(true)?;
                socket.set_nonblocking(true)?;
                Carrier::Tcp(socket)
            }
        };
        Ok(Self {
            carrier,
            number: number as u64,
            asked: 0,
            answers: 0,
            since: None,
        })
    }

    fn lives(&self) -> bool {
        !matches!(self.carrier, Carrier::Broken)
    }

    fn message(&self) -> [u8; MESSAGE] {
        let mut message = [0x5a; MESSAGE];
        message[..8].copy_from_slice(&self.number.to_le_bytes());
        message[8..16].copy_from_slice(&self.asked.to_le_bytes());
        message
    }

    /// Whether it now waits for an answer.
    fn ask(&mut self, now: Instant, report: &mut ManyReport) -> bool {
        self.asked += 1;
        report.sent += 1;
        let message = self.message();
        let result = match &mut self.carrier {
            Carrier::Udp(socket) => socket.send(&message),
            Carrier::Tcp(socket) => socket.write(&message),
            Carrier::Broken => return false,
        };
        match result {
            Ok(MESSAGE) => {}
            // Not sent is lost, and found out as that.
            Err(error) if self.is_udp() && (is_answer(&error) || is_timeout(&error)) => {}
            Ok(length) => {
                self.breaks(report, &format!("took {length} bytes"));
                return false;
            }
            Err(error) => {
                self.breaks(report, &error.to_string());
                return false;
            }
        }
        self.since = Some(now);
        true
    }

    fn is_udp(&self) -> bool {
        matches!(self.carrier, Carrier::Udp(_))
    }

    /// Whether it waits no longer: for an answer came, or it broke.
    fn hear(&mut self, start: Instant, report: &mut ManyReport) -> bool {
        let mut message = [0; MESSAGE];
        let result = match &mut self.carrier {
            Carrier::Udp(socket) => socket.recv(&mut message),
            Carrier::Tcp(socket) => socket.read(&mut message),
            Carrier::Broken => return false,
        };
        match result {
            Ok(0) if !self.is_udp() => {
                self.breaks(report, "the server closed it");
                return self.since.take().is_some();
            }
            Ok(_) => {}
            Err(error) if is_timeout(&error) || self.is_udp() && is_answer(&error) => return false,
            Err(error) => {
                self.breaks(report, &error.to_string());
                return self.since.take().is_some();
            }
        }
        if message != self.message() {
            // The late answer to a question given up is no error.
            let number = u64::from_le_bytes(message[8..16].try_into().expect("eight bytes"));
            report.corrupt += u64::from(!self.is_udp() || number >= self.asked);
            return false;
        }
        let Some(since) = self.since.take() else {
            return false;
        };
        let now = Instant::now();
        report.longest_ms = report.longest_ms.max((now - since).as_secs_f64() * 1000.0);
        self.answers += 1;
        report.transactions += 1;
        let slot = ((now - start).as_nanos() / SAMPLE.as_nanos()) as usize;
        if report.samples.len() <= slot {
            report.samples.resize(slot + 1, 0);
        }
        report.samples[slot] += 1;
        true
    }

    /// Whether it waited too long, and does not any more.
    fn give_up(&mut self, now: Instant, report: &mut ManyReport) -> bool {
        let patience = if self.is_udp() { LOST } else { DEAD };
        let waited = self
            .since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if waited < patience {
            return false;
        }
        self.since = None;
        if self.is_udp() {
            report.lost += 1;
            report.longest_ms = report.longest_ms.max(waited.as_secs_f64() * 1000.0);
        } else {
            self.breaks(report, &format!("no answer for {waited:?}"));
        }
        true
    }

    fn breaks(&mut self, report: &mut ManyReport, why: &str) {
        report.broken += 1;
        report
            .first_break
            .get_or_insert_with(|| format!("flow {}: {why}", self.number));
        self.carrier = Carrier::Broken;
    }
}

/// An ICMP message about an earlier datagram.
fn is_answer(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EPERM)
    )
}

#[cfg(test)]
mod tests {
    use super::ManyReport;

    #[test]
    fn the_worst_second_is_found_wherever_it_begins() {
        let mut samples = vec![10; 50];
        samples[17..25].fill(0);
        let report = ManyReport {
            samples,
            ..ManyReport::default()
        };
        assert!((report.worst_second() - 20.0).abs() < f64::EPSILON);
    }
}
