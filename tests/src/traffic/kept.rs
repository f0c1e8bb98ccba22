//! Connections that are kept open while something odd happens to them, and used again afterwards.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd,
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{ready, socket, socket::is_timeout, told_to_finish};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of the first question and of its answer.
const FIRST: usize = 64;

/// `TCP_REPAIR` off without a window probe.
const REPAIR_OFF: libc::c_int = -1;
/// `TCP_RECV_QUEUE` and `TCP_SEND_QUEUE`.
const QUEUES: [libc::c_int; 2] = [1, 2];

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// TCP port.
    #[arg(long)]
    port: u16,
}

/// Arguments of the client.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// How many connections.
    #[arg(long, default_value_t = 10)]
    count: u32,
    /// Seconds to wait after the first question.
    #[arg(long, default_value_t = 0.0)]
    age: f64,
    /// Bytes of a question after that, and of its answer.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Seconds to go on asking when told to finish; at least once.
    #[arg(long, default_value_t = 0.0)]
    seconds: f64,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Port of the client.
    pub port: u16,
    /// Number of the client's next byte.
    pub client_next: u32,
    /// Number of the server's next byte.
    pub server_next: u32,
}

/// All of them, before anything happens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptReport {
    /// In the order of their opening.
    pub connections: Vec<Kept>,
}

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AliveReport {
    /// Answered once more, and ended in order.
    pub alive: u32,
    /// Were reset.
    pub reset: u32,
    /// Gave no answer.
    pub silent: u32,
    /// Answers after being told, from all together.
    pub answers: u64,
    /// Segments that the clients had to send again.
    pub retransmitted: u32,
    /// The slowest answer in milliseconds.
    pub slowest_ms: f64,
}

/// Sends everything back, until told.
///
/// # Errors
/// When the listener fails.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    let finish = told_to_finish();
    ready()?;
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            thread::spawn(move || echo(connection));
        }
    });
    while !finish.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

fn echo(mut connection: TcpStream) -> Option<()> {
    connection.set_nodelay(true).ok()?;
    let mut buffer = [0; 4096];
    loop {
        match connection.read(&mut buffer).ok()? {
            0 => return None,
            length => connection.write_all(&buffer[..length]).ok()?,
        }
    }
}

/// Opens, asks once, says what there is; asks once more and ends when told to finish.
///
/// # Errors
/// When a connection does not even open.
pub fn client(args: &ClientArgs) -> Result<AliveReport> {
    let told = told_to_finish();
    ready()?;
    let mut connections = Vec::new();
    for _ in 0..args.count {
        let mut connection = TcpStream::connect_timeout(&args.to.into(), PATIENCE)?;
        connection.set_nodelay(true)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        ask(&mut connection, FIRST)?;
        connections.push(connection);
    }
    thread::sleep(Duration::from_secs_f64(args.age));
    let connections_now = connections.iter().map(kept).collect::<Result<Vec<_>>>()?;
    super::report(&KeptReport {
        connections: connections_now,
    })?;
    while !told.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(1));
    }
    let mut report = AliveReport::default();
    for mut connection in connections {
        let ended = go_on(args, &mut connection, &mut report).and_then(|()| end(&mut connection));
        report.retransmitted += socket::retransmissions(&connection)?;
        match ended {
            Ok(()) => report.alive += 1,
            Err(error) if is_timeout(&error) => report.silent += 1,
            Err(_) => report.reset += 1,
        }
    }
    Ok(report)
}

fn go_on(
    args: &ClientArgs,
    connection: &mut TcpStream,
    report: &mut AliveReport,
) -> std::io::Result<()> {
    let begun = Instant::now();
    loop {
        let asked = Instant::now();
        let answered = ask(connection, args.size);
        let took = asked.elapsed().as_secs_f64() * 1000.0;
        report.slowest_ms = report.slowest_ms.max(took);
        answered?;
        report.answers += 1;
        if begun.elapsed().as_secs_f64() >= args.seconds {
            return Ok(());
        }
    }
}

fn ask(connection: &mut TcpStream, size: usize) -> std::io::Result<()> {
    let mut message = vec![7; size];
    connection.write_all(&message)?;
    connection.read_exact(&mut message)
}

fn end(connection: &mut TcpStream) -> std::io::Result<()> {
    connection.shutdown(Shutdown::Write)?;
    match connection.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(ErrorKind::InvalidData.into()),
    }
}

/// The numbers are those of a socket that is taken apart; it is put together again at once.
fn kept(connection: &TcpStream) -> Result<Kept> {
    let set = |name, value| socket::set_option(connection, libc::IPPROTO_TCP, name, value);
    set(libc::TCP_REPAIR, 1).context("cannot read sequence numbers")?;
    let mut next = [0_u32; 2];
    for (queue, number) in QUEUES.into_iter().zip(&mut next) {
        set(libc::TCP_REPAIR_QUEUE, queue)?;
        let mut length = size_of::<u32>() as libc::socklen_t;
        // SAFETY: both pointers refer to live values; the kernel writes four bytes.
        let result = unsafe {
            libc::getsockopt(
                connection.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_QUEUE_SEQ,
                (&raw mut *number).cast(),
                &raw mut length,
            )
        };
        nix::errno::Errno::result(result)?;
    }
    set(libc::TCP_REPAIR, REPAIR_OFF)?;
    Ok(Kept {
        port: connection.local_addr()?.port(),
        server_next: next[0],
        client_next: next[1],
    })
}
