//! Keeps rules as they should be, until the agent ends.

use std::time::Duration;

use ipnet::Ipv4Net;
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior},
};
use tracing::{debug, info, warn};

use super::{Firewall, FirewallError, blackhole, events, pace::Pace};
use crate::datapath::netlink::rtnl::Rtnl;

/// A tool that changes rules makes many events: look when it has done its work.
const SETTLE: Duration = Duration::from_millis(10);
/// Where rules change all the time, look no more often than this.
const BUSY: Duration = Duration::from_millis(300);

/// What is looked at, and how often.
#[derive(Debug, Clone, Copy)]
pub struct Resync {
    /// `--iptables-resync`.
    pub period: Duration,
    /// `--ip-blackhole-route`: the own subnet.
    pub blackhole: Option<Ipv4Net>,
}

/// A firewall whose changes are listened to, and the means to look after it. Made before the first
/// look at the rules, so that nothing falls in between.
#[derive(Debug)]
pub struct Watch {
    events: Option<mpsc::Receiver<()>>,
    rtnl: Option<Rtnl>,
    resync: Resync,
    last_error: Option<String>,
    pace: Pace,
}

impl Watch {
    /// Starts listening in the network namespace of the calling thread, if `firewall` is of the
    /// kind that the kernel tells about.
    #[must_use]
    pub fn new(firewall: &Firewall, resync: Resync) -> Self {
        let listen = || match events::listen() {
            Ok(events) => Some(events),
            Err(error) => {
                warn!(%error, "nftables events cannot be heard: rules are looked at every period only");
                None
            }
        };
        let open = || match Rtnl::open() {
            Ok(rtnl) => Some(rtnl),
            Err(error) => {
                warn!(
                    error = &error as &dyn std::error::Error,
                    "no blackhole route"
                );
                None
            }
        };
        Self {
            events: firewall.has_events().then(listen).flatten(),
            rtnl: resync.blackhole.is_some().then(open).flatten(),
            resync,
            last_error: None,
            pace: Pace::default(),
        }
    }

    /// Looks at the rules after every event that concerns them and after every period.
    pub async fn keep(mut self, mut firewall: Firewall) {
        // Zero would mean no pause at all.
        let period = self.resync.period.max(Duration::from_secs(1));
        let mut timer = tokio::time::interval_at(Instant::now() + period, period);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked = Instant::now();
        loop {
            tokio::select! {
                _ = timer.tick() => self.ensure_blackhole().await,
                heard = next(&mut self.events) => match heard {
                    Some(()) => {
                        let settled = (Instant::now() + SETTLE).max(looked + BUSY);
                        tokio::time::sleep_until(settled).await;
                    }
                    None => self.events = None,
                },
            }
            if self
                .pace
                .not_before()
                .is_some_and(|then| Instant::now() < then)
            {
                // An event must not be lost over the pause: the rules are looked at after it.
                self.pause(&mut timer).await;
            }
            self.drain();
            let applied = firewall.apply().await;
            looked = Instant::now();
            self.note(applied.map(|changed| !changed.is_empty()));
        }
    }

    /// Waits until repairs are allowed again; the blackhole route has no part in that.
    async fn pause(&mut self, timer: &mut tokio::time::Interval) {
        while let Some(then) = self.pace.not_before().filter(|then| Instant::now() < *then) {
            tokio::select! {
                () = tokio::time::sleep_until(then) => {}
                _ = timer.tick() => self.ensure_blackhole().await,
            }
        }
    }

    /// One look serves every event up to now.
    fn drain(&mut self) {
        if let Some(events) = &mut self.events {
            while events.try_recv().is_ok() {}
        }
    }

    fn note(&mut self, repaired: Result<bool, FirewallError>) {
        let error = match repaired {
            Ok(repaired) => {
                if repaired {
                    self.note_repair();
                }
                None
            }
            Err(error) => Some(format!("{:#}", anyhow::Error::from(error))),
        };
        if error != self.last_error {
            match &error {
                Some(error) => warn!(error, "firewall rules may not be in order; trying on"),
                None => info!("firewall rules are in order again"),
            }
            self.last_error = error;
        }
    }

    fn note_repair(&mut self) {
        if self.pace.repaired(Instant::now()) {
            warn!(
                "something else keeps changing flannel's firewall rules: putting them back more slowly"
            );
        } else if self.pace.is_calm() {
            warn!("something else had changed flannel's firewall rules: put back");
        } else {
            debug!("flannel's firewall rules put back");
        }
    }

    async fn ensure_blackhole(&mut self) {
        let (Some(rtnl), Some(subnet)) = (&mut self.rtnl, self.resync.blackhole) else {
            return;
        };
        match blackhole::ensure(rtnl, subnet).await {
            Ok(true) => info!(%subnet, "blackhole route added"),
            Ok(false) => {}
            Err(error) => warn!(
                %subnet,
                error = &error as &dyn std::error::Error,
                "cannot add the blackhole route"
            ),
        }
    }
}

/// The next event; never, where there are none.
async fn next(events: &mut Option<mpsc::Receiver<()>>) -> Option<()> {
    match events {
        Some(events) => events.recv().await,
        None => std::future::pending().await,
    }
}
