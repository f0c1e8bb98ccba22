//! One TCP stream in either direction or both, every word checked on arrival.
//!
//! The client's first 25 bytes tell the server what to do (`Plan`).

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{
    pattern::{Checker, Producer},
    pin_to, ready, socket, told_to_finish,
};

/// Bytes per system call.
const PIECE: usize = 128 * 1024;
/// Length of one throughput sample.
pub const SAMPLE: Duration = Duration::from_millis(100);
/// A connection that stands still for so long is dead.
const DEAD: Duration = Duration::from_secs(20);

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Direction {
    /// The client.
    Up,
    /// The server.
    Down,
    /// Both at the same time.
    Both,
}

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// TCP port.
    #[arg(long, default_value_t = 5000)]
    port: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Arguments of the client. Without bytes and seconds it sends until told.
#[derive(Debug, clap::Args)]
pub struct StreamArgs {
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// Who sends.
    #[arg(long, value_enum, default_value = "up")]
    direction: Direction,
    /// Bytes to send, a multiple of eight.
    #[arg(long, default_value_t = 0)]
    bytes: u64,
    /// Seconds to send.
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
    /// Send at most so many gigabits per second (`SO_MAX_PACING_RATE`): no bursts
    /// that would make up for a standstill.
    #[arg(long)]
    pace: Option<f64>,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What one end did and saw.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StreamReport {
    /// Its sending half.
    pub sent: Option<Half>,
    /// Its receiving half.
    pub received: Option<Half>,
}

/// One direction as one end sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Half {
    /// Payload.
    pub bytes: u64,
    /// Checksum of all of it.
    pub checksum: u64,
    /// Position of the first wrong word; only a receiver can tell.
    pub first_error: Option<u64>,
    /// From the first byte to the last.
    pub seconds: f64,
    /// Segments sent again; only a sender can tell.
    pub retransmissions: u32,
    /// Bytes in each 100 ms; only of a receiver.
    pub samples: Vec<u64>,
}

impl Half {
    /// Gigabits per second.
    #[must_use]
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.seconds / 1e9
    }
}

/// What the server has to do, as the client's first bytes say it.
#[derive(Debug, Clone, Copy)]
struct Plan {
    direction: Direction,
    bytes: u64,
    limit: Option<Duration>,
    seed: u64,
}

impl Plan {
    const LENGTH: usize = 25;

    fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = self.direction as u8;
        bytes[1..9].copy_from_slice(&self.bytes.to_le_bytes());
        let limit = self.limit.map_or(0, |limit| limit.as_nanos() as u64);
        bytes[9..17].copy_from_slice(&limit.to_le_bytes());
        bytes[17..].copy_from_slice(&self.seed.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; Self::LENGTH]) -> Result<Self> {
        let field = |at: usize| {
            let mut field = [0; 8];
            field.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(field)
        };
        Ok(Self {
            direction: match bytes[0] {
                0 => Direction::Up,
                1 => Direction::Down,
                2 => Direction::Both,
                other => bail!("direction {other} in the client's first byte"),
            },
            bytes: field(1),
            limit: Some(Duration::from_nanos(field(9))).filter(|limit| !limit.is_zero()),
            seed: field(17),
        })
    }

    fn client_sends(self) -> bool {
        self.direction != Direction::Down
    }

    fn server_sends(self) -> bool {
        self.direction != Direction::Up
    }
}

/// Accepts one connection and does what the client asks.
///
/// # Errors
/// When the connection breaks.
pub fn serve(args: &ServeArgs) -> Result<StreamReport> {
    pin_to(args.cpu)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    ready()?;
    let (mut connection, _) = listener.accept()?;
    let mut first = [0; Plan::LENGTH];
    connection.read_exact(&mut first)?;
    let plan = Plan::decode(first)?;
    // Without a bound of its own the server stops when the client does.
    let peer_ended = Arc::new(AtomicBool::new(false));
    let bounded = plan.bytes > 0 || plan.limit.is_some();
    let stop = {
        let peer_ended = Arc::clone(&peer_ended);
        move || !bounded && peer_ended.load(Ordering::Relaxed)
    };
    let report = both_halves(
        &connection,
        plan,
        plan.server_sends(),
        plan.client_sends(),
        stop,
        &peer_ended,
    )?;
    // The client reads until our end; wait for its, so that no RST overtakes data.
    connection.read_to_end(&mut Vec::new())?;
    Ok(report)
}

/// Connects and runs the stream.
///
/// # Errors
/// When the connection breaks.
pub fn run(args: &StreamArgs) -> Result<StreamReport> {
    ensure!(
        args.bytes.is_multiple_of(8),
        "the data is made of words of eight bytes"
    );
    pin_to(args.cpu)?;
    let mut connection =
        TcpStream::connect(args.to).with_context(|| format!("cannot connect to {}", args.to))?;
    if let Some(gbit) = args.pace {
        let bytes_per_second = (gbit * 1e9 / 8.0) as u64;
        socket::set_bytes(
            &connection,
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            &bytes_per_second.to_ne_bytes(),
        )?;
    }
    let plan = Plan {
        direction: args.direction,
        bytes: args.bytes,
        limit: Some(Duration::from_secs_f64(args.seconds)).filter(|limit| !limit.is_zero()),
        seed: u64::from(std::process::id()),
    };
    connection.write_all(&plan.encode())?;
    let told = told_to_finish();
    ready()?;
    if !plan.client_sends() && plan.bytes == 0 && plan.limit.is_none() {
        let (writer, told) = (connection.try_clone()?, Arc::clone(&told));
        thread::spawn(move || {
            while !told.load(Ordering::Relaxed) {
                thread::sleep(Duration::from_millis(5));
            }
            // Fails only if the connection is gone, which the reader reports.
            let _ = writer.shutdown(Shutdown::Write);
        });
    }
    let ignored = AtomicBool::new(false);
    both_halves(
        &connection,
        plan,
        plan.client_sends(),
        plan.server_sends(),
        move || told.load(Ordering::Relaxed),
        &ignored,
    )
}

fn both_halves(
    connection: &TcpStream,
    plan: Plan,
    sends: bool,
    receives: bool,
    stop: impl Fn() -> bool + Send,
    peer_ended: &AtomicBool,
) -> Result<StreamReport> {
    connection.set_read_timeout(Some(DEAD))?;
    connection.set_write_timeout(Some(DEAD))?;
    thread::scope(|scope| {
        let sender = sends.then(|| scope.spawn(|| send_half(connection, plan, stop)));
        let receiver = if receives {
            Some(receive_half(connection, plan.seed, peer_ended)?)
        } else {
            None
        };
        if !receives && sends && plan.bytes == 0 && plan.limit.is_none() {
            // Nothing to read but the client's end, which stops the sender.
            let _ = (&mut &*connection).read(&mut [0]);
            peer_ended.store(true, Ordering::Relaxed);
        }
        let sent = sender
            .map(|thread| thread.join().expect("the sender does not panic"))
            .transpose()?;
        Ok(StreamReport {
            sent,
            received: receiver,
        })
    })
}

fn send_half(mut connection: &TcpStream, plan: Plan, stop: impl Fn() -> bool) -> Result<Half> {
    let start = Instant::now();
    let mut producer = Producer::new(plan.seed);
    let mut buffer = vec![0; PIECE];
    loop {
        let left = match plan.bytes {
            0 => PIECE as u64,
            bytes => bytes - producer.bytes(),
        };
        let over = plan.limit.is_some_and(|limit| start.elapsed() >= limit);
        if left == 0 || over || stop() {
            break;
        }
        let piece = &mut buffer[..left.min(PIECE as u64) as usize];
        producer.fill(piece);
        connection
            .write_all(piece)
            .with_context(|| format!("the stream broke after {} bytes", producer.bytes()))?;
    }
    connection.shutdown(Shutdown::Write)?;
    Ok(Half {
        bytes: producer.bytes(),
        checksum: producer.checksum(),
        seconds: start.elapsed().as_secs_f64(),
        retransmissions: socket::retransmissions(connection)?,
        ..Half::default()
    })
}

fn receive_half(mut connection: &TcpStream, seed: u64, peer_ended: &AtomicBool) -> Result<Half> {
    let mut checker = Checker::new(seed);
    let mut buffer = vec![0; 2 * PIECE];
    let mut samples = Vec::new();
    let mut start = None;
    let mut end = Instant::now();
    loop {
        let length = connection
            .read(&mut buffer)
            .with_context(|| format!("the stream broke after {} bytes", checker.bytes()))?;
        if length == 0 {
            break;
        }
        checker.take(&buffer[..length]);
        end = Instant::now();
        let elapsed = end - *start.get_or_insert(end);
        let slot = (elapsed.as_nanos() / SAMPLE.as_nanos()) as usize;
        if samples.len() <= slot {
            samples.resize(slot + 1, 0);
        }
        samples[slot] += length as u64;
    }
    peer_ended.store(true, Ordering::Relaxed);
    Ok(Half {
        bytes: checker.bytes(),
        checksum: checker.checksum(),
        first_error: checker.first_error,
        seconds: start.map_or(0.0, |start| (end - start).as_secs_f64()),
        retransmissions: 0,
        samples,
    })
}
