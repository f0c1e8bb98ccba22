//! Runs one probe on one stage, once.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddrV4,
    process::Stdio,
};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::{
    cpu,
    measure::{Asked, Many, Probe, Target, Traffic},
    proof::{Flows, Way},
    stage::{Passed, Port, Stage, Watch},
    turns,
};
use crate::{
    ends::Ends,
    exchange,
    namespace::Namespace,
    task::Task,
    traffic::{
        flood::{FloodReport, SinkReport},
        latency::Latency,
        many_flows::ManyReport,
    },
};

/// How long and where.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Seconds of each measurement.
    pub seconds: f64,
    /// The CPU that both ends share, or that sends.
    pub cpu: usize,
    /// The CPU that receives where each end has one.
    pub other_cpu: usize,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// In the order of [`Traffic::figures`].
    pub figures: Vec<f64>,
    /// Where single latencies were taken.
    pub latency: Option<Latency>,
    /// Requests and responses, or connections, that passed, warming up included.
    pub transactions: Option<u64>,
}

/// The largest packet that segmentation offload makes.
const LARGEST: u64 = 65_536;
/// Segments of a stream are acknowledged, however sparsely.
const FEW: u64 = 10;

/// Runs it and has the counters prove the path.
///
/// # Errors
/// When a tool fails, packets took another path, or a connection was reset.
pub fn run(stage: &Stage, probe: &Probe, target: Target, pace: Pace) -> Result<Outcome> {
    let proof = Proof::begin(stage, probe, target)?;
    let measured = match probe.traffic {
        Traffic::Asked(asked) => turns::alone(stage, asked, target, pace),
        Traffic::Flood(size) => flood(stage, size, target, pace),
        Traffic::Streams(count) => streams(stage, count, target, pace),
        Traffic::Many(many) => many_flows(stage, many, target, pace),
    };
    proof.end(measured)
}

/// An outcome, and what the counters have to show for it.
pub(super) type Measured = (Outcome, Flows, Passed);

/// The frame around a measurement: which way the packets have to take.
pub(super) struct Proof<'a> {
    stage: &'a Stage,
    what: String,
    way: Way,
    watch: Watch<'a>,
    resets: Option<u64>,
}

impl<'a> Proof<'a> {
    /// Notes all counters.
    pub(super) fn begin(stage: &'a Stage, probe: &Probe, target: Target) -> Result<Self> {
        let name = &stage.side.name;
        let what = format!("{} on side {name}, to the {}", probe.name, target.name());
        let begin = || {
            let way = stage
                .side
                .way(target)
                .context("this side has no way there")?;
            stage.warm_up()?;
            let counts_resets = probe.traffic == Traffic::Asked(Asked::ByConnections);
            let resets = counts_resets.then(|| resets(stage)).transpose()?;
            Ok::<_, anyhow::Error>((way, stage.watch()?, resets))
        };
        let (way, watch, resets) = begin().with_context(|| what.clone())?;
        Ok(Self {
            stage,
            what,
            way,
            watch,
            resets,
        })
    }

    /// Gives the outcome if the packets took that way.
    pub(super) fn end(self, measured: Result<Measured>) -> Result<Outcome> {
        let what = || self.what.clone();
        let (outcome, flows, passed) = measured.with_context(what)?;
        self.watch
            .expect(self.way, flows, passed)
            .with_context(what)?;
        if let Some(before) = self.resets {
            let count = resets(self.stage)? - before;
            ensure!(count == 0, "{}: {count} connections were reset", self.what);
        }
        Ok(outcome)
    }
}

/// Both ends of a probe's tool.
pub(super) fn start(stage: &Stage, to: SocketAddrV4, serve: &str, ask: &str) -> Result<Ends> {
    Ends::start(stage.client(), (stage.server(), to), serve, ask)
}

fn flood(stage: &Stage, size: usize, target: Target, pace: Pace) -> Result<Measured> {
    let to = stage.way_to(Port::Flood, target);
    let port = to.port();
    let (cpu, seconds, other) = (pace.cpu, pace.seconds, pace.other_cpu);
    let sink = Task::start(
        stage.server(),
        &format!("udp-sink --port {port} --cpu {other}"),
    )?;
    let before = cpu::busy()?;
    let sent: FloodReport = Task::start(
        stage.client(),
        &format!("udp-flood --to {to} --size {size} --seconds {seconds} --cpu {cpu}"),
    )?
    .result()?;
    let received: SinkReport = sink.finish()?;
    let busy = cpu::busy()? - before;
    ensure!(
        received.received > 0 && received.odd == 0,
        "of {} datagrams {} arrived, {} of them with another size",
        sent.sent,
        received.received,
        received.odd
    );
    let arrived = received.received as f64;
    let outcome = Outcome {
        figures: vec![
            arrived / sent.seconds,
            busy * 1e6 / arrived,
            100.0 * (1.0 - arrived / sent.sent as f64),
        ],
        latency: None,
        transactions: None,
    };
    let passed = Passed {
        // Some may be lost before the node's first counter.
        there: received.received,
        back: 0,
    };
    Ok((outcome, Flows::Long, passed))
}

fn many_flows(stage: &Stage, many: Many, target: Target, pace: Pace) -> Result<Measured> {
    let word = many.protocol.name();
    let (serving, shared) = if many.same_cpu {
        (pace.cpu, "--shared")
    } else {
        (pace.other_cpu, "")
    };
    let ends = start(
        stage,
        stage.way_to(Port::Flows, target),
        &format!("many-serve --protocol {word} --cpu {serving} {shared}"),
        &format!(
            "many --protocol {word} --flows {} --window {} --seconds {} --cpu {} {shared}",
            many.flows, many.window, many.seconds, pace.cpu
        ),
    )?;
    let report: ManyReport = ends.client.result()?;
    drop(ends.server);
    report.check()?;
    // Samples are of 100 ms.
    let late = &report.samples[report.samples.len() / 2..];
    let rate = 10.0 * late.iter().sum::<u64>() as f64 / late.len() as f64;
    let outcome = Outcome {
        figures: vec![rate, report.worst_second()],
        latency: None,
        transactions: Some(report.transactions),
    };
    // Requests of TCP flows may share a segment's way with acknowledgements, never the reverse.
    let passed = Passed {
        there: report.transactions,
        back: report.transactions,
    };
    Ok((outcome, Flows::Many, passed))
}

/// What is used of `iperf3 -J`.
#[derive(Debug, Deserialize)]
struct Iperf {
    end: IperfEnd,
}

#[derive(Debug, Deserialize)]
struct IperfEnd {
    sum_sent: IperfSum,
    sum_received: IperfSum,
}

#[derive(Debug, Deserialize)]
struct IperfSum {
    bytes: u64,
    bits_per_second: f64,
    #[serde(default)]
    retransmits: u64,
}

fn streams(stage: &Stage, count: u8, target: Target, pace: Pace) -> Result<Measured> {
    let to = stage.way_to(Port::Streams, target);
    let mut server = iperf3_server(stage.server(), to.port(), pace.other_cpu)?;
    let before = cpu::busy()?;
    let (address, port) = (to.ip().to_string(), to.port().to_string());
    let (count, cpu) = (count.to_string(), pace.cpu.to_string());
    // It takes whole seconds only.
    let seconds = pace.seconds.ceil().to_string();
    let said = stage.client().run(&[
        "timeout", "30", "iperf3", "-c", &address, "-p", &port, "-t", &seconds, "-P", &count, "-A",
        &cpu, "-J",
    ]);
    let ended = match &said {
        Ok(_) => server.wait(),
        Err(_) => server.kill().and_then(|()| server.wait()),
    };
    let busy = cpu::busy()? - before;
    let end = serde_json::from_str::<Iperf>(&said?)
        .context("iperf3 gave an odd result")?
        .end;
    ensure!(ended?.success(), "iperf3's server failed");
    ensure!(end.sum_received.bytes > 0, "iperf3 carried nothing");
    let outcome = Outcome {
        figures: vec![
            end.sum_received.bits_per_second / 1e9,
            busy * 1e9 / end.sum_received.bytes as f64,
            end.sum_sent.retransmits as f64,
        ],
        latency: None,
        transactions: None,
    };
    let passed = Passed {
        there: end.sum_received.bytes / LARGEST,
        back: FEW,
    };
    Ok((outcome, Flows::Long, passed))
}

fn iperf3_server(namespace: &Namespace, port: u16, cpu: usize) -> Result<std::process::Child> {
    let (port, cpu) = (port.to_string(), cpu.to_string());
    let mut command = namespace.command("iperf3");
    command
        .args(["-s", "-1", "--forceflush", "-p", &port, "-A", &cpu])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut server = namespace.spawn(command)?;
    let mut lines = BufReader::new(server.stdout.take().context("iperf3 without stdout")?).lines();
    let listens = lines.any(|line| line.is_ok_and(|line| line.contains("listening")));
    ensure!(listens, "iperf3's server did not start");
    // Else it would block, or be killed, at its next line.
    std::thread::spawn(move || lines.for_each(drop));
    Ok(server)
}

/// Resets that both ends have sent so far.
fn resets(stage: &Stage) -> Result<u64> {
    [stage.client(), stage.server()]
        .into_iter()
        .map(|end| {
            let text = end.read("/proc/thread-self/net/snmp")?;
            exchange::snmp(&text, "Tcp", "OutRsts").context("/proc/net/snmp has no OutRsts")
        })
        .sum()
}
