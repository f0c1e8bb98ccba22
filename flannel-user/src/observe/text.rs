//! The status document as text for a person.

use std::{
    fmt::{self, Write as _},
    time::{Duration, SystemTime},
};

use super::status::{CounterStatus, Mode, Status};
use crate::network::FastPath;

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
        FastPath::Off => {
            "off (programs count, the kernel forwards; switch on with --fast-path direct)"
        }
        FastPath::Learned => "learned (flows go the way that the kernel has shown)",
        FastPath::Direct => "direct (every packet to a peer's subnet; blind to netfilter rules)",
    };
    writeln!(out, "fast path  {fast_path}")?;
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
            let path = if pod.attached {
                "program attached"
            } else {
                "through the kernel"
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
    use crate::observe::status::{KernelStatus, NodeStatus, PeerStatus, SourceStatus};

    fn status() -> Status {
        Status {
            version: "0".to_owned(),
            pid: 1,
            mode: Mode::Ebpf,
            mode_reason: "this kernel runs the programs".to_owned(),
            fast_path: FastPath::Direct,
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
