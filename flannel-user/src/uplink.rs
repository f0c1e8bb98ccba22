//! Choice of the uplink and the public address (contract section 16, IPv4 stack).
//!
//! The kernel is read once, then the choice is made over plain values. [`follow`] makes it again
//! when the interface or its address went.

pub mod follow;
mod read;

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use regex::Regex;
use tracing::{info, warn};

use crate::mac::MacAddr;

/// What the operator said about the uplink, verbatim.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UplinkChoice {
    /// `--iface`: names or IPv4 addresses, in order.
    pub iface: Vec<String>,
    /// `--iface-regex`: expressions, in order, after every `iface`.
    pub iface_regex: Vec<String>,
    /// `--iface-can-reach`: an IPv4 address, after every expression.
    pub iface_can_reach: Option<String>,
    /// `--public-ip`: what peers are told, and what is looked up if nothing else is given.
    pub public_ip: Option<String>,
}

/// The interface that carries the tunnel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// Its MTU in bytes, never 0.
    pub mtu: u32,
    /// Its MAC address, all zero where it has none.
    pub mac: MacAddr,
    /// Its address that was looked up, or its best one.
    pub address: Ipv4Addr,
    /// What peers are told: `--public-ip`, else `address`.
    pub public_ip: Ipv4Addr,
}

/// Why there is no uplink. Every message names the value in question and what to do.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// No interface of that name.
    #[error("there is no interface {name:?}; this host has {existing}. Give --iface one of them")]
    NoSuchInterface {
        /// The name looked for.
        name: String,
        /// What there is.
        existing: Existing,
    },
    /// No interface has that address.
    #[error(
        "no interface has the address {address}; this host has {existing}. Give --iface an interface \
         or one of these addresses (a --public-ip that is not on this host needs --iface besides)"
    )]
    NoSuchAddress {
        /// The address looked for.
        address: Ipv4Addr,
        /// What there is.
        existing: Existing,
    },
    /// An IPv6 address where the IPv4 stack looks for an interface.
    #[error(
        "{value} is an IPv6 address, but only IPv4 is enabled; give --iface a name or an IPv4 address"
    )]
    WrongFamily {
        /// The value.
        value: String,
    },
    /// Nothing matches the expression.
    #[error(
        "no interface address or name matches --iface-regex {expression:?}; this host has {existing}"
    )]
    NoMatch {
        /// The expression.
        expression: String,
        /// What there is.
        existing: Existing,
    },
    /// The expression cannot be read.
    #[error("--iface-regex {expression:?} is no regular expression: {source}")]
    BadExpression {
        /// The expression.
        expression: String,
        /// Where it goes wrong.
        source: Box<regex::Error>,
    },
    /// `--iface-can-reach` is no IPv4 address.
    #[error("--iface-can-reach {value:?} is no IPv4 address")]
    BadTarget {
        /// The value.
        value: String,
    },
    /// There is no route to the target.
    #[error("no route to --iface-can-reach {target}: {reason}; see 'ip route get {target}'")]
    Unreachable {
        /// The target.
        target: Ipv4Addr,
        /// The kernel's answer.
        reason: String,
    },
    /// `--public-ip` is no IPv4 address.
    #[error("--public-ip {value:?} is no IPv4 address")]
    BadPublicIp {
        /// The value.
        value: String,
    },
    /// No default route tells the uplink.
    #[error(
        "there is no IPv4 default route to tell the uplink; this host has {existing}. Give --iface one of them"
    )]
    NoDefaultRoute {
        /// What there is.
        existing: Existing,
    },
    /// The default route has several next hops.
    #[error(
        "the IPv4 default route has several next hops; say with --iface which interface to use"
    )]
    MultipathDefault,
    /// The interface has no usable IPv4 address.
    #[error(
        "interface {name} has no usable IPv4 address; give it one or choose another with --iface"
    )]
    NoAddress {
        /// The interface.
        name: String,
    },
    /// The interface says it carries nothing.
    #[error("interface {name} has MTU 0; choose another with --iface")]
    ZeroMtu {
        /// The interface.
        name: String,
    },
    /// Several lookups were asked for and each one failed.
    #[error("none of the interface options leads to an uplink: {}", join(.0))]
    NoneOf(Vec<UplinkError>),
    /// The kernel could not be read.
    #[error("cannot read the {what} of this host")]
    Netlink {
        /// Links, addresses, routes.
        what: &'static str,
        /// The cause.
        #[source]
        source: Box<rtnetlink::Error>,
    },
}

fn join(errors: &[UplinkError]) -> String {
    let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

/// The interfaces of this host with their addresses, for messages: `lo (127.0.0.1), eth0 (10.0.0.1)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Existing(Vec<(String, Vec<Ipv4Addr>)>);

impl std::fmt::Display for Existing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no interface");
        }
        for (position, (name, addresses)) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { ", " };
            write!(f, "{separator}{name}")?;
            if !addresses.is_empty() {
                let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
                write!(f, " ({})", addresses.join(" "))?;
            }
        }
        Ok(())
    }
}

/// Chooses the uplink of the network namespace that `handle` belongs to.
///
/// # Errors
/// No lookup succeeded, or the kernel could not be read.
pub async fn choose(
    handle: &rtnetlink::Handle,
    choice: &UplinkChoice,
) -> Result<Uplink, UplinkError> {
    let mut host = read::links(handle).await?;
    read::routes(handle, &mut host, choice).await?;
    let uplink = host.choose(choice)?;
    info!(interface = %uplink.name, address = %uplink.address, public_ip = %uplink.public_ip, mtu = uplink.mtu, "uplink chosen");
    Ok(uplink)
}

/// What the choice is made from.
#[derive(Debug, Default)]
struct Host {
    /// By interface index, which is the order of all lookups.
    links: BTreeMap<u32, Link>,
    /// IPv4 default routes of the main table, the kernel's first choice first.
    defaults: Vec<DefaultRoute>,
    /// Answers to route lookups.
    reach: BTreeMap<Ipv4Addr, Result<Reached, String>>,
}

#[derive(Debug, Clone, Default)]
struct Link {
    name: String,
    up: bool,
    mtu: u32,
    mac: MacAddr,
    /// In the kernel's order.
    addresses: Vec<Address>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Address {
    ip: Ipv4Addr,
    permanent: bool,
    temporary: bool,
    deprecated: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DefaultRoute {
    Through(u32),
    Multipath,
    /// For instance unreachable, or by a next-hop object.
    WithoutInterface,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Reached {
    index: u32,
    source: Option<Ipv4Addr>,
}

/// A lookup's result: the interface, and its address if the lookup fixes that too.
type Found = (u32, Option<Ipv4Addr>);

impl Host {
    fn choose(&self, choice: &UplinkChoice) -> Result<Uplink, UplinkError> {
        let (index, fixed) = self.lookup(choice)?;
        let link = &self.links[&index];
        let address = match fixed {
            Some(address) => address,
            None => link.best_address().ok_or_else(|| UplinkError::NoAddress {
                name: link.name.clone(),
            })?,
        };
        if link.mtu == 0 {
            return Err(UplinkError::ZeroMtu {
                name: link.name.clone(),
            });
        }
        let public_ip = match given(choice.public_ip.as_ref()) {
            None => address,
            Some(value) => value.parse().map_err(|_| UplinkError::BadPublicIp {
                value: value.to_owned(),
            })?,
        };
        Ok(Uplink {
            name: link.name.clone(),
            index,
            mtu: link.mtu,
            mac: link.mac,
            address,
            public_ip,
        })
    }

    /// Section 16.1: options in order, first success wins; without options the public
    /// address, without that the default route.
    fn lookup(&self, choice: &UplinkChoice) -> Result<Found, UplinkError> {
        let reach = given(choice.iface_can_reach.as_ref());
        if choice.iface.is_empty() && choice.iface_regex.is_empty() && reach.is_none() {
            return match given(choice.public_ip.as_ref()) {
                Some(public_ip) => self.by_value(public_ip),
                None => self.by_default_route(),
            };
        }
        let by_value = choice.iface.iter().map(|value| self.by_value(value));
        let by_regex = choice.iface_regex.iter().map(|text| self.by_regex(text));
        let by_reach = reach.into_iter().map(|value| self.by_reach(value));
        let mut failures = Vec::new();
        for attempt in by_value.chain(by_regex).chain(by_reach) {
            match attempt {
                Ok(found) => {
                    for error in &failures {
                        warn!(%error, "an interface option does not apply, a later one does");
                    }
                    return Ok(found);
                }
                Err(error) => failures.push(error),
            }
        }
        Err(match failures.len() {
            1 => failures.remove(0),
            _ => UplinkError::NoneOf(failures),
        })
    }

    fn by_value(&self, value: &str) -> Result<Found, UplinkError> {
        match value.parse::<IpAddr>() {
            Ok(IpAddr::V4(address)) => self
                .owner(address)
                .map(|index| (index, Some(address)))
                .ok_or_else(|| UplinkError::NoSuchAddress {
                    address,
                    existing: self.existing(),
                }),
            Ok(IpAddr::V6(_)) => Err(UplinkError::WrongFamily {
                value: value.to_owned(),
            }),
            Err(_) => self
                .links
                .iter()
                .find(|(_, link)| link.name == value)
                .map(|(index, _)| (*index, None))
                .ok_or_else(|| UplinkError::NoSuchInterface {
                    name: value.to_owned(),
                    existing: self.existing(),
                }),
        }
    }

    fn by_regex(&self, text: &str) -> Result<Found, UplinkError> {
        let expression = Regex::new(text).map_err(|source| UplinkError::BadExpression {
            expression: text.to_owned(),
            source: Box::new(source),
        })?;
        let by_address = self.links.iter().find_map(|(index, link)| {
            let matching = |address: &Ipv4Addr| expression.is_match(&address.to_string());
            let address = link.usable_addresses().into_iter().find(matching)?;
            Some((*index, Some(address)))
        });
        let by_name = || {
            let mut links = self.links.iter();
            let (index, _) = links.find(|(_, link)| expression.is_match(&link.name))?;
            Some((*index, None))
        };
        by_address
            .or_else(by_name)
            .ok_or_else(|| UplinkError::NoMatch {
                expression: text.to_owned(),
                existing: self.existing(),
            })
    }

    fn by_reach(&self, value: &str) -> Result<Found, UplinkError> {
        let target: Ipv4Addr = value.parse().map_err(|_| UplinkError::BadTarget {
            value: value.to_owned(),
        })?;
        let unreachable = |reason: &str| UplinkError::Unreachable {
            target,
            reason: reason.to_owned(),
        };
        match self.reach.get(&target) {
            Some(Ok(reached)) if self.links.contains_key(&reached.index) => {
                Ok((reached.index, reached.source))
            }
            Some(Err(reason)) => Err(unreachable(reason)),
            _ => Err(unreachable("its interface is gone")),
        }
    }

    fn by_default_route(&self) -> Result<Found, UplinkError> {
        for route in &self.defaults {
            match route {
                DefaultRoute::Through(index) if self.links.contains_key(index) => {
                    return Ok((*index, None));
                }
                DefaultRoute::Multipath => return Err(UplinkError::MultipathDefault),
                _ => {}
            }
        }
        Err(UplinkError::NoDefaultRoute {
            existing: self.existing(),
        })
    }

    fn owner(&self, address: Ipv4Addr) -> Option<u32> {
        self.links
            .iter()
            .find(|(_, link)| link.addresses.iter().any(|found| found.ip == address))
            .map(|(index, _)| *index)
    }

    fn existing(&self) -> Existing {
        let of = |link: &Link| link.addresses.iter().map(|address| address.ip).collect();
        Existing(
            self.links
                .values()
                .map(|link| (link.name.clone(), of(link)))
                .collect(),
        )
    }
}

impl Link {
    /// Section 16.3: global before link-local, permanent before dynamic, non-temporary before
    /// temporary, otherwise the kernel's order. Deprecated, loopback and multicast ones never.
    fn usable_addresses(&self) -> Vec<Ipv4Addr> {
        let mut usable: Vec<_> = self
            .addresses
            .iter()
            .filter(|address| {
                !address.deprecated
                    && !address.ip.is_loopback()
                    && !address.ip.is_multicast()
                    && !address.ip.is_unspecified()
                    && !address.ip.is_broadcast()
            })
            .collect();
        usable.sort_by_key(|address| {
            (
                address.ip.is_link_local(),
                !address.permanent,
                address.temporary,
            )
        });
        usable.into_iter().map(|address| address.ip).collect()
    }

    fn best_address(&self) -> Option<Ipv4Addr> {
        self.usable_addresses().first().copied()
    }
}

/// An option set to the empty text is not set.
fn given(option: Option<&String>) -> Option<&str> {
    option.map(String::as_str).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests;
