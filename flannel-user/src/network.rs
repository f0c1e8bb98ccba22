//! The network config that all nodes share (contract section 3), validated.

mod derive;
#[cfg(test)]
mod tests;

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::value::RawValue;

use crate::{
    json_object::{JsonObject, WrongType},
    lease::SubnetKey,
};

/// VXLAN network identifiers have 24 bits.
const MAX_VNI: u32 = (1 << 24) - 1;
/// `VNI` where the config has none.
const DEFAULT_VNI: u32 = 1;
/// Outer MTU below which pods are left with less than the 68 bytes every IPv4
/// link must carry (RFC 791), after the 50 bytes of the tunnel.
const MIN_MTU: u32 = 118;

/// A validated network config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// All pod addresses of the cluster; host bits are zero.
    pub network: Ipv4Net,
    /// Prefix length of one node's subnet.
    pub subnet_len: u8,
    /// Network address of the first subnet that may be handed out.
    pub subnet_min: Ipv4Addr,
    /// Network address of the last one.
    pub subnet_max: Ipv4Addr,
    /// `EnableNFTables`.
    pub enable_nftables: bool,
    /// How packets reach other nodes.
    pub backend: BackendConfig,
}

/// The `Backend` object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendConfig {
    /// VXLAN through `flannel.<VNI>`.
    Vxlan(VxlanConfig),
    /// Leases only, no forwarding.
    Alloc,
}

/// Keys of the vxlan backend (contract section 4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanConfig {
    /// VXLAN network identifier, also the suffix of the device name.
    pub vni: u32,
    /// UDP port in host byte order; `None` leaves the choice to the kernel (8472).
    pub port: Option<u16>,
    /// Outer MTU in bytes; `None` takes the uplink's. 50 bytes are the tunnel's.
    pub mtu: Option<u32>,
    /// Group-based-policy extension on the device.
    pub gbp: bool,
    /// MAC learning on the device.
    pub learning: bool,
    /// `FastPath`: our own key; which packets the programs may take.
    pub fast_path: Option<FastPath>,
}

/// Which packets the eBPF programs may take from the stack.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum FastPath {
    /// None: programs are loaded and count, the kernel forwards.
    Off,
    /// Packets of flows whose first packets showed what the stack does with them, for as long as
    /// that holds. Right in every cluster.
    Learned,
    /// The same, and TCP between pods from its SYN on. Right only where netfilter has nothing to
    /// say about new connections of pods.
    Direct,
}

/// Why a network config is refused.
#[derive(Debug, thiserror::Error)]
pub enum NetworkConfigError {
    /// Not JSON, or no object; the text has line and column.
    #[error("it is not readable as JSON: {0}")]
    Json(serde_json::Error),
    /// A known key holds another type.
    #[error(transparent)]
    WrongType(#[from] WrongType),
    /// A key inside `Backend` holds another type.
    #[error("Backend.{0}")]
    WrongBackendType(WrongType),
    /// `EnableIPv4` and `EnableIPv6` are both false.
    #[error(
        "the network config enables neither IPv4 nor IPv6; remove \"EnableIPv4\":false or enable one"
    )]
    NoFamily,
    /// `Network` is missing or covers every address.
    #[error(
        "the network config has no Network; add one that holds every pod, for instance \"Network\":\"10.244.0.0/16\""
    )]
    NoNetwork,
    /// `SubnetLen` over 30.
    #[error("SubnetLen is {len}, but a node's subnet needs a prefix of at most 30 bits")]
    SubnetTooSmall {
        /// The prefix length asked for.
        len: u64,
    },
    /// Fewer than four subnets fit.
    #[error(
        "Network {network} is too small for subnets of /{len}: at least four must fit, so SubnetLen has to be {} or more, or Network larger",
        network.prefix_len() + 2
    )]
    TooFewSubnets {
        /// The network.
        network: Ipv4Net,
        /// The prefix length asked for.
        len: u64,
    },
    /// Smaller than /28 without a `SubnetLen`.
    #[error(
        "Network {network} is too small to be divided: use a prefix of at most 28 bits (four subnets of /30)"
    )]
    NetworkTooSmall {
        /// The network.
        network: Ipv4Net,
    },
    /// `SubnetMin` or `SubnetMax` outside `Network`.
    #[error("{key} {address} lies outside Network {network}")]
    OutsideNetwork {
        /// `SubnetMin` or `SubnetMax`.
        key: &'static str,
        /// Its value.
        address: Ipv4Addr,
        /// The network.
        network: Ipv4Net,
    },
    /// `SubnetMin` or `SubnetMax` is no network address.
    #[error(
        "{key} {address} is not on a boundary of SubnetLen {len}; the nearest below is {nearest}"
    )]
    NotAligned {
        /// `SubnetMin` or `SubnetMax`.
        key: &'static str,
        /// Its value.
        address: Ipv4Addr,
        /// The prefix length in force.
        len: u8,
        /// The network address of the subnet that holds it.
        nearest: Ipv4Addr,
    },
    /// `Backend` without `Type`.
    #[error("Backend has no Type; set \"Backend\":{{\"Type\":\"vxlan\"}}")]
    NoBackendType,
    /// A `Backend.Type` that flannel does not know either.
    #[error("unknown backend type {0:?}; this version has \"vxlan\" and \"alloc\"")]
    UnknownBackend(String),
    /// Part of flannel, but not of this version.
    #[error("{what} is not available in this version; {advice}")]
    NotAvailable {
        /// The key and its value.
        what: String,
        /// What to do instead.
        advice: &'static str,
    },
    /// A key of a backend out of its range.
    #[error("Backend.{key} is {value}, expected {expected}")]
    OutOfRange {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// The range.
        expected: &'static str,
    },
}

impl NetworkConfigError {
    /// True where flannel leaves with status 1 instead of waiting for a better config: this
    /// agent cannot run what the cluster runs (contract section 1, steps 7 and 11).
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Self::NoFamily
                | Self::NoBackendType
                | Self::UnknownBackend(_)
                | Self::NotAvailable { .. }
        )
    }
}

impl NetworkConfig {
    /// True when a lease of this subnet could have been handed out under this config:
    /// its length is `SubnetLen`, it lies in the range, and it has no IPv6 part
    /// (contract section 6.3).
    #[must_use]
    pub fn is_compatible(&self, key: &SubnetKey) -> bool {
        key.v6.is_none()
            && key.v4.prefix_len() == self.subnet_len
            && (self.subnet_min..=self.subnet_max).contains(&key.v4.network())
    }
}

/// Reads and validates flannel's JSON. Keys match without regard to case, unknown
/// keys are ignored.
impl FromStr for NetworkConfig {
    type Err = NetworkConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let object = JsonObject::parse(text).map_err(NetworkConfigError::Json)?;
        let flag = |key| object.get::<bool>(key, "true or false");
        let enable_ipv4 = flag("EnableIPv4")?.unwrap_or(true);
        let enable_ipv6 = flag("EnableIPv6")?.unwrap_or(false);
        let enable_nftables = flag("EnableNFTables")?.unwrap_or(false);
        let asked = derive::Asked {
            network: object.get("Network", "an IPv4 network such as \"10.244.0.0/16\"")?,
            subnet_len: object.get("SubnetLen", "a prefix length")?,
            subnet_min: object.get("SubnetMin", "an IPv4 address")?,
            subnet_max: object.get("SubnetMax", "an IPv4 address")?,
        };
        check_ipv6_types(&object)?;
        if !enable_ipv4 && !enable_ipv6 {
            return Err(NetworkConfigError::NoFamily);
        }
        if enable_ipv6 {
            return Err(NetworkConfigError::NotAvailable {
                what: "EnableIPv6 true".to_owned(),
                advice: "remove it, only IPv4 pod networks exist so far",
            });
        }
        let subnets = asked.derive()?;
        Ok(Self {
            network: subnets.network,
            subnet_len: subnets.len,
            subnet_min: subnets.min,
            subnet_max: subnets.max,
            enable_nftables,
            backend: backend(object.raw("Backend"))?,
        })
    }
}

/// A value of the wrong type is an error even where it is not used.
fn check_ipv6_types(object: &JsonObject) -> Result<(), WrongType> {
    object.get::<Ipv6Net>("IPv6Network", "an IPv6 network")?;
    object.get::<u64>("IPv6SubnetLen", "a prefix length")?;
    object.get::<Ipv6Addr>("IPv6SubnetMin", "an IPv6 address")?;
    object.get::<Ipv6Addr>("IPv6SubnetMax", "an IPv6 address")?;
    Ok(())
}

fn backend(raw: Option<&RawValue>) -> Result<BackendConfig, NetworkConfigError> {
    const ADVICE: &str = "use \"Backend\":{\"Type\":\"vxlan\"}";
    let Some(raw) = raw else {
        return Err(NetworkConfigError::NotAvailable {
            what: "Backend is absent, which means Type \"udp\"; it".to_owned(),
            advice: ADVICE,
        });
    };
    let object = JsonObject::parse(raw.get()).map_err(|_| WrongType {
        key: "Backend",
        value: raw.get().to_owned(),
        expected: "an object such as {\"Type\":\"vxlan\"}",
    })?;
    let given: String = object
        .get("Type", "text")
        .map_err(NetworkConfigError::WrongBackendType)?
        .unwrap_or_default();
    match given.to_ascii_lowercase().as_str() {
        "" => Err(NetworkConfigError::NoBackendType),
        "vxlan" => vxlan(&object).map(BackendConfig::Vxlan),
        "alloc" => Ok(BackendConfig::Alloc),
        "host-gw" | "wireguard" | "ipip" | "udp" | "ipsec" | "extension" | "tencent-vpc" => {
            Err(NetworkConfigError::NotAvailable {
                what: format!("Backend.Type {given:?}"),
                advice: ADVICE,
            })
        }
        _ => Err(NetworkConfigError::UnknownBackend(given)),
    }
}

fn vxlan(object: &JsonObject) -> Result<VxlanConfig, NetworkConfigError> {
    let number = |key| {
        object
            .get::<i64>(key, "a number")
            .map_err(NetworkConfigError::WrongBackendType)
    };
    let flag = |key| {
        object
            .get::<bool>(key, "true or false")
            .map(Option::unwrap_or_default)
            .map_err(NetworkConfigError::WrongBackendType)
    };
    let out_of_range = |key, value: &dyn ToString, expected| NetworkConfigError::OutOfRange {
        key,
        value: value.to_string(),
        expected,
    };

    let vni = number("VNI")?.unwrap_or(DEFAULT_VNI.into());
    let vni = u32::try_from(vni)
        .ok()
        .filter(|vni| *vni <= MAX_VNI)
        .ok_or_else(|| out_of_range("VNI", &vni, "0 to 16777215"))?;
    let port = number("Port")?.unwrap_or(0);
    let port = u16::try_from(port).map_err(|_| out_of_range("Port", &port, "0 to 65535"))?;
    let mtu = number("MTU")?.unwrap_or(0);
    let mtu = u32::try_from(mtu)
        .ok()
        .filter(|mtu| *mtu == 0 || (MIN_MTU..=65_535).contains(mtu))
        .ok_or_else(|| out_of_range("MTU", &mtu, "0 (the uplink's) or 118 to 65535 bytes"))?;
    let fast_path = object
        .get::<String>("FastPath", "\"learned\", \"direct\" or \"off\"")
        .map_err(NetworkConfigError::WrongBackendType)?
        .map(|text| match text.to_ascii_lowercase().as_str() {
            "off" => Ok(FastPath::Off),
            "direct" => Ok(FastPath::Direct),
            "learned" => Ok(FastPath::Learned),
            _ => Err(out_of_range(
                "FastPath",
                &format!("{text:?}"),
                "\"learned\", \"direct\" or \"off\"",
            )),
        })
        .transpose()?;
    if flag("DirectRouting")? {
        tracing::warn!(
            "Backend.DirectRouting is not available in this version: every peer is reached through the tunnel"
        );
    }
    Ok(VxlanConfig {
        vni,
        port: (port != 0).then_some(port),
        mtu: (mtu != 0).then_some(mtu),
        gbp: flag("GBP")?,
        learning: flag("Learning")?,
        fast_path,
    })
}
