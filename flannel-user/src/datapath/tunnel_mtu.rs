//! MTU of the tunnel: the uplink's or the configured one, less what VXLAN adds.

/// Bytes that VXLAN over IPv4 adds to a packet.
const OVERHEAD: u32 = 50;
/// The smallest MTU of IPv4 (RFC 791).
const LEAST: u32 = 68;

/// How the tunnel's MTU comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TunnelMtu {
    /// `Backend.MTU`: that of outer packets, in bytes.
    pub configured: Option<u32>,
}

/// Why there is no MTU for the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MtuError {
    /// Packets of that size cannot leave.
    #[error(
        "Backend.MTU {configured} is larger than the uplink's MTU {link}: lower it to {link} or less, or raise the uplink's"
    )]
    LargerThanLink {
        /// `Backend.MTU`.
        configured: u32,
        /// The uplink's.
        link: u32,
    },
    /// Not even the smallest packet fits.
    #[error("MTU {outer} leaves no room for VXLAN's {OVERHEAD} bytes and a packet of {LEAST}: raise it to {} or more", OVERHEAD + LEAST)]
    TooSmall {
        /// MTU of outer packets.
        outer: u32,
    },
}

impl TunnelMtu {
    /// For a start on an uplink with MTU `link`: what cannot be is refused.
    ///
    /// # Errors
    /// Says which MTU is too large or too small.
    pub fn at_start(self, link: u32) -> Result<u32, MtuError> {
        match self.configured {
            Some(configured) if configured > link => {
                Err(MtuError::LargerThanLink { configured, link })
            }
            configured => inner(configured.unwrap_or(link)),
        }
    }

    /// After the uplink's MTU became `link`: pods are better served by less than was configured
    /// than by an agent that ends.
    ///
    /// # Errors
    /// The link carries no packet at all.
    pub fn at_run_time(self, link: u32) -> Result<u32, MtuError> {
        inner(
            self.configured
                .map_or(link, |configured| configured.min(link)),
        )
    }
}

fn inner(outer: u32) -> Result<u32, MtuError> {
    match outer.checked_sub(OVERHEAD) {
        Some(mtu) if mtu >= LEAST => Ok(mtu),
        _ => Err(MtuError::TooSmall { outer }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOT_CONFIGURED: TunnelMtu = TunnelMtu { configured: None };

    fn configured(mtu: u32) -> TunnelMtu {
        TunnelMtu {
            configured: Some(mtu),
        }
    }

    #[test]
    fn the_tunnel_takes_fifty_bytes_of_the_link() {
        assert_eq!(NOT_CONFIGURED.at_start(1500), Ok(1450));
        assert_eq!(configured(1400).at_start(1500), Ok(1350));
        assert_eq!(NOT_CONFIGURED.at_run_time(9000), Ok(8950));
    }

    #[test]
    fn an_mtu_that_cannot_be_is_refused_by_name() {
        let too_large = configured(9000).at_start(1500).expect_err("larger");
        let text = too_large.to_string();
        assert!(text.contains("9000") && text.contains("1500"), "{text}");
        assert_eq!(
            configured(60).at_start(1500),
            Err(MtuError::TooSmall { outer: 60 })
        );
    }

    #[test]
    fn a_link_that_shrinks_below_the_config_takes_the_tunnel_along() {
        assert_eq!(configured(1400).at_run_time(1300), Ok(1250));
        assert_eq!(configured(1400).at_run_time(9000), Ok(1350));
        assert!(configured(1400).at_run_time(100).is_err());
    }
}
