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

use super::{
    ready, share, socket,
    timing::{AskReport, TimingArgs},
    told_to_finish,
};

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
    #[command(flatten)]
    timing: TimingArgs,
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

/// Arguments of the client that starts a new flow for every request.
#[derive(Debug, clap::Args)]
pub struct FirstArgs {
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    #[command(flatten)]
    timing: TimingArgs,
    /// Bytes of a request and of a response.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
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
pub fn client(args: &ClientArgs) -> Result<AskReport> {
    share(args.cpu)?;
    ready()?;
    let mut message = vec![0; args.size];
    match args.protocol {
        Protocol::Tcp => {
            let mut connection = TcpStream::connect(args.to)
                .with_context(|| format!("cannot connect to {}", args.to))?;
            connection.set_nodelay(true)?;
            connection.set_read_timeout(Some(PATIENCE))?;
            args.timing.measure(|now| {
                connection.write_all(&message)?;
                connection.read_exact(&mut message)?;
                Ok(now)
            })
        }
        Protocol::Udp => {
            let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.from_port))?;
            client.connect(args.to)?;
            client.set_read_timeout(Some(PATIENCE))?;
            args.timing.measure(|now| {
                client.send(&message)?;
                let length = client.recv(&mut message).context("a response was lost")?;
                if length != message.len() {
                    bail!("a response of {length} bytes");
                }
                Ok(now)
            })
        }
    }
}

/// Measures the first round trip of new UDP flows.
///
/// # Errors
/// When a datagram is lost.
pub fn first(args: &FirstArgs) -> Result<AskReport> {
    share(args.cpu)?;
    ready()?;
    let mut message = vec![0; args.size];
    args.timing.measure(|_| {
        // A socket of its own has a port, and with it a flow, of its own.
        let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        client.connect(args.to)?;
        client.set_read_timeout(Some(PATIENCE))?;
        let start = Instant::now();
        client.send(&message)?;
        client.recv(&mut message).context("a response was lost")?;
        Ok(start)
    })
}
