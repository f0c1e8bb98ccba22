//! One request, one response, again: latency, and the cost per packet when
//! both ends share a CPU.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::{latency::Latency, ready, share, socket, told_to_finish};

/// How long a lost response is waited for.
const PATIENCE: Duration = Duration::from_secs(2);

/// What carries the requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Protocol {
    /// One connection, Nagle's algorithm off.
    Tcp,
    /// One pair of sockets.
    Udp,
}

impl Protocol {
    /// The word on command lines and in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// What carries the requests.
    #[arg(long, value_enum)]
    protocol: Protocol,
    /// Port.
    #[arg(long, default_value_t = 6000)]
    port: u16,
    /// Bytes of a request and of a response.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
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
    /// Seconds to measure, after a tenth of it to warm up.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes of a request and of a response.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Source port of UDP; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    from_port: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What the server saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeReport {
    /// Requests answered.
    pub answered: u64,
}

impl ServeReport {
    /// Demands that exactly the requests of this number of transactions were answered.
    ///
    /// # Errors
    /// Names both numbers.
    pub fn check(&self, transactions: u64) -> Result<()> {
        ensure!(
            self.answered == transactions,
            "{} requests were answered, {transactions} responses came",
            self.answered
        );
        Ok(())
    }
}

/// What the client measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RrReport {
    /// Transactions within the measured time.
    pub transactions: u64,
    /// Transactions in all, warming up included.
    pub all_transactions: u64,
    /// The measured time.
    pub seconds: f64,
    /// Transactions per second.
    pub per_second: f64,
    /// From a request to its response.
    pub latency: Latency,
}

/// Arguments of the client that starts a new flow for every request.
#[derive(Debug, clap::Args)]
pub struct FirstArgs {
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// New flows.
    #[arg(long, default_value_t = 1000)]
    count: u32,
    /// Bytes of a request and of a response.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What the first packet of each flow met.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FirstReport {
    /// Flows.
    pub flows: u64,
    /// From a flow's first packet to the response.
    pub latency: Latency,
}

/// Answers until told, or until the TCP client leaves.
///
/// # Errors
/// When a socket fails.
pub fn serve(args: &ServeArgs) -> Result<ServeReport> {
    share(args.cpu)?;
    let at = (Ipv4Addr::UNSPECIFIED, args.port);
    let mut message = vec![0; args.size];
    let mut answered = 0;
    match args.protocol {
        Protocol::Tcp => {
            let listener = TcpListener::bind(at)?;
            ready()?;
            let (mut connection, _) = listener.accept()?;
            connection.set_nodelay(true)?;
            while connection.read_exact(&mut message).is_ok() {
                connection.write_all(&message)?;
                answered += 1;
            }
        }
        Protocol::Udp => {
            let server = UdpSocket::bind(at)?;
            server.set_read_timeout(Some(Duration::from_millis(100)))?;
            let finish = told_to_finish();
            ready()?;
            while !finish.load(Ordering::Relaxed) {
                match server.recv_from(&mut message) {
                    Ok((length, from)) => {
                        server.send_to(&message[..length], from)?;
                        answered += 1;
                    }
                    Err(error) if socket::is_timeout(&error) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
    Ok(ServeReport { answered })
}

/// Measures.
///
/// # Errors
/// When the connection breaks or a datagram is lost.
pub fn client(args: &ClientArgs) -> Result<RrReport> {
    share(args.cpu)?;
    ready()?;
    match args.protocol {
        Protocol::Tcp => {
            let mut connection = TcpStream::connect(args.to)
                .with_context(|| format!("cannot connect to {}", args.to))?;
            connection.set_nodelay(true)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            measure(args, |message| {
                connection.write_all(message)?;
                Ok(connection.read_exact(message)?)
            })
        }
        Protocol::Udp => {
            let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.from_port))?;
            client.connect(args.to)?;
            client.set_read_timeout(Some(PATIENCE))?;
            measure(args, |message| {
                client.send(message)?;
                let length = client.recv(message).context("a response was lost")?;
                if length != message.len() {
                    bail!("a response of {length} bytes");
                }
                Ok(())
            })
        }
    }
}

/// Measures the first round trip of new UDP flows.
///
/// # Errors
/// When a datagram is lost.
pub fn first(args: &FirstArgs) -> Result<FirstReport> {
    share(args.cpu)?;
    ready()?;
    let mut message = vec![0; args.size];
    let mut times = Vec::new();
    for _ in 0..args.count {
        // A socket of its own has a port, and with it a flow, of its own.
        let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        client.connect(args.to)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let start = Instant::now();
        client.send(&message)?;
        client.recv(&mut message).context("a response was lost")?;
        times.push(u32::try_from(start.elapsed().as_nanos()).unwrap_or(u32::MAX));
    }
    Ok(FirstReport {
        flows: args.count.into(),
        latency: Latency::of(times).context("--count 0 measures nothing")?,
    })
}

fn measure(
    args: &ClientArgs,
    mut transact: impl FnMut(&mut [u8]) -> Result<()>,
) -> Result<RrReport> {
    let mut message = vec![0; args.size];
    let mut run = |seconds: f64| -> Result<(Vec<u32>, f64)> {
        let length = Duration::from_secs_f64(seconds);
        let mut times = Vec::with_capacity((seconds * 250_000.0) as usize);
        let start = Instant::now();
        let mut before = start;
        while before - start < length {
            transact(&mut message)?;
            let after = Instant::now();
            times.push(u32::try_from((after - before).as_nanos()).unwrap_or(u32::MAX));
            before = after;
        }
        Ok((times, (before - start).as_secs_f64()))
    };
    let (warm_up, _) = run(args.seconds / 10.0)?;
    let (times, seconds) = run(args.seconds)?;
    let measured = times.len();
    Ok(RrReport {
        transactions: measured as u64,
        all_transactions: (measured + warm_up.len()) as u64,
        seconds,
        per_second: measured as f64 / seconds,
        latency: Latency::of(times).context("no transaction was made")?,
    })
}
