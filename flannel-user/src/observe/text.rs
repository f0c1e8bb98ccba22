//! The status document as text for a person.

use std::{
    fmt::{self, Write as _},
    time::{Duration, SystemTime},
};

use super::{
    flows::Table,
    status::{BypassStatus, CounterStatus, Mode, Status},
};
use crate::{datapath::ebpf::OwnState, network::FastPath};

/// Renders the whole state, most important first.
///
/// # Errors
/// Only what the writer itself fails with.
pub fn render(status: &Status, all_counters: bool) -> Result<String, fmt::Error> {
    let mut out = String::new();
    let mode = match status.mode {
        Mode::Ebpf => "ebpf",
        Mode::Netlink => "netlink",
    };
    writeln!(out, "mode       {mode} ({})", status.mode_reason)?;
    let fast_path = match status.fast_path {
        FastPath::Off => "off",
        FastPath::Learned => "learned",
        FastPath::Direct => "direct",
    };
    writeln!(out, "fast path  {fast_path} ({})", status.fast_path_text)?;
    if let Some(bypass) = &status.bypass {
        render_bypass(&mut out, bypass)?;
    }
    if let Some(kept) = &status.conntrack_kept {
        let fault = kept.fault.as_deref();
        writeln!(
            out,
            "conntrack  settings kept for {} flows that may have bypassed it{}",
            kept.flows,
            fault.map_or_else(String::new, |fault| format!("; WARNING: {fault}"))
        )?;
    }
    let node = &status.node;
    writeln!(
        out,
        "node       {} on {}, subnet {} of {}",
        node.public_ip, node.uplink, node.subnet, node.network
    )?;
    writeln!(
        out,
        "device     {} {}, mtu {}",
        node.device, node.vtep_mac, node.mtu
    )?;
    if let Some(fault) = &node.uplink_fault {
        writeln!(out, "           WARNING: {fault}")?;
    }
    let sync = if status.source.in_sync {
        "in sync"
    } else {
        "NOT in sync: last known peers stay"
    };
    writeln!(
        out,
        "leases     {}, {sync}{}",
        status.source.source,
        lease_end(status.source.lease_expires)
    )?;
    for conflict in &status.conflicts {
        writeln!(
            out,
            "           CONFLICT over {} of node {}: {}",
            conflict.subnet, conflict.node, conflict.text
        )?;
    }
    let fault = status.kernel.last_error.as_deref().unwrap_or("complete");
    writeln!(
        out,
        "kernel     {fault}, {} repairs since start",
        status.kernel.repairs
    )?;

    writeln!(out, "\npeers      {}", status.peers.len())?;
    for peer in &status.peers {
        let way = match peer.next_hop {
            Some(hop) if hop == peer.node => "on the link".to_owned(),
            Some(hop) => format!("via {hop}"),
            None if status.mode == Mode::Netlink => "through the kernel".to_owned(),
            None => "no route by the uplink: through the kernel".to_owned(),
        };
        writeln!(
            out,
            "  {:<18} {:<15} {} {way}",
            peer.subnet.to_string(),
            peer.node.to_string(),
            peer.vtep_mac
        )?;
    }
    if status.mode == Mode::Ebpf {
        if !node.uplink_attached {
            writeln!(
                out,
                "\nWARNING: no program on {}: packets of peers take the kernel path",
                node.uplink
            )?;
        }
        writeln!(out, "\npods       {}", status.pods.len())?;
        for pod in &status.pods {
            let path = match &pod.kept {
                Some(reason) => format!("through the kernel: {reason}"),
                None if pod.attached => "program attached".to_owned(),
                None => "through the kernel".to_owned(),
            };
            writeln!(
                out,
                "  {:<18} {:<15} {path}",
                pod.address.to_string(),
                pod.interface
            )?;
        }
        let rows: Vec<&CounterStatus> = status
            .counters
            .iter()
            .filter(|row| all_counters || row.packets > 0)
            .collect();
        writeln!(
            out,
            "\npackets{}",
            if rows.is_empty() { "    none yet" } else { "" }
        )?;
        for row in rows {
            writeln!(
                out,
                "  {:<3} {:<9} {:>14} {:>18} bytes  {}: {}",
                row.direction, row.action, row.packets, row.bytes, row.reason, row.text
            )?;
        }
    }
    Ok(out)
}

fn render_bypass(out: &mut String, bypass: &BypassStatus) -> fmt::Result {
    let state = match (&bypass.held, &bypass.tcp_held) {
        (Some(reason), _) => format!("NOTHING bypasses the stack: {reason}"),
        (None, Some(reason)) => format!("UDP only; TCP DOES NOT bypass the stack: {reason}"),
        (None, None) => "TCP and UDP".to_owned(),
    };
    writeln!(out, "bypass     {state}")?;
    writeln!(
        out,
        "           verdicts hold {:.1} s unless confirmed; {} changes of rules, routes or policies since start",
        bypass.validity_seconds, bypass.generations
    )?;
    let (sent, received) = (&bypass.table_out, &bypass.table_in);
    writeln!(
        out,
        "           flows {} out, {} in, of {} each{}",
        sent.flows,
        received.flows,
        sent.capacity,
        pressure(sent, received)
    )?;
    match &bypass.own {
        Some(own) => render_own(out, own),
        None => Ok(()),
    }
}

/// Which connections open without asking.
fn kind(own: &OwnState) -> String {
    if own.by_class {
        format!(
            "from the SYN on by class ({} classes, each asks every {:.0} s)",
            own.classes, own.class_validity_seconds
        )
    } else {
        "from the SYN on".to_owned()
    }
}

fn render_own(out: &mut String, own: &OwnState) -> fmt::Result {
    if !own.wanted && own.live + own.closed == 0 {
        return Ok(());
    }
    let state = match &own.paused {
        Some(reason) => format!("NONE OPEN: {reason}; "),
        None if own.wanted => String::new(),
        None => "no more open; ".to_owned(),
    };
    writeln!(
        out,
        "           {}: {state}{} live, {} closing, {} handed over to conntrack, {} refused there",
        kind(own),
        own.live,
        own.closed,
        own.handed_over,
        own.refused
    )
}

/// The words for tables that are full; nothing for others.
pub(super) fn pressure(sent: &Table, received: &Table) -> &'static str {
    if sent.full || received.full {
        " (FULL: new flows displace others; raise --fast-path-flows)"
    } else {
        ""
    }
}

fn lease_end(expires: Option<u64>) -> String {
    let Some(expires) = expires else {
        return ", reservation".to_owned();
    };
    let end = SystemTime::UNIX_EPOCH + Duration::from_secs(expires);
    match end.duration_since(SystemTime::now()) {
        Ok(left) => format!(", lease ends in {} min", left.as_secs() / 60),
        Err(_) => ", lease HAS ENDED".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::status::{
        KeptSettings, KernelStatus, NodeStatus, PeerStatus, SourceStatus, fast_path_text,
    };

    fn status() -> Status {
        Status {
            version: "0".to_owned(),
            pid: 1,
            mode: Mode::Ebpf,
            mode_reason: "this kernel runs the programs".to_owned(),
            fast_path: FastPath::Direct,
            fast_path_text: fast_path_text(FastPath::Direct).to_owned(),
            bypass: None,
            conntrack_kept: None,
            node: NodeStatus {
                subnet: "10.1.1.0/24".parse().expect("subnet"),
                network: "10.1.0.0/16".parse().expect("network"),
                public_ip: [192, 0, 2, 1].into(),
                uplink: "eth0".to_owned(),
                uplink_fault: None,
                device: "flannel.1".to_owned(),
                vtep_mac: "02:00:00:00:00:01".to_owned(),
                mtu: 1450,
                uplink_attached: true,
            },
            source: SourceStatus {
                source: "file /leases".to_owned(),
                in_sync: true,
                lease_expires: None,
            },
            conflicts: Vec::new(),
            peers: vec![PeerStatus {
                subnet: "10.1.2.0/24".parse().expect("subnet"),
                node: [192, 0, 2, 2].into(),
                vtep_mac: "02:00:00:00:00:02".to_owned(),
                next_hop: None,
            }],
            pods: Vec::new(),
            counters: vec![CounterStatus {
                reason: "encapsulated".to_owned(),
                direction: "out".to_owned(),
                action: "forwarded".to_owned(),
                packets: 0,
                bytes: 0,
                text: "sent".to_owned(),
            }],
            kernel: KernelStatus::default(),
        }
    }

    #[test]
    fn says_what_is_wrong_with_a_peer() {
        let text = render(&status(), false).expect("text");
        assert!(text.contains("no route by the uplink"), "{text}");
        assert!(
            text.contains("mode       ebpf (this kernel runs the programs)"),
            "{text}"
        );
    }

    #[test]
    fn direct_is_said_to_be_blind() {
        let text = render(&status(), false).expect("text");
        assert!(text.contains("fast path  direct ("), "{text}");
        assert!(text.contains("BLIND TO POLICIES"), "{text}");
        assert!(!text.contains("bypass  "), "nothing is learned: {text}");
    }

    #[test]
    fn kept_settings_say_for_how_many_flows() {
        let kept = KeptSettings {
            flows: 7,
            fault: Some("no answer".to_owned()),
        };
        let status = Status {
            conntrack_kept: Some(kept),
            ..status()
        };
        let text = render(&status, false).expect("rendered");
        let expected = "settings kept for 7 flows that may have bypassed it; WARNING: no answer\n";
        assert!(text.contains(expected), "{text}");
    }

    #[test]
    fn the_bypass_says_what_holds_it_and_how_full_it_is() {
        let with = |held: Option<&str>, tcp_held: Option<&str>, full| {
            let table = Table {
                flows: 3,
                capacity: 1024,
                full,
            };
            let bypass = BypassStatus {
                held: held.map(str::to_owned),
                tcp_held: tcp_held.map(str::to_owned),
                validity_seconds: 2.0,
                generations: 7,
                table_out: Table::default(),
                table_in: table,
                own: None,
            };
            let status = Status {
                bypass: Some(bypass),
                ..status()
            };
            render(&status, false).expect("text")
        };
        let text = with(None, None, false);
        assert!(text.contains("bypass     TCP and UDP\n"), "{text}");
        assert!(text.contains("hold 2.0 s"), "{text}");
        assert!(text.contains("; 7 changes"), "{text}");
        assert!(text.contains("flows 0 out, 3 in, of 0 each\n"), "{text}");
        let text = with(None, Some("sysctl"), true);
        assert!(
            text.contains("TCP DOES NOT bypass the stack: sysctl"),
            "{text}"
        );
        assert!(text.contains("FULL"), "{text}");
        let text = with(Some("a queue"), Some("sysctl"), false);
        assert!(
            text.contains("NOTHING bypasses the stack: a queue"),
            "{text}"
        );
    }

    #[test]
    fn counters_at_zero_are_shown_on_request_only() {
        assert!(
            !render(&status(), false)
                .expect("text")
                .contains("encapsulated")
        );
        assert!(
            render(&status(), true)
                .expect("text")
                .contains("encapsulated")
        );
    }
}
