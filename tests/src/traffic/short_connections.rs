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
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{
    ready, share,
    timing::{AskReport, TimingArgs},
    told_to_finish,
};

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
    #[command(flatten)]
    timing: TimingArgs,
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
pub fn client(args: &ClientArgs) -> Result<AskReport> {
    share(args.cpu)?;
    ready()?;
    let mut message = vec![0; args.size];
    let mut made = 0;
    args.timing.measure(|now| {
        connect_and_ask(args.to, &mut message)
            .with_context(|| format!("connection {made} to {}", args.to))?;
        made += 1;
        Ok(now)
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
