//! The load under which nothing may be lost: 2,000 packets a second each way
//! and one TCP stream.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};

use crate::{
    exchange::{self, ECHO_PORT, RunningPing, RunningStream, STREAM_PORT, SlowestSecond},
    pod::Pod,
    traffic::pinger::{EchoReport, PingReport},
};

/// Packets per second in each direction.
pub const RATE: u32 = 2000;

/// Speed of a paced stream in gigabits per second: well below what two cores
/// carry, so that a slow second is the datapath's fault and not that of whatever
/// else runs on this machine.
pub const PACE: f64 = 3.0;

/// Running load between two pods.
#[derive(Debug)]
pub struct Load {
    there: RunningPing,
    back: RunningPing,
    stream: RunningStream,
    start: Instant,
}

/// What came of it.
#[derive(Debug)]
pub struct LoadReport {
    /// Client to server and back.
    pub there: (PingReport, EchoReport),
    /// Server to client and back.
    pub back: (PingReport, EchoReport),
    /// Client to server.
    pub stream: exchange::Stream,
}

impl Load {
    /// Starts all three, the stream at [`PACE`], and lets it come up to speed.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn start(client: &Pod, server: &Pod) -> Result<Self> {
        Self::with_stream(client, server, &format!("--direction up --pace {PACE}"))
    }

    /// The same with a stream as fast as it goes; its speed then says more about
    /// the machine than about the datapath.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at_full_speed(client: &Pod, server: &Pod) -> Result<Self> {
        Self::with_stream(client, server, "--direction up")
    }

    fn with_stream(client: &Pod, server: &Pod, arguments: &str) -> Result<Self> {
        Self::with(client, server, server.address(), arguments)
    }

    /// As [`Self::start`], with the client asking `address`, behind which the
    /// server is reached on the same ports.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at(client: &Pod, server: &Pod, address: Ipv4Addr) -> Result<Self> {
        let arguments = format!("--direction up --pace {PACE}");
        Self::with(client, server, address, &arguments)
    }

    fn with(client: &Pod, server: &Pod, address: Ipv4Addr, arguments: &str) -> Result<Self> {
        let to = |port| (server.namespace(), SocketAddrV4::new(address, port));
        let from = client.namespace();
        let load = Self {
            there: RunningPing::start_at(from, to(ECHO_PORT), &format!("--rate {RATE}"))?,
            back: RunningPing::start(server, client, RATE)?,
            stream: RunningStream::start_at(from, to(STREAM_PORT), arguments)?,
            start: Instant::now(),
        };
        std::thread::sleep(Duration::from_secs(1));
        Ok(load)
    }

    /// Lets it run on for a while.
    pub fn run_for(&self, time: Duration) {
        std::thread::sleep(time);
    }

    /// Stops it; the stream needs some seconds to be judged.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn finish(self) -> Result<LoadReport> {
        let least = Duration::from_secs(3);
        std::thread::sleep(least.saturating_sub(self.start.elapsed()));
        Ok(LoadReport {
            there: self.there.finish().context("client to server")?,
            back: self.back.finish().context("server to client")?,
            stream: self.stream.finish().context("the stream")?,
        })
    }
}

impl LoadReport {
    /// Demands 0 lost, the stream's data intact, and never a second below half speed.
    ///
    /// # Errors
    /// Says what was lost.
    pub fn check(&self) -> Result<()> {
        self.check_nothing_lost()?;
        self.stream.check_never_below_half_speed()
    }

    /// Demands 0 lost and the stream's data intact.
    ///
    /// # Errors
    /// Says what was lost.
    pub fn check_nothing_lost(&self) -> Result<()> {
        exchange::check_nothing_lost(&self.there).context("client to server")?;
        exchange::check_nothing_lost(&self.back).context("server to client")?;
        self.stream.check(1)?;
        ensure!(self.sent() > 0, "nothing was sent");
        Ok(())
    }

    /// Datagrams sent in both directions.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.there.0.sent + self.back.0.sent
    }

    /// A line for the log of a test.
    #[must_use]
    pub fn summary(&self) -> String {
        let received = self.stream.server.received.clone().unwrap_or_default();
        let slowest = exchange::slowest_second(&received.samples).unwrap_or(SlowestSecond {
            share: 0.0,
            from: 0.0,
        });
        format!(
            "{} datagrams, {} lost, longest gap {:.1} ms; stream {:.2} Gbit/s, slowest second {:.0} %, {} segments sent again",
            self.sent(),
            self.there.0.lost + self.back.0.lost,
            self.there.0.longest_gap_ms.max(self.back.0.longest_gap_ms),
            received.gbit_per_second(),
            slowest.share * 100.0,
            self.stream
                .client
                .sent
                .as_ref()
                .map_or(0, |sent| sent.retransmissions),
        )
    }
}
