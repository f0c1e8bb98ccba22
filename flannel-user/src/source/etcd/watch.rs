//! Following the registry: a list, then a watch from the revision after it
//! (contract section 6.6).

use std::{sync::Arc, time::SystemTime};

use etcd_client::{EventType, WatchOptions, WatchResponse, WatchStream};
use tokio::sync::mpsc;

use super::{
    EtcdError, Shared,
    backoff::Backoff,
    cluster::Connection,
    follower::Follower,
    registry::{Entry, LARGEST_ANSWER},
};
use crate::source::LeaseEvent;

/// Room for events that the receiver has not taken yet; then the watch waits.
const QUEUE: usize = 256;

/// Different causes that one outage may put into the log.
const MOST_FAULTS: usize = 5;

/// Events arrive until the receiver is dropped, the snapshot as soon as etcd can be read.
pub(super) fn start(shared: Arc<Shared>) -> mpsc::Receiver<LeaseEvent> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let watch = Watch {
        follower: Follower::new(shared.registry.keys().clone()),
        shared,
        sender: sender.clone(),
        resume: Resume::List,
        backoff: Backoff::default(),
        faults: Vec::new(),
    };
    tokio::spawn(async move {
        tokio::select! {
            () = sender.closed() => {}
            Closed = watch.run() => {}
        }
    });
    receiver
}

/// The receiver was dropped.
struct Closed;

/// Where to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resume {
    /// From a fresh list.
    List,
    /// From this revision, which follows a list that was just read.
    FromList(i64),
    /// From this revision, which follows the last event seen.
    FromEvent(i64),
}

/// Why a watch came to its end.
#[derive(Debug)]
enum End {
    /// What is to be resumed from is gone, or from another history.
    Outdated,
    Failed(EtcdError),
    Closed,
}

struct Watch {
    shared: Arc<Shared>,
    follower: Follower,
    sender: mpsc::Sender<LeaseEvent>,
    resume: Resume,
    backoff: Backoff,
    /// What was said to be wrong since the watch last worked.
    faults: Vec<String>,
}

impl Watch {
    async fn run(mut self) -> Closed {
        loop {
            match self.follow().await {
                End::Closed => return Closed,
                End::Outdated => {
                    tracing::info!(
                        "the leases' history does not reach back far enough, listing them again"
                    );
                    self.resume = Resume::List;
                }
                End::Failed(error) => self.complain(&error),
            }
            tokio::time::sleep(self.backoff.next()).await;
        }
    }

    /// Until the connection fails or the history ends.
    async fn follow(&mut self) -> End {
        let from = match self.resume {
            Resume::FromList(revision) | Resume::FromEvent(revision) => revision,
            Resume::List => match self.list().await {
                Ok(Some(revision)) => revision,
                Ok(None) => return End::Closed,
                Err(error) => return End::Failed(error),
            },
        };
        let (connection, mut stream) = match self.open(from).await {
            Ok(Some(open)) => open,
            Ok(None) => return End::Outdated,
            Err(error) => return End::Failed(error),
        };
        self.recovered();
        let shared = Arc::clone(&self.shared);
        let cluster = shared.registry.cluster();
        let dropped = cluster.until_dropped(&connection);
        tokio::pin!(dropped);
        loop {
            let response = tokio::select! {
                response = stream.message() => response,
                () = &mut dropped => {
                    return End::Failed(cluster.error(&connection, "the connection was given up"));
                }
            };
            let fault = match response {
                Ok(Some(response)) if !response.canceled() => {
                    if self.apply(response).await.is_err() {
                        return End::Closed;
                    }
                    continue;
                }
                Ok(Some(response)) if is_compacted(&response) => return End::Outdated,
                Ok(Some(response)) => reason(&response),
                Ok(None) => "the watch was ended".to_owned(),
                Err(error) => error.to_string(),
            };
            // A new connection also brings a new token.
            cluster.drop_connection(&connection);
            return End::Failed(cluster.error(&connection, &fault));
        }
    }

    /// Lists everything and reports it. The revision to go on from.
    async fn list(&mut self) -> Result<Option<i64>, EtcdError> {
        let listing = self.shared.registry.list().await?;
        let from = listing.revision + 1;
        let snapshot = self.follower.replace(listing, self.latest_end());
        self.shared.own.observe(&snapshot);
        self.resume = Resume::FromList(from);
        Ok(self.sender.send(snapshot).await.is_ok().then_some(from))
    }

    /// A watch that etcd has confirmed. `None` when it cannot go on from there.
    async fn open(&self, from: i64) -> Result<Option<(Connection, WatchStream)>, EtcdError> {
        let registry = &self.shared.registry;
        let connection = registry.cluster().connection().await?;
        let open = async {
            let options = WatchOptions::new()
                .with_range(registry.keys().subnets_end())
                .with_start_revision(from);
            let mut client = connection
                .client
                .watch_client()
                .max_decoding_message_size(LARGEST_ANSWER);
            let key = registry.keys().subnets.as_str();
            let mut stream = client.watch(key, Some(options)).await?;
            let created = stream.message().await?;
            Ok((stream, created))
        };
        let (stream, created) = registry.cluster().ask(&connection, 1, open).await?;
        let Some(created) = created else {
            registry.cluster().drop_connection(&connection);
            return Err(registry.cluster().error(&connection, "no watch is created"));
        };
        if created.canceled() && is_compacted(&created) {
            return Ok(None);
        }
        if created.canceled() {
            registry.cluster().drop_connection(&connection);
            return Err(registry.cluster().error(&connection, &reason(&created)));
        }
        // A registry restored from a backup counts its revisions from further back, and
        // would be silent until it has caught up. A member that lags behind looks the same
        // for a moment, and costs one list.
        let there = created.header().map_or(0, |header| header.revision());
        if matches!(self.resume, Resume::FromEvent(_)) && there < from - 1 {
            return Ok(None);
        }
        Ok(Some((connection, stream)))
    }

    /// Reports the events of one response. The resume revision follows the last event,
    /// not the response: etcd delivers a long history in several responses, each of which
    /// names the newest revision.
    async fn apply(&mut self, response: WatchResponse) -> Result<(), Closed> {
        self.backoff.reset();
        let end = self.latest_end();
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let next = Resume::FromEvent(kv.mod_revision() + 1);
            let change = match event.event_type() {
                EventType::Put => self.follower.put(&Entry::of(kv.clone()), end),
                EventType::Delete => self.follower.delete(kv.key(), end),
            };
            if let Some(change) = change {
                self.shared.own.observe(&change);
                self.sender.send(change).await.map_err(|_| Closed)?;
            }
            self.resume = next;
        }
        Ok(())
    }

    fn latest_end(&self) -> SystemTime {
        SystemTime::now() + self.shared.registry.lease_ttl()
    }

    /// The first fault of an outage is often only its shadow ("connection reset"); what is
    /// really wrong comes with the next attempts, so each cause is said once.
    fn complain(&mut self, error: &EtcdError) {
        let text = error.to_string();
        if self.faults.contains(&text) || self.faults.len() >= MOST_FAULTS {
            tracing::debug!(error = text, "still cannot follow the leases");
            return;
        }
        tracing::warn!(
            error = text,
            "cannot follow the leases; what is known of them stays in force"
        );
        self.faults.push(text);
    }

    fn recovered(&mut self) {
        self.backoff.reset();
        if !self.faults.is_empty() {
            self.faults.clear();
            tracing::info!("following the leases again");
        }
    }
}

/// True when what was to be resumed from is compacted.
fn is_compacted(response: &WatchResponse) -> bool {
    response.compact_revision() > 0
}

fn reason(response: &WatchResponse) -> String {
    format!("the watch was cancelled: {}", response.cancel_reason())
}
