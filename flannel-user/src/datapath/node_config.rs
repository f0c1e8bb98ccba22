//! What the programs know of their own node, from the device and the kernel's settings.

use std::{fs, net::Ipv4Addr};

use flannel_ebpf::layout::{
    DROP_FORGED, FAST_PATH_CLASSES, FAST_PATH_DIRECT, FAST_PATH_LEARNED, HAS_EXCLUSIONS, NodeConfig,
};

use crate::{mac::MacAddr, network::FastPath};

/// UDP port of VXLAN when nothing else is said: the Linux kernel's, not IANA's.
pub const DEFAULT_PORT: u16 = 8472;

/// Settings of this network namespace that shape outer headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KernelSettings {
    /// First and last local port (`ip_local_port_range`).
    pub port_range: (u16, u16),
    /// TTL of packets that the host makes (`ip_default_ttl`).
    pub ttl: u8,
}

impl KernelSettings {
    /// Reads the settings; what cannot be read has the kernel's default.
    #[must_use]
    pub fn read() -> Self {
        let setting = |name: &str| fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok();
        Self::parse(
            setting("ip_local_port_range").as_deref(),
            setting("ip_default_ttl").as_deref(),
        )
    }

    fn parse(port_range: Option<&str>, ttl: Option<&str>) -> Self {
        let range = port_range.and_then(|text| {
            let mut ports = text.split_whitespace().map(str::parse);
            let (first, last) = (ports.next()?.ok()?, ports.next()?.ok()?);
            (first <= last).then_some((first, last))
        });
        let ttl = ttl.and_then(|text| text.trim().parse().ok());
        Self {
            port_range: range.unwrap_or((32_768, 60_999)),
            ttl: ttl.unwrap_or(64),
        }
    }
}

/// What goes into [`NodeConfig`] beside the kernel's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeFacts {
    /// Interface index of the uplink.
    pub uplink: u32,
    /// Interface index of the tunnel device.
    pub tunnel: u32,
    /// Random, the same while the programs live.
    pub seed: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port; `None` for the default.
    pub port: Option<u16>,
    /// MTU of pods in bytes.
    pub pod_mtu: u32,
    /// Local address of the tunnel device.
    pub vtep_addr: Ipv4Addr,
    /// MAC address of the tunnel device.
    pub vtep_mac: MacAddr,
    /// Which packets the programs may take.
    pub fast_path: FastPath,
    /// Short connections too, with learned.
    pub classes: bool,
    /// Some addresses or ports are never bypassed.
    pub has_exclusions: bool,
    /// Drop tunnel packets that no known peer can have sent. Only right while
    /// all peers are known.
    pub drop_forged: bool,
}

/// Composes the value of the map `NODE`.
#[must_use]
pub fn compose(facts: &NodeFacts, settings: &KernelSettings) -> NodeConfig {
    let (first, last) = settings.port_range;
    let fast_path = match facts.fast_path {
        FastPath::Off => 0,
        FastPath::Direct => FAST_PATH_DIRECT | FAST_PATH_LEARNED,
        FastPath::Learned if facts.classes => FAST_PATH_LEARNED | FAST_PATH_CLASSES,
        FastPath::Learned => FAST_PATH_LEARNED,
    };
    let exclusions = if facts.has_exclusions {
        HAS_EXCLUSIONS
    } else {
        0
    };
    let forged = if facts.drop_forged { DROP_FORGED } else { 0 };
    NodeConfig {
        flags: fast_path | forged | exclusions,
        uplink: facts.uplink,
        vni: facts.vni,
        pod_mtu: facts.pod_mtu,
        vtep_addr: facts.vtep_addr.octets(),
        vtep_mac: facts.vtep_mac.0,
        port: facts.port.unwrap_or(DEFAULT_PORT).to_be_bytes(),
        source_port_min: first,
        source_port_span: last - first,
        outer_ttl: settings.ttl,
        _pad: [0; 3],
        seed: facts.seed,
        tunnel: facts.tunnel,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_as_the_kernel_writes_them() {
        let read = KernelSettings::parse(Some("32768\t60999\n"), Some("64\n"));
        assert_eq!(
            read,
            KernelSettings {
                port_range: (32_768, 60_999),
                ttl: 64
            }
        );
        let other = KernelSettings::parse(Some("1024 65535"), Some("128"));
        assert_eq!(
            other,
            KernelSettings {
                port_range: (1024, 65_535),
                ttl: 128
            }
        );
    }

    #[test]
    fn unreadable_settings_have_the_kernels_defaults() {
        let defaults = KernelSettings {
            port_range: (32_768, 60_999),
            ttl: 64,
        };
        for range in [None, Some(""), Some("x y"), Some("9 1")] {
            assert_eq!(KernelSettings::parse(range, Some("999")), defaults);
        }
    }
}
