//! From lease events to the wanted state.

use std::{sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tracing::warn;

use crate::{
    backend::vxlan,
    lease::{SubnetKey, table::LeaseTable},
    reconcile::feed::Feeder,
    source::{LeaseEvent, LeaseSource},
};

/// Pause after a watch could not be started.
const RETRY: Duration = Duration::from_secs(1);

/// Carries lease events into the wanted state, and tells the renewal when the own lease went.
pub(super) async fn follow(
    source: Arc<dyn LeaseSource>,
    own_key: SubnetKey,
    peers: Feeder,
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
                peers.set_in_sync(false);
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
            peers.set_conflicts(source.conflicts());
            if !changed && peers.is_in_sync() {
                continue;
            }
            let (update, skipped) = ways.follow(&table, about.as_ref());
            for lease in skipped {
                let (subnet, reason) = (lease.key, lease.reason.to_string());
                warn!(%subnet, reason, "lease left out");
            }
            peers.update(update);
        }
        warn!("the watch on leases ended; starting it again");
        peers.set_in_sync(false);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
