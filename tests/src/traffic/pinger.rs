//! Numbered datagrams at a steady rate, and their echo: finds every lost one.

use std::{
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{ready, socket, told_to_finish};

/// Number of the datagram and its time of departure.
const HEADER: usize = 16;
/// An echo after more than this is counted as late.
const LATE: Duration = Duration::from_millis(100);
/// How long to wait for the last echoes.
const LINGER: Duration = Duration::from_millis(1000);

/// Arguments of the echo.
#[derive(Debug, clap::Args)]
pub struct EchoArgs {
    /// UDP port.
    #[arg(long, default_value_t = 7)]
    port: u16,
}

/// What the echo saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EchoReport {
    /// Datagrams that arrived; every one was answered.
    pub echoed: u64,
}

/// Arguments of the pinger.
#[derive(Debug, clap::Args)]
pub struct PingArgs {
    /// Address and port of the echo.
    #[arg(long)]
    to: SocketAddrV4,
    /// Datagrams per second.
    #[arg(long, default_value_t = 2000)]
    rate: u32,
    /// Datagrams to send; until told when missing.
    #[arg(long)]
    count: Option<u64>,
    /// Bytes of payload.
    #[arg(long, default_value_t = 64)]
    size: usize,
}

/// What the pinger saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PingReport {
    /// Datagrams sent.
    pub sent: u64,
    /// Different ones that came back.
    pub received: u64,
    /// Those that did not.
    pub lost: u64,
    /// Further copies.
    pub duplicated: u64,
    /// Those that came after one with a higher number.
    pub reordered: u64,
    /// Those that took more than 100 ms.
    pub late: u64,
    /// Longest time without any echo, in milliseconds.
    pub longest_gap_ms: f64,
    /// Median round-trip time in microseconds.
    pub median_us: f64,
    /// Longest round-trip time in microseconds.
    pub longest_us: f64,
    /// Time of sending, in seconds.
    pub seconds: f64,
    /// Number of the first lost one and seconds since the start.
    pub first_lost: Option<(u64, f64)>,
}

/// Runs the echo until told.
///
/// # Errors
/// When the socket fails.
pub fn echo(args: &EchoArgs) -> Result<EchoReport> {
    let echo = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, args.port))?;
    socket::make_roomy(&echo)?;
    echo.set_read_timeout(Some(Duration::from_millis(50)))?;
    let finish = told_to_finish();
    ready()?;
    let mut buffer = [0; 65536];
    let mut echoed = 0;
    while !finish.load(Ordering::Relaxed) {
        match echo.recv_from(&mut buffer) {
            Ok((length, from)) => {
                echo.send_to(&buffer[..length], from)?;
                echoed += 1;
            }
            Err(error) if socket::is_timeout(&error) => {}
            // The client has closed its socket: nothing to do with us.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(EchoReport { echoed })
}

/// Runs the pinger.
///
/// # Errors
/// When the socket fails.
pub fn ping(args: &PingArgs) -> Result<PingReport> {
    ensure!(
        args.size >= HEADER,
        "a numbered datagram has at least {HEADER} bytes"
    );
    let client = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket::make_roomy(&client)?;
    client.connect(args.to)?;
    client.set_read_timeout(Some(Duration::from_millis(50)))?;
    let start = Instant::now();
    let sent = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicBool::new(false));
    let receiver = {
        let (client, sent, ended) = (client.try_clone()?, Arc::clone(&sent), Arc::clone(&ended));
        thread::spawn(move || receive_all(&client, start, &sent, &ended))
    };
    let finish = told_to_finish();
    ready()?;
    let mut payload = vec![0; args.size];
    let mut number = 0;
    while args.count.is_none_or(|count| number < count) && !finish.load(Ordering::Relaxed) {
        let due = start + Duration::from_secs(1).mul_f64(number as f64 / f64::from(args.rate));
        if let Some(early) = due.checked_duration_since(Instant::now()) {
            thread::sleep(early);
        }
        payload[..8].copy_from_slice(&number.to_le_bytes());
        payload[8..16].copy_from_slice(&nanos(start).to_le_bytes());
        match client.send(&payload) {
            Ok(_) => {}
            // An earlier datagram's ICMP answer: what was sent is lost, and counted as that.
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error).context("cannot send"),
        }
        number += 1;
        sent.store(number, Ordering::Release);
    }
    let seconds = start.elapsed().as_secs_f64();
    ended.store(true, Ordering::Release);
    let arrivals = receiver.join().expect("the receiver does not panic")?;
    Ok(arrivals.summary(number, args.rate, seconds))
}

fn nanos(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// Everything about the echoes, in order of arrival.
#[derive(Debug, Default)]
struct Arrivals {
    seen: Vec<bool>,
    received: u64,
    duplicated: u64,
    reordered: u64,
    late: u64,
    highest: Option<u64>,
    longest_gap: Duration,
    trips: Vec<u64>,
}

impl Arrivals {
    fn note(&mut self, number: u64, trip: u64) {
        let index = number as usize;
        if self.seen.len() <= index {
            self.seen.resize(index + 1, false);
        }
        if std::mem::replace(&mut self.seen[index], true) {
            self.duplicated += 1;
            return;
        }
        self.received += 1;
        self.trips.push(trip);
        if u128::from(trip) > LATE.as_nanos() {
            self.late += 1;
        }
        if self.highest.is_some_and(|highest| number < highest) {
            self.reordered += 1;
        } else {
            self.highest = Some(number);
        }
    }

    fn summary(mut self, sent: u64, rate: u32, seconds: f64) -> PingReport {
        self.trips.sort_unstable();
        let trip = |index: usize| self.trips.get(index).map_or(0.0, |ns| *ns as f64 / 1000.0);
        let first_lost = (0..sent)
            .find(|number| !self.seen.get(*number as usize).copied().unwrap_or(false))
            .map(|number| (number, number as f64 / f64::from(rate)));
        PingReport {
            sent,
            received: self.received,
            lost: sent - self.received,
            duplicated: self.duplicated,
            reordered: self.reordered,
            late: self.late,
            longest_gap_ms: self.longest_gap.as_secs_f64() * 1000.0,
            median_us: trip(self.trips.len() / 2),
            longest_us: trip(self.trips.len().saturating_sub(1)),
            seconds,
            first_lost,
        }
    }
}

fn receive_all(
    client: &UdpSocket,
    start: Instant,
    sent: &AtomicU64,
    ended: &AtomicBool,
) -> Result<Arrivals> {
    let mut arrivals = Arrivals::default();
    let mut buffer = [0; 65536];
    let mut last = Instant::now();
    let mut linger_from = None;
    loop {
        if ended.load(Ordering::Acquire) {
            let since: Instant = *linger_from.get_or_insert_with(Instant::now);
            let complete = arrivals.received == sent.load(Ordering::Acquire);
            if complete || since.elapsed() > LINGER {
                return Ok(arrivals);
            }
        }
        match client.recv(&mut buffer) {
            Ok(length) if length >= HEADER => {
                let field = |at: usize| {
                    let mut bytes = [0; 8];
                    bytes.copy_from_slice(&buffer[at..at + 8]);
                    u64::from_le_bytes(bytes)
                };
                let now = Instant::now();
                arrivals.longest_gap = arrivals.longest_gap.max(now - last);
                last = now;
                arrivals.note(field(0), nanos(start).saturating_sub(field(8)));
            }
            Ok(_) => {}
            Err(error) if socket::is_timeout(&error) => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Arrivals;

    #[test]
    fn losses_copies_and_overtaking_are_told_apart() {
        let mut arrivals = Arrivals::default();
        for number in [0, 1, 3, 2, 3, 5] {
            arrivals.note(number, 1000);
        }
        arrivals.note(6, 200_000_000);
        let report = arrivals.summary(8, 2, 4.0);
        assert_eq!((report.received, report.lost), (6, 2));
        assert_eq!(
            (report.duplicated, report.reordered, report.late),
            (1, 1, 1)
        );
        assert_eq!(report.first_lost, Some((4, 2.0)));
    }
}
