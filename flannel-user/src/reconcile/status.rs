//! What the loop tells an operator.

use std::time::SystemTime;

use tracing::warn;

use super::Reconciler;
use crate::{
    control::Answer,
    forwarding::Via,
    observe::{
        flows::Filter,
        status::{
            ConflictStatus, CounterStatus, NodeStatus, PeerStatus, PodStatus, SourceStatus, Status,
            fast_path_text,
        },
    },
};

impl Reconciler {
    pub(super) fn flows(&mut self, filter: &Filter) -> Answer {
        let learned = self.switch.ebpf_mut().map(|ebpf| ebpf.flows(filter));
        match learned.transpose() {
            Ok(Some(Some(flows))) => Answer::from(flows),
            Ok(Some(None)) => Answer::Error(format!(
                "nothing is learned with this fast path: {}",
                fast_path_text(self.setup.fast_path)
            )),
            Ok(None) => Answer::Error(format!(
                "nothing is learned in netlink mode ({})",
                self.switch.reason()
            )),
            Err(cause) => Answer::Error(format!("{:#}", anyhow::Error::from(cause))),
        }
    }

    pub(super) fn status(&self) -> Status {
        let ebpf = self.switch.ebpf();
        let counters = ebpf
            .map(|ebpf| ebpf.counters())
            .transpose()
            .unwrap_or_else(|error| {
                warn!(error = &error as &dyn std::error::Error, "no counters");
                None
            });
        let bypass = ebpf
            .map(|ebpf| ebpf.bypass_status())
            .transpose()
            .unwrap_or_else(|error| {
                warn!(error = &error as &dyn std::error::Error, "no flows");
                None
            });
        let peers = self
            .table
            .0
            .iter()
            .map(|(subnet, Via::Vxlan { node, vtep_mac })| PeerStatus {
                subnet: *subnet,
                node: *node,
                vtep_mac: vtep_mac.to_string(),
                next_hop: ebpf.and(self.ways.next_hop(node)),
            });
        let pods = self.pods.all.iter().map(|pod| PodStatus {
            address: pod.address,
            interface: pod.interface.clone(),
            attached: ebpf.is_some_and(|ebpf| ebpf.is_attached(pod.ifindex)),
            kept: self.pods.kept.get(&pod.ifindex).cloned(),
        });
        let counters = counters
            .unwrap_or_default()
            .into_iter()
            .map(|(reason, tally)| CounterStatus {
                reason: reason.label().to_owned(),
                direction: reason.direction().label().to_owned(),
                action: reason.action().label().to_owned(),
                packets: tally.packets,
                bytes: tally.bytes,
                text: reason.text().to_owned(),
            });
        let conflicts = self.conflicts.iter().map(|conflict| ConflictStatus {
            subnet: conflict.subnet.v4,
            node: conflict.node,
            text: conflict.quarrel.to_string(),
        });
        let expires = self.own_lease.borrow().expires;
        let expires = expires.and_then(|end| end.duration_since(SystemTime::UNIX_EPOCH).ok());
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            mode: self.switch.mode(),
            mode_reason: self.switch.reason().to_owned(),
            fast_path: self.setup.fast_path,
            fast_path_text: fast_path_text(self.setup.fast_path).to_owned(),
            bypass: bypass.flatten(),
            conntrack_kept: self.switch.kept_settings(),
            node: NodeStatus {
                subnet: self.setup.subnet,
                network: self.setup.network,
                public_ip: self.setup.uplink.public_ip,
                uplink: self.setup.uplink.name.clone(),
                uplink_fault: self.uplink_fault.clone(),
                device: self.device.name.clone(),
                vtep_mac: self.device.mac.to_string(),
                mtu: self.device.mtu,
                uplink_attached: ebpf.is_some_and(|ebpf| ebpf.is_attached(self.setup.uplink.index)),
            },
            source: SourceStatus {
                source: self.setup.source.clone(),
                in_sync: self.in_sync,
                lease_expires: expires.map(|expires| expires.as_secs()),
            },
            conflicts: conflicts.collect(),
            peers: peers.collect(),
            pods: pods.collect(),
            counters: counters.collect(),
            kernel: self.kernel.clone(),
        }
    }
}
