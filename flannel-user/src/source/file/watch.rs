//! Following the directory: a snapshot, then what changed.
//!
//! inotify only says *when* to look; what changed is found by comparing whole lists, so
//! no lost or merged event can lose a lease. Network file systems tell nothing of other
//! machines' writes, therefore a slow look in between.

use std::{
    collections::BTreeMap,
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use futures_util::{FutureExt, StreamExt};
use inotify::{EventStream, Inotify, WatchMask, Watches};
use tokio::sync::mpsc;

use super::{Shared, directory::Expiry};
use crate::{
    lease::{Lease, SubnetKey},
    source::LeaseEvent,
};

/// A look at everything when nothing was heard.
const RESCAN: Duration = Duration::from_secs(5);
/// Changes often come in groups (expiry, lease); one look serves them all.
const SETTLE: Duration = Duration::from_millis(5);
/// Never look more often than this for a lease about to expire.
const SHORTEST_WAIT: Duration = Duration::from_millis(50);
/// Room for events that the receiver has not taken yet; then the watch waits.
const QUEUE: usize = 256;

/// The first look happens here, so that its failure is the caller's to see.
pub(super) async fn start(shared: Arc<Shared>) -> anyhow::Result<mpsc::Receiver<LeaseEvent>> {
    shared.directory.prepare()?;
    let mut alarm = Alarm::new(&shared);
    let mut follower = Follower::new(shared);
    let first;
    (follower, first) = look(follower).await?;
    let events = first?;
    let (sender, receiver) = mpsc::channel(QUEUE);
    tokio::spawn(async move {
        if let Err(error) = follow(follower, &mut alarm, events, &sender).await {
            tracing::error!(
                error = format!("{error:#}"),
                "the watch of the leases ended"
            );
        }
    });
    Ok(receiver)
}

async fn follow(
    mut follower: Follower,
    alarm: &mut Alarm,
    mut events: Vec<LeaseEvent>,
    sender: &mpsc::Sender<LeaseEvent>,
) -> anyhow::Result<()> {
    loop {
        for event in events {
            if sender.send(event).await.is_err() {
                return Ok(());
            }
        }
        tokio::select! {
            () = sender.closed() => return Ok(()),
            () = alarm.wait(follower.next_look()) => {}
        }
        let result;
        (follower, result) = look(follower).await?;
        events = follower.complain_of_scan(result);
    }
}

/// One scan, where it holds up nobody.
async fn look(
    mut follower: Follower,
) -> anyhow::Result<(Follower, anyhow::Result<Vec<LeaseEvent>>)> {
    tokio::task::spawn_blocking(move || {
        let events = follower.scan();
        (follower, events)
    })
    .await
    .context("the scan of the lease directory ended early")
}

/// What wakes the watch.
struct Alarm {
    shared: Arc<Shared>,
    inotify: Option<(EventStream<Vec<u8>>, Watches)>,
}

impl Alarm {
    fn new(shared: &Arc<Shared>) -> Self {
        let inotify = Inotify::init().and_then(|inotify| {
            let watches = inotify.watches();
            Ok((inotify.into_event_stream(vec![0; 4096])?, watches))
        });
        let inotify = inotify.inspect_err(|error| {
            tracing::warn!(%error, "no inotify (see fs.inotify.max_user_instances), looking every {} s instead", RESCAN.as_secs());
        });
        let mut alarm = Self {
            shared: Arc::clone(shared),
            inotify: inotify.ok(),
        };
        alarm.arm();
        alarm
    }

    /// A directory that was removed and made again is another one to inotify; the same
    /// one again is no change.
    fn arm(&mut self) {
        let Some((_, watches)) = &mut self.inotify else {
            return;
        };
        let mask = WatchMask::CREATE
            | WatchMask::CLOSE_WRITE
            | WatchMask::MOVED_TO
            | WatchMask::MOVED_FROM
            | WatchMask::DELETE;
        let directory = &self.shared.directory;
        for path in [directory.subnets(), directory.expiries()] {
            if let Err(error) = watches.add(&path, mask) {
                tracing::debug!(path = %path.display(), %error, "cannot watch");
            }
        }
    }

    /// Until a file changed, or `at_most` has passed.
    async fn wait(&mut self, at_most: Duration) {
        if tokio::time::timeout(at_most, self.change()).await.is_ok() {
            tokio::time::sleep(SETTLE).await;
            while self.change().now_or_never().is_some() {}
        } else {
            self.arm();
        }
    }

    /// The next change of a file that counts. Without inotify there is none.
    async fn change(&mut self) {
        loop {
            let Some((stream, _)) = &mut self.inotify else {
                return std::future::pending().await;
            };
            match pin!(stream.next()).await {
                Some(Ok(event)) => {
                    let name = event.name.unwrap_or_default();
                    if !name.to_string_lossy().starts_with('.') {
                        return;
                    }
                }
                Some(Err(error)) => {
                    tracing::warn!(%error, "inotify failed, looking every {} s instead", RESCAN.as_secs());
                    self.inotify = None;
                }
                None => self.inotify = None,
            }
        }
    }
}

/// What was last reported, and what was last complained of.
pub(super) struct Follower {
    shared: Arc<Shared>,
    /// `None` before the first scan.
    reported: Option<BTreeMap<SubnetKey, Lease>>,
    /// File → what is wrong with it, each said once.
    complaints: BTreeMap<String, String>,
    scan_fault: Option<String>,
    expiry_fault: Option<String>,
}

impl Follower {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            reported: None,
            complaints: BTreeMap::new(),
            scan_fault: None,
            expiry_fault: None,
        }
    }

    /// Looks at everything and says what changed since the last time; the first time, a
    /// snapshot.
    pub(super) fn scan(&mut self) -> anyhow::Result<Vec<LeaseEvent>> {
        let mut current = self.read()?;
        let fault = self.expire(&mut current).err();
        let fault = fault.map(|error| format!("{error:#}"));
        if let Some(error) = fault.as_ref().filter(|_| fault != self.expiry_fault) {
            tracing::warn!(error, "cannot remove expired leases, they stay in force");
        }
        self.expiry_fault = fault;
        let events = match &self.reported {
            None => vec![LeaseEvent::Snapshot(current.values().cloned().collect())],
            Some(before) => difference(before, &current),
        };
        for event in &events {
            self.shared.own.observe(event);
        }
        self.reported = Some(current);
        Ok(events)
    }

    /// The leases as they are; of a damaged file the last good value.
    fn read(&mut self) -> anyhow::Result<BTreeMap<SubnetKey, Lease>> {
        let directory = &self.shared.directory;
        let mut listing = directory.list()?;
        // A listing may miss a file that is replaced meanwhile; its path never does.
        for key in self.reported.iter().flat_map(BTreeMap::keys) {
            if !listing.entries.contains_key(key)
                && let Some(entry) = directory.read(key)
            {
                listing.entries.insert(*key, entry);
            }
        }
        if directory.has_orphans(&listing) {
            let tidied = directory.lock().and_then(|locked| locked.tidy());
            if let Err(error) = tidied {
                tracing::debug!(error = format!("{error:#}"), "cannot tidy up");
            }
        }

        let mut complaints = BTreeMap::new();
        for name in listing.foreign {
            complaints.insert(name, "its name is no subnet key".to_owned());
        }
        let mut leases = BTreeMap::new();
        for (key, entry) in listing.entries {
            let before = self.reported.as_ref().and_then(|leases| leases.get(&key));
            let expires = match &entry.expiry {
                Expiry::Unreadable(cause) => {
                    complaints.insert(format!("{key} (expiry)"), cause.clone());
                    before.and_then(|lease| lease.expires)
                }
                readable => readable.moment(),
            };
            let attributes = match entry.attributes {
                Ok(attributes) => Some(attributes),
                Err(cause) => {
                    complaints.insert(key.to_string(), cause);
                    before.map(|lease| lease.attributes.clone())
                }
            };
            if let Some(attributes) = attributes {
                let lease = Lease {
                    key,
                    attributes,
                    expires,
                };
                leases.insert(key, lease);
            }
        }
        self.complain(complaints);
        Ok(leases)
    }

    /// Says what is newly wrong, and what is right again.
    fn complain(&mut self, complaints: BTreeMap<String, String>) {
        let subnets = self.shared.directory.subnets();
        for (name, cause) in &complaints {
            if self.complaints.get(name) != Some(cause) {
                let file = subnets.join(name);
                tracing::warn!(file = %file.display(), cause, "skipped a lease file; its last good value stays in force");
            }
        }
        for name in self.complaints.keys() {
            if !complaints.contains_key(name) {
                let file = subnets.join(name);
                tracing::info!(file = %file.display(), "the lease file is readable again or gone");
            }
        }
        self.complaints = complaints;
    }

    /// Removes what has run out, if the file system's clock says so too. The own lease
    /// and reservations stay.
    fn expire(&self, leases: &mut BTreeMap<SubnetKey, Lease>) -> anyhow::Result<()> {
        let now = SystemTime::now();
        let suspects: Vec<SubnetKey> = leases
            .values()
            .filter(|lease| lease.expires.is_some_and(|end| end <= now))
            .filter(|lease| !self.is_own(lease))
            .map(|lease| lease.key)
            .collect();
        if suspects.is_empty() {
            return Ok(());
        }
        let locked = self.shared.directory.lock()?;
        let now = locked.now();
        for key in suspects {
            // It may have been renewed since the listing.
            match self.shared.directory.read_expiry(&key) {
                expiry if expiry.is_over(now) => {
                    locked.remove(&key)?;
                    tracing::info!(subnet = %key, "removed an expired lease");
                    leases.remove(&key);
                }
                expiry => {
                    if let (Some(lease), Some(end)) = (leases.get_mut(&key), expiry.moment()) {
                        lease.expires = Some(end);
                    }
                }
            }
        }
        Ok(())
    }

    fn is_own(&self, lease: &Lease) -> bool {
        self.shared.own.lease().is_some_and(|own| {
            own.key == lease.key || own.attributes.public_ip == lease.attributes.public_ip
        })
    }

    /// When to look again if nothing is heard: soon after the next lease runs out.
    fn next_look(&self) -> Duration {
        let now = SystemTime::now();
        let leases = self.reported.iter().flat_map(BTreeMap::values);
        leases
            .filter(|lease| !self.is_own(lease))
            .filter_map(|lease| lease.expires)
            // What is overdue here is not yet so by the file system's clock.
            .filter_map(|end| end.duration_since(now).ok())
            .min()
            .map_or(RESCAN, |left| (left + SHORTEST_WAIT).min(RESCAN))
    }

    /// A directory that cannot be read changes nothing; it is said once.
    fn complain_of_scan(&mut self, result: anyhow::Result<Vec<LeaseEvent>>) -> Vec<LeaseEvent> {
        match result {
            Ok(events) => {
                if self.scan_fault.take().is_some() {
                    tracing::info!("the leases can be read again");
                }
                events
            }
            Err(error) => {
                let fault = format!("{error:#}");
                if self.scan_fault.as_ref() != Some(&fault) {
                    tracing::warn!(error = fault, "keeping the leases known so far");
                    self.scan_fault = Some(fault);
                }
                Vec::new()
            }
        }
    }
}

fn difference(
    before: &BTreeMap<SubnetKey, Lease>,
    current: &BTreeMap<SubnetKey, Lease>,
) -> Vec<LeaseEvent> {
    let removed = before.keys().filter(|key| !current.contains_key(key));
    let put = current
        .values()
        .filter(|lease| before.get(&lease.key) != Some(lease));
    removed
        .map(|key| LeaseEvent::Removed(*key))
        .chain(put.map(|lease| LeaseEvent::Put(lease.clone())))
        .collect()
}
