//! From lease events to the wanted state.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tracing::warn;

use crate::{
    backend::vxlan,
    lease::{SubnetKey, table::LeaseTable},
    reconcile::Peers,
    source::{LeaseEvent, LeaseSource},
};

/// Pause after a watch could not be started.
const RETRY: Duration = Duration::from_secs(1);

/// Carries lease events into the wanted state, and tells the renewal when the own lease went.
pub(super) async fn follow(
    source: Arc<dyn LeaseSource>,
    own_key: SubnetKey,
    peers: watch::Sender<Peers>,
    revoked: mpsc::Sender<()>,
) {
    let mut table = LeaseTable::new(&own_key);
    let mut ways = vxlan::Ways::default();
    loop {
        let mut events = match source.watch().await {
            Ok(events) => events,
            Err(error) => {
                warn!(
                    error = format!("{error:#}"),
                    "cannot watch leases; trying again"
                );
                peers.send_modify(|peers| peers.in_sync = false);
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        while let Some(event) = events.recv().await {
            let had_own = table.own().is_some();
            let about = match &event {
                LeaseEvent::Snapshot(_) => None,
                LeaseEvent::Put(lease) => Some(lease.key),
                LeaseEvent::Removed(key) => Some(*key),
            };
            let changed = table.apply(event);
            if had_own && table.own().is_none() {
                let _ = revoked.try_send(());
            }
            let conflicts = source.conflicts();
            peers.send_if_modified(|peers| {
                let changed = peers.conflicts != conflicts;
                peers.conflicts = conflicts;
                changed
            });
            if !changed && peers.borrow().in_sync {
                continue;
            }
            for lease in ways.follow(&table, about.as_ref()) {
                let (subnet, reason) = (lease.key, lease.reason.to_string());
                warn!(%subnet, reason, "lease left out");
            }
            peers.send_modify(|peers| {
                peers.table = ways.table();
                peers.in_sync = true;
            });
        }
        warn!("the watch on leases ended; starting it again");
        peers.send_modify(|peers| peers.in_sync = false);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
