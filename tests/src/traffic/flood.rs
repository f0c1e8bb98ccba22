//! Datagrams one way, as fast as one CPU sends them.
//!
//! iperf3 does not serve here: at 64 bytes it spends more on its own timestamps
//! and pacing than a fast path costs, and hides the difference.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{pin_to, ready, socket, told_to_finish};

/// Arguments of the receiver.
#[derive(Debug, clap::Args)]
pub struct SinkArgs {
    /// Port.
    #[arg(long)]
    port: u16,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Arguments of the sender.
#[derive(Debug, clap::Args)]
pub struct FloodArgs {
    /// Address and port of the receiver.
    #[arg(long)]
    to: SocketAddrV4,
    /// Seconds to send.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Bytes of a datagram.
    #[arg(long, default_value_t = 64)]
    size: usize,
    /// Stay on this CPU.
    #[arg(long)]
    cpu: Option<usize>,
}

/// What arrived.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SinkReport {
    /// Datagrams.
    pub received: u64,
    /// Datagrams of another size than the first one.
    pub odd: u64,
}

/// What was sent.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FloodReport {
    /// Datagrams that the kernel took.
    pub sent: u64,
    /// The time it took.
    pub seconds: f64,
}

/// Counts until told.
///
/// # Errors
/// When the socket fails.
pub fn sink(args: &SinkArgs) -> Result<SinkReport> {
    pin_to(args.cpu)?;
    let receiver = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    socket::make_roomy(&receiver)?;
    receiver.set_read_timeout(Some(Duration::from_millis(20)))?;
    let finish = told_to_finish();
    ready()?;
    let mut buffer = [0; 2048];
    let mut first = None;
    let mut report = SinkReport {
        received: 0,
        odd: 0,
    };
    loop {
        match receiver.recv(&mut buffer) {
            Ok(length) => {
                report.received += 1;
                report.odd += u64::from(length != *first.get_or_insert(length));
            }
            // Only an empty queue ends it: what has arrived counts.
            Err(error) if socket::is_timeout(&error) => {
                if finish.load(Ordering::Relaxed) {
                    return Ok(report);
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Sends.
///
/// # Errors
/// When the socket fails, for instance because nobody listens.
pub fn flood(args: &FloodArgs) -> Result<FloodReport> {
    pin_to(args.cpu)?;
    let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket::make_roomy(&sender)?;
    sender.connect(args.to)?;
    let message = vec![0; args.size];
    let length = Duration::from_secs_f64(args.seconds);
    ready()?;
    let start = Instant::now();
    let mut sent = 0;
    loop {
        // The clock costs as much as a packet header: ask it now and then.
        for _ in 0..32 {
            match sender.send(&message) {
                Ok(_) => sent += 1,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => bail!("cannot send: {error}"),
            }
        }
        let elapsed = start.elapsed();
        if elapsed >= length {
            return Ok(FloodReport {
                sent,
                seconds: elapsed.as_secs_f64(),
            });
        }
    }
}
