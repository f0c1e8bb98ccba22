//! Keeping the own lease: renewed in time, taken again when somebody removed it, and written
//! again when this node has something else to say.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info};

use crate::{
    lease::{Lease, LeaseAttributes},
    source::LeaseSource,
};

/// Pause after a failed renewal (contract section 6.4).
const RETRY: Duration = Duration::from_secs(60);
/// Pause after a failed attempt to take a removed lease again, or to publish where this node is
/// now: peers cannot reach it, so every second counts.
const RETAKE_RETRY: Duration = Duration::from_secs(1);
/// A reservation never ends; it is looked at once a day all the same.
const RESERVATION_CHECK: Duration = Duration::from_secs(24 * 3600);

/// Renews the lease in `own` for ever, `margin` before each end, and at once whenever `revoked`
/// says that it is gone from the registry or `attributes` has something new to publish.
pub async fn keep(
    source: Arc<dyn LeaseSource>,
    own: watch::Sender<Lease>,
    mut revoked: mpsc::Receiver<()>,
    mut attributes: watch::Receiver<LeaseAttributes>,
    margin: Duration,
) {
    let mut pause = until_renewal(&own.borrow(), margin, SystemTime::now());
    loop {
        // A sender that is gone has nothing more to say: renewing by the clock goes on.
        let taken_away = tokio::select! {
            () = tokio::time::sleep(pause) => false,
            Ok(()) = attributes.changed() => false,
            Some(()) = revoked.recv() => {
                error!(subnet = %own.borrow().key.v4, "the own lease was removed from the registry: taking it again");
                true
            }
        };
        let held = own.borrow().clone();
        let lease = Lease {
            attributes: attributes.borrow_and_update().clone(),
            ..held.clone()
        };
        let is_news = lease.attributes != held.attributes;
        match source.renew(&lease).await {
            Ok(renewed) => {
                if taken_away {
                    info!(subnet = %renewed.key.v4, "lease taken again");
                } else if is_news {
                    info!(subnet = %renewed.key.v4, public_ip = %renewed.attributes.public_ip, "lease published anew");
                } else {
                    debug!(subnet = %renewed.key.v4, "lease renewed");
                }
                pause = until_renewal(&renewed, margin, SystemTime::now());
                own.send_replace(renewed);
            }
            Err(cause) => {
                error!(subnet = %lease.key.v4, error = %cause, "cannot renew the lease; trying again");
                let urgent = taken_away || is_news;
                pause = after_a_failure(&held, urgent, SystemTime::now());
            }
        }
    }
}

/// Pause before the next attempt at a lease that is held still, or is lost already.
fn after_a_failure(lease: &Lease, urgent: bool, now: SystemTime) -> Duration {
    let has_ended = lease.expires.is_some_and(|end| end <= now);
    if urgent || has_ended {
        RETAKE_RETRY
    } else {
        RETRY
    }
}

/// Time from `now` to the moment of renewal. A margin longer than the lease
/// itself means halfway to its end.
fn until_renewal(lease: &Lease, margin: Duration, now: SystemTime) -> Duration {
    let Some(end) = lease.expires else {
        return RESERVATION_CHECK;
    };
    let left = end.duration_since(now).unwrap_or_default();
    left.checked_sub(margin).unwrap_or(left / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lease(left: Option<Duration>, now: SystemTime) -> Lease {
        Lease {
            key: "10.1.2.0-24".parse().expect("a key"),
            attributes: LeaseAttributes::plain([192, 0, 2, 1].into()),
            expires: left.map(|left| now + left),
        }
    }

    #[test]
    fn renewal_comes_a_margin_before_the_end() {
        let now = SystemTime::now();
        let hours = |hours: u64| Duration::from_secs(hours * 3600);
        for (left, margin, expected) in [
            (Some(hours(24)), hours(1), hours(23)),
            (Some(hours(1)), hours(1), hours(0)),
            (
                Some(Duration::from_secs(10)),
                hours(1),
                Duration::from_secs(5),
            ),
            (None, hours(1), RESERVATION_CHECK),
        ] {
            assert_eq!(
                until_renewal(&lease(left, now), margin, now),
                expected,
                "{left:?} left"
            );
        }
    }

    #[test]
    fn a_lease_that_has_ended_is_renewed_at_once() {
        let now = SystemTime::now();
        let past = Lease {
            expires: Some(now - Duration::from_secs(5)),
            ..lease(None, now)
        };
        assert_eq!(
            until_renewal(&past, Duration::from_secs(60), now),
            Duration::ZERO
        );
    }

    #[test]
    fn a_failed_renewal_is_tried_again_in_a_minute_and_a_lost_lease_at_once() {
        let now = SystemTime::now();
        let held = lease(Some(Duration::from_secs(3600)), now);
        let minute = Duration::from_secs(60);
        assert_eq!(after_a_failure(&held, false, now), minute);
        assert_eq!(after_a_failure(&held, true, now), RETAKE_RETRY);
        let after = now + Duration::from_secs(3600);
        assert_eq!(after_a_failure(&held, false, after), RETAKE_RETRY);
        assert_eq!(after_a_failure(&lease(None, now), false, after), minute);
    }
}
