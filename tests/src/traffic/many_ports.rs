//! Short connections to many ports of one server: as many classes as ports.
//!
//! One process serves them all with one epoll. A connection is a few bytes each way; the client's
//! FIN comes first.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::{epoll, ready, told_to_finish};

const MESSAGE: usize = 16;
/// How long either end waits for the other.
const PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// First port.
    #[arg(long, default_value_t = 20_000)]
    first: u16,
    /// How many.
    #[arg(long, default_value_t = 5_000)]
    ports: u16,
}

/// Arguments of the client.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// Address and first port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// How many ports, asked in turn.
    #[arg(long, default_value_t = 5_000)]
    ports: u16,
    /// Connections in all.
    #[arg(long)]
    count: u64,
    /// How many at a time.
    #[arg(long, default_value_t = 4)]
    at_once: u64,
    /// Connections a second, at most.
    #[arg(long, default_value_t = 10_000.0)]
    rate: f64,
}

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PortsReport {
    /// Connections that went as meant.
    pub ended: u64,
    /// And that did not.
    pub failed: u64,
    /// Time of it all.
    pub seconds: f64,
}

/// A connection that the server has accepted.
#[derive(Debug)]
struct Accepted {
    stream: TcpStream,
    /// Its message has come and was answered.
    is_answered: bool,
}

/// Serves all connections at the same time, until told.
///
/// # Errors
/// When a port cannot be had.
pub fn serve(args: &ServeArgs) -> Result<PortsReport> {
    epoll::allow_many_sockets()?;
    let epoll = epoll::Epoll::new()?;
    let listeners = (0..args.ports)
        .map(|index| {
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.first + index))?;
            listener.set_nonblocking(true)?;
            epoll.add(&listener, u64::from(index))?;
            Ok(listener)
        })
        .collect::<io::Result<Vec<_>>>()?;
    let finish = told_to_finish();
    let start = Instant::now();
    ready()?;
    let mut report = PortsReport::default();
    let mut connections: HashMap<u64, Accepted> = HashMap::new();
    let mut next = listeners.len() as u64;
    let mut readable = Vec::new();
    while !finish.load(Ordering::Relaxed) {
        epoll.wait(Duration::from_millis(20), &mut readable)?;
        for number in readable.drain(..) {
            if let Some(listener) = listeners.get(number as usize) {
                while let Ok((stream, _)) = listener.accept() {
                    epoll.add(&stream, next)?;
                    let accepted = Accepted {
                        stream,
                        is_answered: false,
                    };
                    connections.insert(next, accepted);
                    next += 1;
                }
            } else if let Some(connection) = connections.get_mut(&number) {
                match go_on(connection) {
                    Ok(false) => continue,
                    Ok(true) => report.ended += 1,
                    Err(_) => report.failed += 1,
                }
                connections.remove(&number);
            }
        }
    }
    report.seconds = start.elapsed().as_secs_f64();
    Ok(report)
}

/// Takes what has come: a read waits for nothing. `true` at the end.
fn go_on(connection: &mut Accepted) -> io::Result<bool> {
    let mut message = [0; MESSAGE];
    let length = connection.stream.read(&mut message)?;
    match (length, connection.is_answered) {
        // A message of one write comes as one segment.
        (MESSAGE, false) => {
            connection.stream.write_all(&message)?;
            connection.is_answered = true;
            Ok(false)
        }
        (0, true) => Ok(true),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Connects to one port after the other at a steady rate.
///
/// # Errors
/// When threads cannot be started; what becomes of connections is a result.
pub fn client(args: &ClientArgs) -> Result<PortsReport> {
    ready()?;
    let start = Instant::now();
    let (next, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= args.count {
                return;
            }
            let due = Duration::from_secs_f64(number as f64 / args.rate);
            thread::sleep(due.saturating_sub(start.elapsed()));
            let port = args.to.port() + (number % u64::from(args.ports)) as u16;
            if ask(SocketAddrV4::new(*args.to.ip(), port)).is_err() {
                failed.fetch_add(1, Ordering::Relaxed);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 0..args.at_once {
            scope.spawn(work);
        }
    });
    let failed = failed.into_inner();
    Ok(PortsReport {
        ended: args.count - failed,
        failed,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn ask(to: SocketAddrV4) -> io::Result<()> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // The one for writing is that for connecting as well.
    socket.set_write_timeout(Some(PATIENCE))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(&to.into())?;
    let mut connection = TcpStream::from(socket);
    let mut message = [7; MESSAGE];
    connection.write_all(&message)?;
    connection.read_exact(&mut message)?;
    connection.shutdown(Shutdown::Write)?;
    match connection.read(&mut message)? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
