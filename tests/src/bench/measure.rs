//! What is measured: a table of probes, and the figures that each gives.

use super::stats::Better;
use crate::traffic::request_response::Protocol;

/// Where a probe's traffic goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// The server's own address.
    Pod,
    /// A Service's address, translated by netfilter.
    Service,
}

impl Target {
    /// The word in tables and in `results.json`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Service => "service",
        }
    }
}

/// What the traffic is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// Requests, each after the response to the one before; both ends on one CPU.
    Asked(Asked),
    /// Datagrams of this size one way, each end on a CPU of its own.
    Flood(usize),
    /// So many TCP streams by iperf3, each end on a CPU of its own.
    Streams(u8),
    /// Requests and responses of many flows of one process.
    Many(Many),
}

/// How each request gets to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// As those before it.
    InOneFlow(Protocol),
    /// By a TCP connection of its own.
    ByConnections,
    /// As the first datagram of a UDP flow of its own.
    ByFirstPackets,
}

/// Many flows at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Many {
    /// What carries them.
    pub protocol: Protocol,
    /// How many there are.
    pub flows: u32,
    /// How many of them wait for an answer at a time, in turn.
    pub window: u32,
    /// How long.
    pub seconds: u32,
    /// Both ends on one CPU.
    pub same_cpu: bool,
}

/// The uplink's offloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offloads {
    /// All that a veth offers.
    Veth,
    /// What many network cards leave: no segmentation of tunnelled packets.
    Nic,
}

/// One probe.
#[derive(Debug, Clone, Copy)]
pub struct Probe {
    /// Name of its first figure, and the start of the others' names.
    pub name: &'static str,
    /// What runs.
    pub traffic: Traffic,
    /// With which offloads.
    pub offloads: Offloads,
    /// Part of `--quick`.
    pub quick: bool,
    /// Part of `--quick` also through a Service.
    pub quick_service: bool,
}

/// One figure of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figure {
    /// What follows the probe's name.
    pub suffix: &'static str,
    /// Of the numbers.
    pub unit: &'static str,
    /// Whether more is good.
    pub better: Better,
}

const fn figure(suffix: &'static str, unit: &'static str, better: Better) -> Figure {
    Figure {
        suffix,
        unit,
        better,
    }
}

const LATENCIES: [Figure; 4] = [
    figure("", "1/s", Better::Higher),
    figure("_p50", "µs", Better::Lower),
    figure("_p99", "µs", Better::Lower),
    figure("_p999", "µs", Better::Lower),
];
const FIRST: [Figure; 2] = [
    figure("", "µs", Better::Lower),
    figure("_p99", "µs", Better::Lower),
];
const FLOOD: [Figure; 3] = [
    figure("", "packets/s", Better::Higher),
    figure("_cpu", "CPU s/million", Better::Lower),
    figure("_lost", "%", Better::Lower),
];
const STREAMS: [Figure; 3] = [
    figure("", "Gbit/s", Better::Higher),
    figure("_cpu", "CPU s/GB", Better::Lower),
    figure("_retransmitted", "segments", Better::Lower),
];

/// The second half's rate: what it is once all are learned.
const MANY: [Figure; 2] = [
    figure("", "1/s", Better::Higher),
    figure("_worst_second", "1/s", Better::Higher),
];

impl Traffic {
    /// What it tells, in the order in which it is reported.
    #[must_use]
    pub const fn figures(self) -> &'static [Figure] {
        match self {
            Self::Asked(Asked::InOneFlow(_) | Asked::ByConnections) => &LATENCIES,
            Self::Asked(Asked::ByFirstPackets) => &FIRST,
            Self::Flood(_) => &FLOOD,
            Self::Streams(_) => &STREAMS,
            Self::Many(_) => &MANY,
        }
    }
}

const fn probe(name: &'static str, traffic: Traffic) -> Probe {
    Probe {
        name,
        traffic,
        offloads: Offloads::Veth,
        quick: false,
        quick_service: false,
    }
}

const fn quick(mut probe: Probe) -> Probe {
    probe.quick = true;
    probe
}

const fn quick_service(mut probe: Probe) -> Probe {
    probe.quick_service = true;
    quick(probe)
}

const fn nic(mut probe: Probe) -> Probe {
    probe.offloads = Offloads::Nic;
    probe
}

/// As many under way as there are, but never more than the kernel's queues hold.
const fn many(name: &'static str, protocol: Protocol, flows: u32) -> Probe {
    probe(
        name,
        Traffic::Many(Many {
            protocol,
            flows,
            window: if flows < 256 { flows } else { 256 },
            seconds: 3,
            same_cpu: false,
        }),
    )
}

/// One flow after the other, each again only when all had their turn.
const fn in_turn(name: &'static str, flows: u32, seconds: u32) -> Probe {
    probe(
        name,
        Traffic::Many(Many {
            protocol: Protocol::Udp,
            flows,
            window: 1,
            seconds,
            same_cpu: true,
        }),
    )
}

/// All of them, in the order in which they run.
pub const PROBES: [Probe; 17] = [
    quick_service(probe(
        "tcp_rr",
        Traffic::Asked(Asked::InOneFlow(Protocol::Tcp)),
    )),
    quick(probe(
        "udp_rr",
        Traffic::Asked(Asked::InOneFlow(Protocol::Udp)),
    )),
    quick_service(probe("tcp_crr", Traffic::Asked(Asked::ByConnections))),
    quick(probe("first_packet", Traffic::Asked(Asked::ByFirstPackets))),
    quick(probe("udp_64", Traffic::Flood(64))),
    probe("udp_1400", Traffic::Flood(1400)),
    quick(probe("tcp_stream", Traffic::Streams(1))),
    probe("tcp_stream_4", Traffic::Streams(4)),
    nic(probe("tcp_stream_nic", Traffic::Streams(1))),
    nic(probe("tcp_stream_4_nic", Traffic::Streams(4))),
    many("tcp_16_flows", Protocol::Tcp, 16),
    many("tcp_256_flows", Protocol::Tcp, 256),
    many("tcp_4096_flows", Protocol::Tcp, 4096),
    many("udp_16_flows", Protocol::Udp, 16),
    many("udp_256_flows", Protocol::Udp, 256),
    many("udp_4096_flows", Protocol::Udp, 4096),
    in_turn("udp_15000_in_turn", 15_000, 10),
];

impl Probe {
    /// Whether it runs.
    #[must_use]
    pub const fn included(&self, target: Target, quick: bool) -> bool {
        match target {
            // How many there are matters to the tables, not to netfilter.
            Target::Service if matches!(self.traffic, Traffic::Many(_)) => false,
            _ if !quick => true,
            Target::Pod => self.quick,
            Target::Service => self.quick_service,
        }
    }
}

/// Figures that answer "did anything get slower": of the measures whose sides share a CPU and take
/// turns of it. All of them meet the same speeds of the machine, so that their ratios repeat within
/// a few percent, which a best round or a median latency of each side does not.
#[must_use]
pub fn is_checked(measure: &str) -> bool {
    PROBES
        .iter()
        .filter(|probe| probe.offloads == Offloads::Veth)
        .any(|probe| match probe.traffic {
            Traffic::Asked(_) => measure == probe.name,
            Traffic::Flood(_) | Traffic::Streams(_) | Traffic::Many(_) => false,
        })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_figure_has_a_name_of_its_own() {
        let names: Vec<String> = PROBES
            .iter()
            .flat_map(|probe| {
                let figures = probe.traffic.figures().iter();
                figures.map(|figure| format!("{}{}", probe.name, figure.suffix))
            })
            .collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
    }

    #[test]
    fn what_sides_take_turns_for_is_checked() {
        for (measure, checked) in [
            ("tcp_rr", true),
            ("tcp_crr", true),
            ("first_packet", true),
            ("tcp_rr_p50", false),
            ("tcp_rr_p999", false),
            ("udp_64", false),
            ("tcp_stream", false),
        ] {
            assert_eq!(is_checked(measure), checked, "{measure}");
        }
    }
}
