//! Can classes stand for the rules that are in force?

use std::{os::fd::BorrowedFd, time::Duration};

use ipnet::Ipv4Net;

use crate::{
    datapath::ruleset::{Look, Watcher},
    error_chain::in_one_line,
};

/// The longest that classes may go on while changed rules have not been read.
const UNREAD: Duration = Duration::from_millis(100);

/// The rule sets of the calling thread's network namespace.
pub(super) struct Rules {
    network: Ipv4Net,
    watcher: Option<Watcher>,
    /// They have changed too often lately to be read at once.
    is_behind: bool,
    /// The last look did not end with having read them.
    is_unread: bool,
}

/// What they say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Judgement {
    /// Classes may stand for them.
    Fit,
    /// They may not, for this reason.
    Unfit(String),
}

impl Rules {
    /// Of pods in `network`. Nothing is read yet.
    pub(super) const fn of(network: Ipv4Net) -> Self {
        Self {
            network,
            watcher: None,
            is_behind: false,
            is_unread: true,
        }
    }

    /// Can be read when they may have changed without an event.
    pub(super) fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.watcher.as_ref().and_then(Watcher::descriptor)
    }

    /// Have they still to be read? Then they must be looked at soon, though nothing tells.
    pub(super) const fn are_unread(&self) -> bool {
        self.is_unread
    }

    /// Should they be judged now, though nothing has told of a change and it was done of late?
    /// Costs one read: `iptables-legacy` tells nobody, but takes a lock.
    pub(super) fn have_news(&mut self) -> bool {
        // In any case: what is not taken would tell of itself again and again.
        let has_news = self.watcher.as_mut().is_none_or(Watcher::has_news);
        self.is_unread || has_news
    }

    /// Reads them if they have changed; blocks for that long.
    pub(super) fn judge(&mut self) -> Judgement {
        let watcher = match &mut self.watcher {
            Some(watcher) => watcher,
            None => match Watcher::open(self.network) {
                Ok(watcher) => self.watcher.insert(watcher),
                Err(error) => return unread(&error),
            },
        };
        let look = watcher.look();
        self.is_unread = !matches!(look, Ok(Look::Read | Look::Unchanged));
        self.is_behind = match look {
            Ok(Look::Wait(wait)) => self.is_behind || wait > UNREAD,
            _ => false,
        };
        match look {
            Ok(_) if self.is_behind => {
                Judgement::Unfit("the rules change faster than they can be read".to_owned())
            }
            Ok(_) => match watcher.findings() {
                [] => Judgement::Fit,
                [finding] => Judgement::Unfit(format!("a rule depends on more: {finding}")),
                [finding, others @ ..] => Judgement::Unfit(format!(
                    "rules depend on more: {finding}, and {} others",
                    others.len()
                )),
            },
            Err(error) => unread(&error),
        }
    }
}

fn unread(error: &dyn std::error::Error) -> Judgement {
    Judgement::Unfit(format!("the rules cannot be read: {}", in_one_line(error)))
}
