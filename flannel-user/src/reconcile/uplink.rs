//! What follows from a change of the uplink: another device, and something to tell others.

use std::net::Ipv4Addr;

use tracing::{error, info};

use super::{Dirty, Reconciler};
use crate::{datapath::netlink::DeviceSpec, mac::MacAddr, uplink::follow::Followed};

/// What peers and pods of this node are told, and what changes with the uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Where peers send to.
    pub public_ip: Ipv4Addr,
    /// The tunnel device's MAC address; `None` without one.
    pub vtep_mac: Option<MacAddr>,
    /// MTU of pods, in bytes.
    pub mtu: u32,
}

impl Reconciler {
    /// Takes over the uplink as it is now; the pass that follows does the rest.
    pub(super) fn take_up(&mut self, followed: Followed) -> Dirty {
        self.setup.uplink = followed.uplink;
        self.uplink_fault = followed.fault;
        self.ways.routes_changed();
        Dirty {
            pods: false,
            ..Dirty::ALL
        }
    }

    /// Fits the tunnel device to the uplink. What fails is tried again by the next pass.
    pub(super) async fn fit_device(&mut self) {
        let Some(spec) = self.netlink.spec() else {
            return;
        };
        let wanted = self.device_spec(spec);
        if wanted == *spec {
            return;
        }
        match self.netlink.ensure_device(&wanted).await {
            Ok(device) => {
                info!(
                    device = device.name,
                    local = %wanted.local,
                    mtu = device.mtu,
                    "tunnel device fitted to the uplink"
                );
                self.device = device;
                self.fit_failure = None;
            }
            Err(cause) => {
                let text = format!("{:#}", anyhow::Error::from(cause));
                // Said already by whoever follows the uplink, while that is gone.
                if self.uplink_fault.is_none() && self.fit_failure.as_ref() != Some(&text) {
                    error!(
                        error = text,
                        "cannot fit the tunnel device to the uplink; trying on"
                    );
                }
                self.fit_failure = Some(text);
            }
        }
    }

    fn device_spec(&self, now: &DeviceSpec) -> DeviceSpec {
        let uplink = &self.setup.uplink;
        let mtu = self.setup.mtu.at_run_time(uplink.mtu);
        if let (Some(configured), true) =
            (self.setup.mtu.configured, uplink.index == now.uplink_index)
            && configured > uplink.mtu
            && mtu.as_ref().is_ok_and(|mtu| *mtu != now.mtu)
        {
            error!(
                configured,
                link = uplink.mtu,
                "Backend.MTU is larger than the uplink's MTU now: pods get what fits; lower it or raise the uplink's, else the next start is refused"
            );
        }
        DeviceSpec {
            uplink_index: uplink.index,
            local: uplink.public_ip,
            // A link that carries nothing says so in its fault; nothing is gained by a change.
            mtu: mtu.unwrap_or(now.mtu),
            ..now.clone()
        }
    }

    /// Tells the rest of the agent what others have to know.
    pub(super) fn tell(&self) {
        let told = Told {
            public_ip: self.setup.uplink.public_ip,
            vtep_mac: Some(self.device.mac),
            mtu: self.device.mtu,
        };
        self.told.send_if_modified(|known| {
            let changed = *known != told;
            *known = told;
            changed
        });
    }
}
