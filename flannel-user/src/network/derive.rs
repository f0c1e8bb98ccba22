//! The subnets of a network: what is asked for, checked, and what follows from
//! the rest (contract section 3.2).

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::NetworkConfigError;

/// Longest prefix of one node's subnet.
const MAX_LEN: u8 = 30;
/// Bits that four subnets need.
const ROOM: u8 = 2;
/// Prefix length of a subnet where the network has room for it.
const USUAL_LEN: u8 = 24;

/// The config's own words; absent is `None`, and so are 0 and 0.0.0.0.
pub(super) struct Asked {
    pub(super) network: Option<Ipv4Net>,
    pub(super) subnet_len: Option<u64>,
    pub(super) subnet_min: Option<Ipv4Addr>,
    pub(super) subnet_max: Option<Ipv4Addr>,
}

/// What every node works with.
pub(super) struct Subnets {
    pub(super) network: Ipv4Net,
    pub(super) len: u8,
    pub(super) min: Ipv4Addr,
    pub(super) max: Ipv4Addr,
}

impl Asked {
    pub(super) fn derive(&self) -> Result<Subnets, NetworkConfigError> {
        let network = self
            .network
            .map(|network| network.trunc())
            .filter(|network| *network != Ipv4Net::default())
            .ok_or(NetworkConfigError::NoNetwork)?;
        let len = self.len(network)?;
        let subnet = 1u32 << (32 - len);
        // The first and the last subnet stay unused unless asked for.
        let first = u32::from(network.network()).wrapping_add(subnet);
        let last = u32::from(network.broadcast())
            .wrapping_add(1)
            .wrapping_sub(subnet);
        let bound = |key, asked: Option<Ipv4Addr>, usual: u32| {
            asked
                .filter(|address| !address.is_unspecified())
                .map_or(Ok(usual.into()), |address| {
                    checked(key, address, network, len)
                })
        };
        Ok(Subnets {
            network,
            len,
            min: bound("SubnetMin", self.subnet_min, first)?,
            max: bound("SubnetMax", self.subnet_max, last)?,
        })
    }

    fn len(&self, network: Ipv4Net) -> Result<u8, NetworkConfigError> {
        let prefix = network.prefix_len();
        match self.subnet_len.unwrap_or(0) {
            0 if prefix > MAX_LEN - ROOM => Err(NetworkConfigError::NetworkTooSmall { network }),
            0 => Ok(USUAL_LEN.max(prefix + ROOM)),
            len if len > MAX_LEN.into() => Err(NetworkConfigError::SubnetTooSmall { len }),
            len if len < u64::from(prefix + ROOM) => {
                Err(NetworkConfigError::TooFewSubnets { network, len })
            }
            len => u8::try_from(len).map_err(|_| NetworkConfigError::SubnetTooSmall { len }),
        }
    }
}

fn checked(
    key: &'static str,
    address: Ipv4Addr,
    network: Ipv4Net,
    len: u8,
) -> Result<Ipv4Addr, NetworkConfigError> {
    if !network.contains(&address) {
        return Err(NetworkConfigError::OutsideNetwork {
            key,
            address,
            network,
        });
    }
    let nearest = Ipv4Addr::from(u32::from(address) & (u32::MAX << (32 - len)));
    if nearest == address {
        Ok(address)
    } else {
        Err(NetworkConfigError::NotAligned {
            key,
            address,
            len,
            nearest,
        })
    }
}
