//! The sentences of a scenario: what one pod sends another, and what came of it.
//!
//! Every verb runs its tools to their end and checks the data; what is left
//! to the scenario is which path was taken and what the headers said.

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context, Result, anyhow, ensure};

use crate::{
    ends::Ends,
    namespace::Namespace,
    paths,
    pod::Pod,
    task::Task,
    traffic::{
        datagrams::{ReceiveReport, SendReport},
        pinger::{EchoReport, PingReport},
        request_response::{Protocol, ServeReport},
        route::RouteReport,
        stream::StreamReport,
        timing::AskReport,
    },
    wait,
};

/// Ports of the tools' servers.
pub const ECHO_PORT: u16 = 7;
/// `stream-serve`.
pub const STREAM_PORT: u16 = 5000;
/// `udp-receive`.
pub const RECEIVE_PORT: u16 = 9000;
/// `rr-serve`.
pub const RR_PORT: u16 = 6000;

/// Both ends of one TCP stream.
#[derive(Debug, Clone)]
pub struct Stream {
    /// The end that connected.
    pub client: StreamReport,
    /// The end that accepted.
    pub server: StreamReport,
}

impl Stream {
    /// Demands that everything arrived as it was sent, and at least `bytes` each way that was used.
    ///
    /// # Errors
    /// When a byte is missing or wrong.
    pub fn check(&self, bytes: u64) -> Result<()> {
        let ways = [
            ("up", &self.client.sent, &self.server.received),
            ("down", &self.server.sent, &self.client.received),
        ];
        let mut used = 0;
        for (name, sent, received) in ways {
            let (Some(sent), Some(received)) = (sent, received) else {
                continue;
            };
            used += 1;
            ensure!(
                received.first_error.is_none(),
                "{name}: wrong data at byte {:?}",
                received.first_error
            );
            ensure!(
                sent.bytes == received.bytes && sent.checksum == received.checksum,
                "{name}: sent {} bytes with checksum {:#x}, received {} with {:#x}",
                sent.bytes,
                sent.checksum,
                received.bytes,
                received.checksum
            );
            ensure!(
                received.bytes >= bytes,
                "{name}: {} bytes instead of {bytes}",
                received.bytes
            );
        }
        ensure!(used > 0, "no data was sent in either direction");
        Ok(())
    }

    /// Demands that within no second the receiver got less than half of the stream's own speed.
    ///
    /// # Errors
    /// Names the second and what arrived in it.
    pub fn check_never_below_half_speed(&self) -> Result<()> {
        for half in [&self.server.received, &self.client.received]
            .into_iter()
            .flatten()
        {
            let slowest = slowest_second(&half.samples)?;
            ensure!(
                slowest.share >= 0.5,
                "the stream fell to {:.0} % of its speed ({:.2} Gbit/s) in the second from {:.1} s on",
                slowest.share * 100.0,
                half.gbit_per_second(),
                slowest.from
            );
        }
        Ok(())
    }
}

/// The second in which least arrived.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SlowestSecond {
    /// Relative to the median of all seconds.
    pub share: f64,
    /// Its start, in seconds.
    pub from: f64,
}

/// Finds it among samples of 100 ms; the start and the incomplete end do not count.
///
/// # Errors
/// When there are too few samples to say anything.
pub fn slowest_second(samples: &[u64]) -> Result<SlowestSecond> {
    const SECOND: usize = 10;
    const START: usize = 5;
    ensure!(
        samples.len() > START + SECOND + 1,
        "{} samples are too few",
        samples.len()
    );
    let steady = &samples[START..samples.len() - 1];
    let seconds: Vec<u64> = steady
        .windows(SECOND)
        .map(|window| window.iter().sum())
        .collect();
    let mut sorted = seconds.clone();
    sorted.sort_unstable();
    let median = sorted[sorted.len() / 2] as f64;
    let (index, least) = seconds
        .iter()
        .enumerate()
        .min_by_key(|(_, bytes)| **bytes)
        .expect("there is a window");
    Ok(SlowestSecond {
        share: *least as f64 / median,
        from: (START + index) as f64 / 10.0,
    })
}

/// A pod's server of that port, where it is and as a client addresses it.
fn at(to: &Pod, port: u16) -> (&Namespace, SocketAddrV4) {
    (to.namespace(), to.at(port))
}

/// A stream of `arguments` (as of `lab stream`) that runs until told or to its bound.
#[derive(Debug)]
pub struct RunningStream(Ends);

impl RunningStream {
    /// Connects.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn start(from: &Pod, to: &Pod, arguments: &str) -> Result<Self> {
        Self::start_at(from.namespace(), at(to, STREAM_PORT), arguments)
    }

    /// Connects to `target`, behind which the server in `to` is reached at the same port.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at(
        from: &Namespace,
        to: (&Namespace, SocketAddrV4),
        arguments: &str,
    ) -> Result<Self> {
        let ends = Ends::start(from, to, "stream-serve", &format!("stream {arguments}"))?;
        Ok(Self(ends))
    }

    /// As [`Self::start_at`], with both ends on the first CPU. So is what the kernel does with
    /// their packets, and nothing but a change of the path can put one before another.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_on_one_cpu(
        from: &Namespace,
        to: (&Namespace, SocketAddrV4),
        arguments: &str,
    ) -> Result<Self> {
        let ask = format!("stream {arguments} --cpu 0");
        Ok(Self(Ends::start(from, to, "stream-serve --cpu 0", &ask)?))
    }

    /// Waits for the bound.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn result(self) -> Result<Stream> {
        Ok(Stream {
            client: self.0.client.result()?,
            server: self.0.server.result()?,
        })
    }

    /// Tells the client to end.
    ///
    /// # Errors
    /// When the connection broke.
    pub fn finish(self) -> Result<Stream> {
        Ok(Stream {
            client: self.0.client.finish()?,
            server: self.0.server.result()?,
        })
    }
}

/// Sends `bytes` in the direction(s) `direction` (`up`, `down`, `both`) and checks them.
///
/// # Errors
/// When a byte is missing or wrong.
pub fn stream(from: &Pod, to: &Pod, direction: &str, bytes: u64) -> Result<Stream> {
    let arguments = format!("--direction {direction} --bytes {bytes}");
    let result = RunningStream::start(from, to, &arguments)?
        .result()
        .and_then(|stream| stream.check(bytes).map(|()| stream));
    explained(result, from, to)
}

/// Numbered datagrams under way to an echo and back.
#[derive(Debug)]
pub struct RunningPing(Ends);

impl RunningPing {
    /// Starts `rate` datagrams a second, until told.
    ///
    /// # Errors
    /// When a tool does not start.
    pub fn start(from: &Pod, to: &Pod, rate: u32) -> Result<Self> {
        Self::with(from, to, &format!("--rate {rate}"))
    }

    fn with(from: &Pod, to: &Pod, arguments: &str) -> Result<Self> {
        Self::start_at(from.namespace(), at(to, ECHO_PORT), arguments)
    }

    /// Sends with `arguments` of `lab udp-ping` to `target`, behind which the
    /// echo in `to` is reached at the same port.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_at(
        from: &Namespace,
        to: (&Namespace, SocketAddrV4),
        arguments: &str,
    ) -> Result<Self> {
        let ends = Ends::start(from, to, "udp-echo", &format!("udp-ping {arguments}"))?;
        Ok(Self(ends))
    }

    /// Waits until `--count` datagrams are sent and the last echoes are there.
    ///
    /// # Errors
    /// When a tool failed.
    pub fn result(self) -> Result<(PingReport, EchoReport)> {
        self.0.result()
    }

    /// Stops sending, waits for the last echoes, and gives both counts.
    ///
    /// # Errors
    /// When a tool failed.
    pub fn finish(self) -> Result<(PingReport, EchoReport)> {
        self.0.finish()
    }
}

/// Demands that every datagram came back, once.
///
/// # Errors
/// Says how many did not and when the first one was lost.
pub fn check_nothing_lost((ping, echo): &(PingReport, EchoReport)) -> Result<()> {
    ensure!(
        ping.lost == 0 && ping.duplicated == 0 && echo.echoed == ping.sent,
        "of {} datagrams {} got there and {} came back ({} twice); first lost: {:?} (number, second)",
        ping.sent,
        echo.echoed,
        ping.received,
        ping.duplicated,
        ping.first_lost
    );
    Ok(())
}

/// Adds both nodes' counters to a failure: they tell where packets stayed.
fn explained<T>(result: Result<T>, from: &Pod, to: &Pod) -> Result<T> {
    result.with_context(|| {
        format!(
            "{} → {}\n{}\n{}",
            from.address(),
            to.address(),
            paths::describe(from.node()),
            paths::describe(to.node())
        )
    })
}

/// `count` datagrams of 64 bytes to an echo and back, none of which may be lost.
///
/// # Errors
/// When one is.
pub fn udp_round_trips(from: &Pod, to: &Pod, count: u64) -> Result<PingReport> {
    let ping = RunningPing::with(from, to, &format!("--rate 5000 --count {count}"))?;
    let reports = ping.result()?;
    explained(check_nothing_lost(&reports), from, to)?;
    Ok(reports.0)
}

/// Datagrams of one way: what was sent, and how it arrived.
#[derive(Debug, Clone)]
pub struct Datagrams {
    /// The sender's view.
    pub sent: SendReport,
    /// The receiver's.
    pub received: ReceiveReport,
}

/// Sends with `arguments` of `lab udp-send`; what arrives may be nothing.
///
/// # Errors
/// When a tool failed.
pub fn try_datagrams(from: &Pod, to: &Pod, arguments: &str) -> Result<Datagrams> {
    let receiver = to.tool(&format!("udp-receive --port {RECEIVE_PORT}"))?;
    let target = to.at(RECEIVE_PORT);
    let sent = from
        .tool(&format!("udp-send --to {target} {arguments}"))?
        .result()?;
    Ok(Datagrams {
        sent,
        received: settle(receiver)?,
    })
}

/// Gives datagrams under way the time to arrive, then the receiver's report.
pub(crate) fn settle(receiver: Task) -> Result<ReceiveReport> {
    std::thread::sleep(wait::patiently(std::time::Duration::from_millis(100)));
    receiver.finish()
}

/// Sends `count` datagrams of `size` bytes; all have to arrive, intact and once.
///
/// # Errors
/// When one does not.
pub fn datagrams(
    from: &Pod,
    to: &Pod,
    size: usize,
    count: u64,
    arguments: &str,
) -> Result<Datagrams> {
    let all = try_datagrams(
        from,
        to,
        &format!("--size {size} --count {count} {arguments}"),
    )?;
    let received = &all.received;
    let intact = all.sent.sent == count
        && received.received == count
        && received.corrupt == 0
        && received.duplicated == 0
        && received.sizes.get(&size) == Some(&count);
    if !intact {
        let failure = anyhow!("{count} datagrams of {size} bytes were to arrive intact: {all:?}");
        return explained(Err(failure), from, to);
    }
    Ok(all)
}

/// The routers between two pods.
///
/// # Errors
/// When the tool failed.
pub fn route(from: &Pod, to: Ipv4Addr) -> Result<RouteReport> {
    from.tool(&format!("route --to {to}"))?.result()
}

/// Requests and responses of 64 bytes, both ends on CPU `cpu`. The client in `from` addresses
/// `target`, behind which the server in `to` is reached at the same port.
///
/// # Errors
/// When the connection broke.
pub fn request_response(
    from: &Namespace,
    (to, target): (&Namespace, SocketAddrV4),
    protocol: Protocol,
    seconds: f64,
    cpu: usize,
) -> Result<AskReport> {
    let common = format!("--protocol {} --cpu {cpu}", protocol.name());
    let (report, served): (AskReport, ServeReport) = Ends::start(
        from,
        (to, target),
        &format!("rr-serve {common}"),
        &format!("rr {common} --seconds {seconds}"),
    )?
    .result()?;
    served.check(report.all_transactions)?;
    Ok(report)
}

/// A counter of `/proc/net/snmp`: a line of names, then a line of values.
#[must_use]
pub fn snmp(text: &str, protocol: &str, name: &str) -> Option<u64> {
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(": "));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split(' ').position(|candidate| candidate == name)?;
    values.split(' ').nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::{slowest_second, snmp};

    #[test]
    fn a_counter_is_found_by_its_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: InErrs OutRsts\nTcp: 3 4\nTcpExt: OutRsts\nTcpExt: 9\n";
        assert_eq!(snmp(text, "Tcp", "OutRsts"), Some(4));
        assert_eq!(snmp(text, "Udp", "OutRsts"), None);
    }

    #[test]
    fn a_second_of_standstill_is_found() {
        let mut samples = vec![100; 60];
        samples[30..40].fill(0);
        let slowest = slowest_second(&samples).expect("enough samples");
        assert!(slowest.share < 0.01);
        assert!((slowest.from - 3.0).abs() < 0.01);
    }

    #[test]
    fn a_short_dip_is_no_slow_second() {
        let mut samples = vec![100; 60];
        samples[30..34].fill(0);
        assert!(slowest_second(&samples).expect("enough samples").share > 0.5);
    }
}
