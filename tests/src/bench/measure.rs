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
    /// A request, a response, again; both ends on one CPU.
    RequestResponse(Protocol),
    /// A connection for every request; both ends on one CPU.
    Connections,
    /// A new UDP flow for every request; both ends on one CPU.
    FirstPacket,
    /// Datagrams of this size one way, each end on a CPU of its own.
    Flood(usize),
    /// So many TCP streams by iperf3, each end on a CPU of its own.
    Streams(u8),
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

impl Traffic {
    /// What it tells, in the order in which it is reported.
    #[must_use]
    pub const fn figures(self) -> &'static [Figure] {
        match self {
            Self::RequestResponse(_) | Self::Connections => &LATENCIES,
            Self::FirstPacket => &FIRST,
            Self::Flood(_) => &FLOOD,
            Self::Streams(_) => &STREAMS,
        }
    }

    /// Both ends on one CPU: such ratios repeat, whatever else the machine does.
    #[must_use]
    pub const fn on_one_cpu(self) -> bool {
        matches!(
            self,
            Self::RequestResponse(_) | Self::Connections | Self::FirstPacket
        )
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

/// All of them, in the order in which they run.
pub const PROBES: [Probe; 10] = [
    quick_service(probe("tcp_rr", Traffic::RequestResponse(Protocol::Tcp))),
    quick(probe("udp_rr", Traffic::RequestResponse(Protocol::Udp))),
    quick_service(probe("tcp_crr", Traffic::Connections)),
    quick(probe("first_packet", Traffic::FirstPacket)),
    quick(probe("udp_64", Traffic::Flood(64))),
    probe("udp_1400", Traffic::Flood(1400)),
    quick(probe("tcp_stream", Traffic::Streams(1))),
    probe("tcp_stream_4", Traffic::Streams(4)),
    nic(probe("tcp_stream_nic", Traffic::Streams(1))),
    nic(probe("tcp_stream_4_nic", Traffic::Streams(4))),
];

impl Probe {
    /// Whether it runs.
    #[must_use]
    pub const fn included(&self, target: Target, quick: bool) -> bool {
        match target {
            _ if !quick => true,
            Target::Pod => self.quick,
            Target::Service => self.quick_service,
        }
    }
}

/// Figures that answer "did anything get slower": ratios that repeat.
#[must_use]
pub fn is_checked(measure: &str) -> bool {
    PROBES
        .iter()
        .any(|probe| probe.traffic.on_one_cpu() && probe.name == measure)
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
    fn rates_with_both_ends_on_one_cpu_are_checked() {
        assert!(is_checked("tcp_rr"));
        assert!(is_checked("first_packet"));
        assert!(!is_checked("tcp_rr_p999"));
        assert!(!is_checked("udp_64"));
        assert!(!is_checked("tcp_stream"));
    }
}
