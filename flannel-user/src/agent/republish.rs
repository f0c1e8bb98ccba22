//! Carries what changed about this node to those who have to know: peers by the lease, pods by
//! the subnet file.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::sync::watch;
use tracing::{error, info};

use crate::{
    backend::{alloc, vxlan},
    health::Health,
    lease::LeaseAttributes,
    reconcile::Told,
    subnet_file::SubnetFile,
    uplink::follow::Followed,
};

/// Pause after the subnet file could not be written: new pods wait for it.
const RETRY: Duration = Duration::from_secs(5);

/// The subnet file: what it is to say, and whether it does.
pub(super) struct Announced {
    path: PathBuf,
    file: SubnetFile,
    is_written: bool,
}

impl Announced {
    /// Writes the file for the first time.
    pub(super) fn begin(path: PathBuf, file: SubnetFile) -> Self {
        let mut announced = Self {
            path,
            file,
            is_written: false,
        };
        announced.write();
        announced
    }

    /// A file that cannot be written costs new pods, not the ones that run.
    fn write(&mut self) {
        let outcome = self.file.write(&self.path);
        self.is_written = outcome.is_ok();
        if let Err(cause) = outcome {
            error!(
                error = &cause as &dyn std::error::Error,
                "new pods cannot be set up; trying again each {} s",
                RETRY.as_secs()
            );
        }
    }
}

/// Follows `told` until its sender is gone.
pub(super) async fn keep(
    mut told: watch::Receiver<Told>,
    attributes: watch::Sender<LeaseAttributes>,
    vni: Option<u32>,
    mut announced: Announced,
    health: Arc<Health>,
) {
    loop {
        health.pods_can_start(announced.is_written);
        tokio::select! {
            changed = told.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(RETRY), if !announced.is_written => {}
        }
        let now = told.borrow_and_update().clone();
        let wanted = match (now.vtep_mac, vni) {
            (Some(mac), Some(vni)) => vxlan::attributes(now.public_ip, mac, vni),
            _ => alloc::attributes(now.public_ip),
        };
        attributes.send_if_modified(|known| {
            let changed = *known != wanted;
            *known = wanted;
            changed
        });
        if announced.file.mtu != now.mtu || !announced.is_written {
            announced.file.mtu = now.mtu;
            announced.write();
            if announced.is_written {
                info!(
                    mtu = now.mtu,
                    "subnet file written; pods that run keep their MTU"
                );
            }
        }
    }
}

/// Backend `alloc` has no device in between: what the uplink is, is told.
pub(super) async fn tell_of_uplink(
    mut uplink: watch::Receiver<Followed>,
    told: watch::Sender<Told>,
) {
    while uplink.changed().await.is_ok() {
        let now = uplink.borrow_and_update().uplink.clone();
        told.send_replace(Told {
            public_ip: now.public_ip,
            vtep_mac: None,
            mtu: now.mtu,
        });
    }
}
