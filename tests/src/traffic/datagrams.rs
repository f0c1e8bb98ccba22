//! Single datagrams with a chosen size and header, and how they arrive.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{pattern, ready, socket, told_to_finish};

/// Number of the datagram; the pattern named by it follows.
const HEADER: usize = 8;
/// How long to wait for complaints of the network after the last datagram.
const COMPLAINTS: Duration = Duration::from_millis(300);

/// Arguments of the sender.
#[derive(Debug, clap::Args)]
pub struct SendArgs {
    /// Address and port of the receiver.
    #[arg(long)]
    to: SocketAddrV4,
    /// Source address; it has to be one of the sender's own.
    #[arg(long, default_value_t = Ipv4Addr::UNSPECIFIED)]
    from: Ipv4Addr,
    /// Datagrams to send.
    #[arg(long, default_value_t = 1)]
    count: u64,
    /// Number of the first one.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Bytes of payload.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Datagrams per second.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// Forbid fragmentation (`do`), allow it (`dont`), or leave it to the kernel (`want`).
    #[arg(long, value_enum, default_value = "dont")]
    fragmentation: Fragmentation,
    /// Type of service with the ECN bits.
    #[arg(long, default_value_t = 0)]
    tos: u8,
    /// Time to live.
    #[arg(long)]
    ttl: Option<u8>,
    /// IP options.
    #[arg(long, value_enum)]
    options: Option<IpOptions>,
    /// Hand the kernel this many datagrams at once (UDP GSO).
    #[arg(long, default_value_t = 1)]
    segments: usize,
}

/// `IP_MTU_DISCOVER`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Fragmentation {
    Do,
    Dont,
    Want,
}

/// Which IP options to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum IpOptions {
    /// Four times "no operation".
    Nop,
    /// Record route, room for nine addresses.
    RecordRoute,
    /// Timestamps without addresses, room for nine.
    Timestamp,
}

impl IpOptions {
    fn bytes(self) -> Vec<u8> {
        match self {
            Self::Nop => vec![1; 4],
            Self::RecordRoute => padded(&[7, 39, 4]),
            Self::Timestamp => padded(&[68, 40, 5, 0]),
        }
    }
}

/// 40 bytes, the most an IPv4 header takes.
fn padded(start: &[u8]) -> Vec<u8> {
    let mut bytes = start.to_vec();
    bytes.resize(40, 0);
    bytes
}

/// What the sender did and was told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SendReport {
    /// Datagrams that the kernel took.
    pub sent: u64,
    /// Datagrams that it refused as too long (`EMSGSIZE`).
    pub too_long: u64,
    /// "Fragmentation needed" messages.
    pub fragmentation_needed: u64,
    /// The MTU that the last of them named.
    pub path_mtu: Option<u32>,
    /// Who sent it.
    pub complainant: Option<Ipv4Addr>,
}

/// Arguments of the receiver.
#[derive(Debug, clap::Args)]
pub struct ReceiveArgs {
    /// UDP port.
    #[arg(long, default_value_t = 9000)]
    port: u16,
    /// End after so many.
    #[arg(long)]
    count: Option<u64>,
}

/// What arrived, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveReport {
    /// Datagrams.
    pub received: u64,
    /// Those whose payload was not what the sender sends.
    pub corrupt: u64,
    /// Those that came twice.
    pub duplicated: u64,
    /// How many had which size of payload.
    pub sizes: BTreeMap<usize, u64>,
    /// How many had which type of service.
    pub tos: BTreeMap<u8, u64>,
    /// How many had which time to live.
    pub ttl: BTreeMap<u8, u64>,
    /// The type of service of each, in order of their numbers.
    pub tos_by_number: BTreeMap<u64, u8>,
    /// Every different option string, hexadecimal.
    pub options: BTreeSet<String>,
    /// Every different sender.
    pub senders: BTreeSet<Ipv4Addr>,
}

/// The payload of datagram `number`.
pub(super) fn payload(number: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[..HEADER].copy_from_slice(&number.to_le_bytes());
    pattern::fill(&mut bytes[HEADER..], number, 0);
    bytes
}

/// Sends.
///
/// # Errors
/// When the kernel refuses for another reason than the length.
pub fn send(args: &SendArgs) -> Result<SendReport> {
    ensure!(
        args.size >= HEADER,
        "a numbered datagram has at least {HEADER} bytes"
    );
    let sender = UdpSocket::bind((args.from, 0))
        .with_context(|| format!("{} is not one of this pod's addresses", args.from))?;
    socket::make_roomy(&sender)?;
    let set = |name, value| socket::set_option(&sender, libc::IPPROTO_IP, name, value);
    let discover = match args.fragmentation {
        Fragmentation::Do => libc::IP_PMTUDISC_DO,
        Fragmentation::Dont => libc::IP_PMTUDISC_DONT,
        Fragmentation::Want => libc::IP_PMTUDISC_WANT,
    };
    set(libc::IP_MTU_DISCOVER, discover)?;
    set(libc::IP_RECVERR, 1)?;
    set(libc::IP_TOS, args.tos.into())?;
    if let Some(ttl) = args.ttl {
        set(libc::IP_TTL, ttl.into())?;
    }
    if let Some(options) = args.options {
        socket::set_bytes(
            &sender,
            libc::IPPROTO_IP,
            libc::IP_OPTIONS,
            &options.bytes(),
        )
        .context("cannot set IP options")?;
    }
    if args.segments > 1 {
        let size = libc::c_int::try_from(args.size)?;
        socket::set_option(&sender, libc::SOL_UDP, libc::UDP_SEGMENT, size)?;
    }
    sender.set_nonblocking(false)?;
    ready()?;
    let mut report = SendReport::default();
    let start = Instant::now();
    let mut number = 0;
    // A missing route would be reported for ever.
    let mut patience = args.count + 10;
    while number < args.count {
        let due = start + Duration::from_secs_f64(number as f64 / f64::from(args.rate));
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            thread::sleep(early);
        }
        let at_once = (args.segments as u64).min(args.count - number);
        let bytes: Vec<u8> = (0..at_once)
            .flat_map(|index| payload(args.first + number + index, args.size))
            .collect();
        match sender.send_to(&bytes, args.to) {
            Ok(_) => report.sent += at_once,
            Err(error) if error.raw_os_error() == Some(libc::EMSGSIZE) => {
                report.too_long += at_once;
            }
            // With IP_RECVERR the answer to an earlier datagram is reported here, once.
            Err(error) if is_answer_to_earlier(&error) && patience > 0 => {
                patience -= 1;
                continue;
            }
            Err(error) => bail!("cannot send: {error}"),
        }
        number += at_once;
        if args.fragmentation == Fragmentation::Do {
            listen_for_complaints(&sender, &mut report, Duration::from_millis(50))?;
        }
    }
    if args.fragmentation == Fragmentation::Do {
        listen_for_complaints(&sender, &mut report, COMPLAINTS)?;
    }
    Ok(report)
}

/// Time exceeded, port or host unreachable: what became of a datagram long sent.
fn is_answer_to_earlier(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EHOSTUNREACH | libc::ECONNREFUSED | libc::ENETUNREACH)
    )
}

fn listen_for_complaints(
    sender: &UdpSocket,
    report: &mut SendReport,
    limit: Duration,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    let mut buffer = [0; 2048];
    while Instant::now() < deadline {
        match socket::receive(sender, &mut buffer, libc::MSG_ERRQUEUE | libc::MSG_DONTWAIT) {
            Ok(datagram) => {
                let Some(error) = datagram.error else {
                    continue;
                };
                if error.errno == libc::EMSGSIZE && error.from_icmp {
                    report.fragmentation_needed += 1;
                    report.path_mtu = Some(error.info);
                    report.complainant = error.offender;
                    return Ok(());
                }
            }
            Err(error) if socket::is_timeout(&error) => thread::sleep(Duration::from_millis(1)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Receives until told, or until `--count` have come.
///
/// # Errors
/// When the socket fails.
pub fn receive(args: &ReceiveArgs) -> Result<ReceiveReport> {
    let receiver = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    socket::make_roomy(&receiver)?;
    socket::report_headers(&receiver)?;
    receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
    let finish = told_to_finish();
    ready()?;
    let mut report = ReceiveReport::default();
    let mut seen = BTreeSet::new();
    let mut buffer = vec![0; 65536];
    while args.count.is_none_or(|count| report.received < count) {
        match socket::receive(&receiver, &mut buffer, 0) {
            Ok(datagram) => {
                let data = &buffer[..datagram.length];
                note(&mut report, &mut seen, &datagram, data);
            }
            // Only an empty queue ends it: what has arrived counts.
            Err(error) if socket::is_timeout(&error) => {
                if finish.load(Ordering::Relaxed) {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(report)
}

fn note(
    report: &mut ReceiveReport,
    seen: &mut BTreeSet<u64>,
    datagram: &socket::Datagram,
    data: &[u8],
) {
    report.received += 1;
    *report.sizes.entry(data.len()).or_default() += 1;
    let tos = datagram.tos.unwrap_or_default();
    *report.tos.entry(tos).or_default() += 1;
    *report
        .ttl
        .entry(datagram.ttl.unwrap_or_default())
        .or_default() += 1;
    if !datagram.options.is_empty() {
        let hex = datagram
            .options
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        report.options.insert(hex);
    }
    report.senders.extend(datagram.peer);
    let number = data
        .first_chunk::<HEADER>()
        .map(|bytes| u64::from_le_bytes(*bytes));
    match number {
        Some(number) if payload(number, data.len()) == data => {
            report.tos_by_number.insert(number, tos);
            if !seen.insert(number) {
                report.duplicated += 1;
            }
        }
        _ => report.corrupt += 1,
    }
}
