//! Many TCP connections, each of which ends in a chosen way, data checked.
//!
//! A client worker runs one connection after the other; the server has a
//! thread for each. The first bytes tell the server what to do (`Plan`).

mod plan;
mod tally;

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};
use socket2::SockRef;

use super::{epoll, pattern, pin_to, ready, socket, socket::is_timeout, told_to_finish};

pub use self::{plan::Ending, tally::ConnectionsReport};
use self::{
    plan::Plan,
    tally::{Tally, corrupt},
};

/// Stack of a connection's thread; there may be thousands.
const STACK: usize = 128 * 1024;
/// Bytes per system call.
const PIECE: usize = 16 * 1024;
/// How far ahead a simultaneous close is arranged.
const ARRANGED: Duration = Duration::from_millis(4);

/// Arguments of the server.
#[derive(Debug, clap::Args)]
pub struct ServeArgs {
    /// TCP port.
    #[arg(long, default_value_t = 6200)]
    port: u16,
    /// Seconds after which a silent client is given up.
    #[arg(long, default_value_t = 60.0)]
    patience: f64,
    /// CPU to stay on.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Arguments of the client.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// Address and port of the server.
    #[arg(long)]
    to: SocketAddrV4,
    /// Connections in all.
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// How each ends.
    #[arg(long, value_enum)]
    ending: Ending,
    /// How many exist at a time.
    #[arg(long, default_value_t = 16)]
    at_once: u64,
    /// Requests and responses before the end.
    #[arg(long, default_value_t = 8)]
    exchanges: u32,
    /// Bytes of each request.
    #[arg(long, default_value_t = 512)]
    size: u32,
    /// Bytes of each response; as many when missing.
    #[arg(long)]
    response: Option<u32>,
    /// Source port of the first connection; each further one has the next. By default the kernel
    /// chooses, and now and then a connection has the ports of one that ended.
    #[arg(long)]
    first_port: Option<u16>,
    /// Seconds of idleness before the last exchange.
    #[arg(long, default_value_t = 0.0)]
    idle: f64,
    /// Seconds that connecting and each answer may take.
    #[arg(long, default_value_t = 10.0)]
    patience: f64,
    /// CPU to stay on.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Accepts and does what clients ask, until told.
///
/// # Errors
/// When the listener fails.
pub fn serve(args: &ServeArgs) -> Result<ConnectionsReport> {
    // Threads stay where the one that starts them is.
    pin_to(args.cpu)?;
    epoll::allow_many_sockets()?;
    let listener = socket::tcp_listener(args.port)?;
    let epoll = epoll::Epoll::new()?;
    epoll.add(&listener, 0)?;
    let finish = told_to_finish();
    let (start, patience) = (Instant::now(), Duration::from_secs_f64(args.patience));
    ready()?;
    let tally = Arc::new(Tally::default());
    let mut readable = Vec::new();
    while !finish.load(Ordering::Relaxed) {
        epoll.wait(Duration::from_millis(20), &mut readable)?;
        while let Ok((connection, _)) = listener.accept() {
            Tally::count(&tally.begun);
            Tally::count(&tally.established);
            let tally = Arc::clone(&tally);
            thread::Builder::new().stack_size(STACK).spawn(move || {
                tally.note(serve_one(connection, patience, &tally));
            })?;
        }
    }
    // Those under way have their patience, and a moment, to come to an end.
    let deadline = Instant::now() + patience + Duration::from_secs(3);
    let unfinished = || {
        let report = tally.report(start);
        report.established > report.ended + report.troubles()
    };
    while unfinished() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    Ok(tally.report(start))
}

fn serve_one(mut connection: TcpStream, patience: Duration, tally: &Tally) -> io::Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    let mut first = [0; Plan::LENGTH];
    connection.read_exact(&mut first)?;
    let plan = Plan::decode(first)?;
    for number in 0..plan.exchanges {
        receive(&mut connection, plan.seed_up(number), plan.size, tally)?;
        send(&mut connection, plan.seed_down(number), plan.response)?;
    }
    match plan.ending {
        Ending::ClientFin => expect_end(&mut connection),
        Ending::ServerFin => {
            connection.shutdown(Shutdown::Write)?;
            expect_end(&mut connection)
        }
        Ending::ClientRst => match connection.read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(corrupt("there was to be a reset")),
        },
        Ending::ServerRst => close_with_reset(connection),
        Ending::HalfClose => {
            expect_end(&mut connection)?;
            send(
                &mut connection,
                plan.seed_down(plan.exchanges),
                plan.response,
            )
        }
        Ending::Simultaneous => {
            let at = monotonic()? + ARRANGED;
            connection.write_all(&(at.as_nanos() as u64).to_le_bytes())?;
            close_at(&mut connection, at)
        }
        Ending::Silent => match connection.read(&mut [0]) {
            // Given up: our own FIN goes where nobody answers.
            Err(error) if is_timeout(&error) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(corrupt("there was to be silence")),
        },
    }
}

/// Connects `--count` times, or until told, and ends each connection as asked.
///
/// # Errors
/// When threads cannot be started; what becomes of connections is a result.
pub fn client(args: &ClientArgs) -> Result<ConnectionsReport> {
    pin_to(args.cpu)?;
    epoll::allow_many_sockets()?;
    let finish = told_to_finish();
    let start = Instant::now();
    ready()?;
    let tally = Tally::default();
    let held = Mutex::new(Vec::new());
    let next = AtomicU64::new(0);
    thread::scope(|scope| -> Result<()> {
        for _ in 0..args.at_once.min(args.count) {
            thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, || {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= args.count || finish.load(Ordering::Relaxed) {
                            break;
                        }
                        run_one(args, number, &tally, &held);
                    }
                })?;
        }
        Ok(())
    })?;
    let report = tally.report(start);
    if args.ending == Ending::Silent {
        // Says how far it is, then stays: what follows is up to the scenario.
        println!("{}", serde_json::to_string(&report)?);
        while !finish.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(10));
        }
    }
    Ok(report)
}

/// Connects from the port of connection `number`.
fn connect(args: &ClientArgs, number: u64) -> io::Result<TcpStream> {
    let patience = Duration::from_secs_f64(args.patience);
    let Some(first) = args.first_port else {
        return TcpStream::connect_timeout(&args.to.into(), patience);
    };
    let port = u16::try_from(u64::from(first) + number).map_err(io::Error::other)?;
    let socket = socket::tcp_from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    socket.connect_timeout(&args.to.into(), patience)?;
    Ok(socket.into())
}

fn run_one(args: &ClientArgs, number: u64, tally: &Tally, held: &Mutex<Vec<TcpStream>>) {
    Tally::count(&tally.begun);
    let connection = match connect(args, number) {
        Ok(connection) => connection,
        Err(error) => {
            Tally::count(&tally.failed);
            tally.remember(&error);
            return;
        }
    };
    Tally::count(&tally.established);
    tally.note(talk(args, connection, tally, held));
}

fn talk(
    args: &ClientArgs,
    mut connection: TcpStream,
    tally: &Tally,
    held: &Mutex<Vec<TcpStream>>,
) -> io::Result<()> {
    let patience = Duration::from_secs_f64(args.patience);
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(patience))?;
    connection.set_write_timeout(Some(patience))?;
    let port = connection.local_addr()?.port();
    let plan = Plan {
        ending: args.ending,
        exchanges: args.exchanges,
        size: args.size,
        response: args.response.unwrap_or(args.size),
        seed: u64::from(port) << 48 | u64::from(std::process::id()),
    };
    connection.write_all(&plan.encode())?;
    for number in 0..plan.exchanges {
        if number + 1 == plan.exchanges {
            thread::sleep(Duration::from_secs_f64(args.idle));
        }
        send(&mut connection, plan.seed_up(number), plan.size)?;
        receive(
            &mut connection,
            plan.seed_down(number),
            plan.response,
            tally,
        )?;
    }
    match plan.ending {
        Ending::ClientFin => {
            connection.shutdown(Shutdown::Write)?;
            expect_end(&mut connection)
        }
        Ending::ServerFin => expect_end(&mut connection),
        Ending::ClientRst => close_with_reset(connection),
        Ending::ServerRst => match connection.read(&mut [0]) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(corrupt("there was to be a reset")),
        },
        Ending::HalfClose => {
            connection.shutdown(Shutdown::Write)?;
            let seed = plan.seed_down(plan.exchanges);
            receive(&mut connection, seed, plan.response, tally)?;
            expect_end(&mut connection)
        }
        Ending::Simultaneous => {
            let mut at = [0; 8];
            connection.read_exact(&mut at)?;
            close_at(
                &mut connection,
                Duration::from_nanos(u64::from_le_bytes(at)),
            )
        }
        Ending::Silent => {
            held.lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .push(connection);
            Ok(())
        }
    }
}

fn send(connection: &mut TcpStream, seed: u64, size: u32) -> io::Result<()> {
    let size = size as usize;
    let mut piece = vec![0; PIECE.min(size.next_multiple_of(8))];
    let mut done = 0;
    while done < size {
        let length = piece.len().min(size - done);
        pattern::fill(&mut piece[..length], seed, done as u64);
        connection.write_all(&piece[..length])?;
        done += length;
    }
    Ok(())
}

fn receive(connection: &mut TcpStream, seed: u64, size: u32, tally: &Tally) -> io::Result<()> {
    let size = size as usize;
    let mut piece = vec![0; PIECE.min(size)];
    let mut wanted = vec![0; PIECE];
    let mut done = 0;
    while done < size {
        let length = piece.len().min(size - done);
        connection.read_exact(&mut piece[..length])?;
        pattern::fill(&mut wanted[..length], seed, done as u64);
        if piece[..length] != wanted[..length] {
            return Err(corrupt("wrong data"));
        }
        done += length;
    }
    tally.bytes.fetch_add(size as u64, Ordering::Relaxed);
    Ok(())
}

fn expect_end(connection: &mut TcpStream) -> io::Result<()> {
    match connection.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(corrupt("more data than was sent")),
    }
}

fn close_with_reset(connection: TcpStream) -> io::Result<()> {
    SockRef::from(&connection).set_linger(Some(Duration::ZERO))?;
    drop(connection);
    Ok(())
}

fn close_at(connection: &mut TcpStream, at: Duration) -> io::Result<()> {
    thread::sleep(at.saturating_sub(monotonic()?));
    connection.shutdown(Shutdown::Write)?;
    expect_end(connection)
}

/// The clock that all namespaces of this machine share.
fn monotonic() -> io::Result<Duration> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?))
}
