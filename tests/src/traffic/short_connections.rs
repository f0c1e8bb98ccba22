//! A connection, a request, its response, the end, again: what short
//! connections cost.
//!
//! The client says that it is done and then waits for the server's end, so that
//! no socket is closed with a packet still to come: with the few TIME_WAIT
//! buckets that a long run needs, such a packet would be answered by a reset.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{latency::Latency, ready, share, told_to_finish};

/// How long a lost packet is waited for.
const PATIENCE: Duration = Duration::from_secs(5);

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// Port.
    #[arg(long)]
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
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// Seconds to measure, after a tenth of it to warm up.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes of a request and of a response.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What the server saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServeReport {
    /// Connections served to their end.
    pub served: u64,
}

/// What the client measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ConnectionsReport {
    /// Connections in all, warming up included.
    pub all: u64,
    /// Connections per second.
    pub per_second: f64,
    /// From the first packet of a connection to its end.
    pub latency: Latency,
}

/// Serves one connection after the other, until told.
///
/// # Errors
/// When a socket fails.
pub fn serve(args: &ServeArgs) -> Result<ServeReport> {
    share(args.cpu)?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    let finish = told_to_finish();
    ready()?;
    // Blocks in accept; the one connection made here ends the wait.
    let waker = SocketAddrV4::new(Ipv4Addr::LOCALHOST, args.port);
    let watched = finish.clone();
    thread::spawn(move || {
        while !watched.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(10));
        }
        drop(TcpStream::connect(waker));
    });
    let mut message = vec![0; args.size];
    let mut served = 0;
    loop {
        let (mut connection, _) = listener.accept()?;
        if finish.load(Ordering::Relaxed) {
            return Ok(ServeReport { served });
        }
        connection.set_read_timeout(Some(PATIENCE))?;
        connection.read_exact(&mut message)?;
        connection.write_all(&message)?;
        ensure!(connection.read(&mut message)? == 0, "more than a request");
        served += 1;
    }
}

/// Measures.
///
/// # Errors
/// When a connection fails.
pub fn client(args: &ClientArgs) -> Result<ConnectionsReport> {
    share(args.cpu)?;
    ready()?;
    let mut message = vec![0; args.size];
    let mut run = |seconds: f64| -> Result<(Vec<u32>, f64)> {
        let length = Duration::from_secs_f64(seconds);
        let mut times = Vec::with_capacity((seconds * 60_000.0) as usize);
        let start = Instant::now();
        let mut before = start;
        while before - start < length {
            connect_and_ask(args.to, &mut message)
                .with_context(|| format!("connection {} to {}", times.len(), args.to))?;
            let after = Instant::now();
            times.push(u32::try_from((after - before).as_nanos()).unwrap_or(u32::MAX));
            before = after;
        }
        Ok((times, (before - start).as_secs_f64()))
    };
    let (warm_up, _) = run(args.seconds / 10.0)?;
    let (times, seconds) = run(args.seconds)?;
    let measured = times.len();
    Ok(ConnectionsReport {
        all: (measured + warm_up.len()) as u64,
        per_second: measured as f64 / seconds,
        latency: Latency::of(times).context("no connection was made")?,
    })
}

fn connect_and_ask(to: SocketAddrV4, message: &mut [u8]) -> Result<()> {
    let mut connection = TcpStream::connect(to)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.write_all(message)?;
    connection.read_exact(message)?;
    connection.shutdown(Shutdown::Write)?;
    match connection.read(message) {
        Ok(0) => Ok(()),
        Ok(_) => Err(std::io::Error::from(ErrorKind::InvalidData).into()),
        Err(error) => Err(error.into()),
    }
}
