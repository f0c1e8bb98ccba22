//! The wanted state on its way from the leases to the loop.
//!
//! Of each subnet the latest news counts, whatever the loop is busy with: a burst of changes
//! becomes one pass, and what waits never grows beyond the table itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::{forwarding::Update, source::Conflict};

/// What was posted since the loop last looked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct News {
    /// The ways to peers.
    pub update: Update,
    /// Claims of other agents on what this one holds; `None` where nothing changed.
    pub conflicts: Option<Vec<Conflict>>,
    /// A snapshot has been applied and the source has no known fault; `None` where nothing changed.
    pub in_sync: Option<bool>,
}

#[derive(Debug, Default)]
struct Board {
    /// `None`: all of it was taken.
    news: Option<News>,
    conflicts: Vec<Conflict>,
    in_sync: bool,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    board: Mutex<Board>,
    posted: Notify,
}

impl Shared {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The leases' end.
#[derive(Debug)]
pub struct Feeder(Arc<Shared>);

/// The loop's end.
#[derive(Debug)]
pub struct Feed(Arc<Shared>);

/// Both ends; at first nothing is wanted and nothing in sync.
#[must_use]
pub fn feed() -> (Feeder, Feed) {
    let shared = Arc::new(Shared::default());
    (Feeder(Arc::clone(&shared)), Feed(shared))
}

impl Feeder {
    /// The ways to peers are as `update` says, and complete.
    pub fn update(&self, update: Update) {
        let mut board = self.0.board();
        board.in_sync = true;
        let news = board.news.get_or_insert_default();
        news.update.then(update);
        news.in_sync = Some(true);
        self.0.posted.notify_one();
    }

    /// Whether the source is known to tell everything.
    pub fn set_in_sync(&self, in_sync: bool) {
        let mut board = self.0.board();
        if board.in_sync != in_sync {
            board.in_sync = in_sync;
            board.news.get_or_insert_default().in_sync = Some(in_sync);
            self.0.posted.notify_one();
        }
    }

    /// As it was set last.
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        self.0.board().in_sync
    }

    /// Others claim this.
    pub fn set_conflicts(&self, conflicts: Vec<Conflict>) {
        let mut board = self.0.board();
        if board.conflicts != conflicts {
            board.conflicts.clone_from(&conflicts);
            board.news.get_or_insert_default().conflicts = Some(conflicts);
            self.0.posted.notify_one();
        }
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.0.board().closed = true;
        self.0.posted.notify_one();
    }
}

impl Feed {
    /// Waits for news; `None` when the other end is gone. Nothing is lost where the wait is given up.
    pub async fn next(&mut self) -> Option<News> {
        loop {
            let posted = self.0.posted.notified();
            {
                let mut board = self.0.board();
                if let Some(news) = board.news.take() {
                    return Some(news);
                }
                if board.closed {
                    return None;
                }
            }
            posted.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use futures_util::FutureExt as _;

    use super::*;
    use crate::forwarding::Via;

    fn some(subnet: &str, last: Option<u8>) -> Update {
        let via = last.map(|last| Via::Vxlan {
            node: [192, 168, 50, last].into(),
            vtep_mac: crate::mac::MacAddr([2, 0, 0, 0, 0, last]),
        });
        Update::Some(BTreeMap::from([(subnet.parse().expect("a subnet"), via)]))
    }

    #[test]
    fn what_waits_is_one_piece_of_news_and_then_there_is_none() {
        let (feeder, mut feed) = feed();
        assert!(feed.next().now_or_never().is_none());
        feeder.update(some("10.244.2.0/24", Some(2)));
        feeder.update(some("10.244.3.0/24", Some(3)));
        feeder.update(some("10.244.2.0/24", None));
        let news = feed.next().now_or_never().flatten().expect("news");
        assert_eq!(news.in_sync, Some(true));
        let mut expected = some("10.244.3.0/24", Some(3));
        expected.then(some("10.244.2.0/24", None));
        assert_eq!(news.update, expected);
        assert!(feed.next().now_or_never().is_none());

        feeder.set_in_sync(true);
        feeder.set_conflicts(Vec::new());
        assert!(feed.next().now_or_never().is_none(), "nothing changed");
        feeder.set_in_sync(false);
        let news = feed.next().now_or_never().flatten().expect("news");
        assert_eq!(
            (news.in_sync, news.update),
            (Some(false), Update::default())
        );
        drop(feeder);
        assert_eq!(feed.next().now_or_never(), Some(None));
    }

    #[tokio::test]
    async fn a_wait_that_was_given_up_loses_nothing() {
        let (feeder, mut feed) = feed();
        let waiting = tokio::spawn(async move {
            let _ = tokio::time::timeout(std::time::Duration::from_millis(1), feed.next()).await;
            feed.next().await
        });
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        feeder.update(some("10.244.2.0/24", Some(2)));
        let news = waiting.await.expect("no panic").expect("news");
        assert_eq!(news.update, some("10.244.2.0/24", Some(2)));
    }
}
