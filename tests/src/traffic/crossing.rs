//! Connections that both ends open: each sends a SYN to the other's port, and nobody listens.

use std::{
    net::SocketAddrV4,
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::{ready, socket};

/// Arguments; both ends get the same ones, mirrored.
#[derive(Debug, clap::Args)]
pub struct CrossArgs {
    /// Own address and the port of the first connection.
    #[arg(long)]
    from: SocketAddrV4,
    /// The other end of the first connection.
    #[arg(long)]
    to: SocketAddrV4,
    /// How many.
    #[arg(long, default_value_t = 10)]
    count: u16,
    /// The other end's port counts up from one connection to the next, instead of ours.
    #[arg(long)]
    theirs: bool,
    /// Seconds between two.
    #[arg(long, default_value_t = 0.01)]
    pause: f64,
}

/// What became of them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CrossReport {
    /// Established at this end.
    pub established: u64,
    /// Were not, within five seconds.
    pub failed: u64,
    /// The slowest that was, in milliseconds from its first SYN.
    pub slowest_ms: f64,
}

/// Opens them.
///
/// # Errors
/// When a socket fails otherwise than by not being connected.
pub fn cross(args: &CrossArgs) -> Result<CrossReport> {
    const PATIENCE: Duration = Duration::from_secs(5);
    ready()?;
    let mut open = Vec::new();
    for number in 0..args.count {
        let (mut from, mut to) = (args.from, args.to);
        if args.theirs {
            to.set_port(to.port() + number);
        } else {
            from.set_port(from.port() + number);
        }
        let one = socket::tcp_from(from)?;
        one.set_nonblocking(true)?;
        let begun = Instant::now();
        match one.connect(&to.into()) {
            Ok(()) => open.push((one, begun)),
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {
                open.push((one, begun));
            }
            Err(error) => return Err(error.into()),
        }
        thread::sleep(Duration::from_secs_f64(args.pause));
    }
    let mut report = CrossReport::default();
    let deadline = Instant::now() + PATIENCE;
    let mut kept = Vec::new();
    while !open.is_empty() && Instant::now() < deadline {
        let mut waiting = Vec::new();
        for (one, begun) in open {
            let mut polled = [PollFd::new(one.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut polled, PollTimeout::ZERO)? == 0 {
                waiting.push((one, begun));
            } else if one.take_error()?.is_none() {
                report.established += 1;
                let took = begun.elapsed().as_secs_f64() * 1000.0;
                report.slowest_ms = report.slowest_ms.max(took);
                kept.push(one);
            } else {
                report.failed += 1;
            }
        }
        open = waiting;
        thread::sleep(Duration::from_millis(1));
    }
    report.failed += open.len() as u64;
    Ok(report)
}
