//! Reads the rule sets when they may have changed, and not more often than they are worth.

use std::{
    io,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
use tracing::debug;

use super::{
    ipset::Sets,
    judge::{Finding, Ruleset},
    legacy,
    legacy_tables::{self, LegacyTables},
    nft::Netfilter,
    pods::Pods,
    xt::SOURCE_PORT_IN_IPSET,
};

/// Rest between two readings, as a multiple of what the last one took: on hosts whose rules change
/// all the time, reading takes a sixth of a core at most.
const REST: u32 = 5;
/// The most: on a busy machine readings take long though they cost little.
const MOST_REST: Duration = Duration::from_secs(1);
/// The least.
const LEAST_REST: Duration = Duration::from_millis(10);
/// How often the legacy tables are compared that nobody is known to have changed.
const LEGACY_PERIOD: Duration = Duration::from_secs(10);
/// How often they are asked for number and size of their rules.
const EXTENT_PERIOD: Duration = Duration::from_secs(1);

/// Why it is not known what the rules depend on. No class may be used then.
#[derive(Debug, thiserror::Error)]
pub enum RulesetError {
    /// The kernel did not answer.
    #[error("cannot {action} nftables")]
    Nftables {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There are legacy tables and no tool to read them.
    #[error("cannot read the legacy tables of iptables ({tables})")]
    Legacy {
        /// Which there are.
        tables: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What a look brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Nothing has changed since the last reading.
    Unchanged,
    /// The rules were read; [`Watcher::findings`] is new.
    Read,
    /// They have changed, but were read so recently that it must wait this long.
    Wait(Duration),
}

/// Knows what the rules of a network namespace depend on.
#[derive(Debug)]
pub struct Watcher {
    netfilter: Netfilter,
    legacy: LegacyTables,
    pods: Pods,
    /// Of nftables, when they were read.
    generation: Option<u32>,
    extents: Vec<(String, u32, u32)>,
    /// The legacy rules as they were read.
    text: String,
    looked_at_legacy: Option<Instant>,
    /// Their lock was held since the last look.
    was_locked: bool,
    asked_extents: Option<Instant>,
    /// When the last reading ended, and how long it took.
    last: Option<(Instant, Duration)>,
    /// Of the last reading of everything: how many rules, and how long it took.
    effort: Option<(usize, Duration)>,
    findings: Vec<Finding>,
}

impl Watcher {
    /// A watcher of the calling thread's namespace that has read nothing yet. `network` holds the
    /// addresses of all pods.
    ///
    /// # Errors
    /// The socket's.
    pub fn open(network: Ipv4Net) -> Result<Self, RulesetError> {
        let netfilter = Netfilter::open().map_err(|source| RulesetError::Nftables {
            action: "open a socket for",
            source,
        })?;
        Ok(Self {
            netfilter,
            legacy: LegacyTables::new(),
            pods: Pods(network),
            generation: None,
            extents: Vec::new(),
            text: String::new(),
            looked_at_legacy: None,
            was_locked: false,
            asked_extents: None,
            last: None,
            effort: None,
            findings: Vec::new(),
        })
    }

    /// Readable when the legacy rules may have changed: a reason to look. For nftables the
    /// caller listens to its events. What neither tells is found by looking once a second.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.legacy.descriptor()
    }

    /// Has something happened that [`Watcher::descriptor`] tells of? For callers that look at it
    /// now and then instead of waiting.
    pub fn has_news(&mut self) -> bool {
        self.was_locked |= self.legacy.was_locked();
        self.was_locked
    }

    /// The rules that a class cannot stand for, as they were read last.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// How many rules were read last, and how long it took.
    #[must_use]
    pub fn effort(&self) -> (usize, Duration) {
        self.effort.unwrap_or_default()
    }

    /// Reads the rules if they may have changed. Blocks while the kernel answers; costs next to
    /// nothing if nothing has changed.
    ///
    /// # Errors
    /// It is not known what the rules depend on; what was found before may be wrong.
    pub fn look(&mut self) -> Result<Look, RulesetError> {
        // Before reading, so that what happens meanwhile is seen the next time.
        let was_locked = self.has_news();
        self.was_locked = false;
        if was_locked {
            self.looked_at_legacy = None;
        }
        if self.legacy_extents_changed(was_locked) {
            self.looked_at_legacy = None;
        }
        let generation = self.netfilter.generation();
        let generation = generation.map_err(|source| RulesetError::Nftables {
            action: "ask for the generation of",
            source,
        })?;
        let has_legacy = !self.extents.is_empty();
        let legacy_is_due = (has_legacy || !self.text.is_empty())
            && self
                .looked_at_legacy
                .is_none_or(|looked| looked.elapsed() >= LEGACY_PERIOD);
        if self.effort.is_some() && generation == self.generation && !legacy_is_due {
            return Ok(Look::Unchanged);
        }
        if let Some((ended, took)) = self.last {
            let wait = (took * REST)
                .clamp(LEAST_REST, MOST_REST)
                .saturating_sub(ended.elapsed());
            if !wait.is_zero() {
                return Ok(Look::Wait(wait));
            }
        }
        self.read(legacy_is_due, generation)
    }

    fn read(&mut self, legacy_is_due: bool, generation: Option<u32>) -> Result<Look, RulesetError> {
        let started = Instant::now();
        let outcome = self.read_what_is_due(legacy_is_due, generation, started);
        self.last = Some((Instant::now(), started.elapsed()));
        outcome
    }

    fn read_what_is_due(
        &mut self,
        legacy_is_due: bool,
        generation: Option<u32>,
        started: Instant,
    ) -> Result<Look, RulesetError> {
        if legacy_is_due {
            let same = self.read_legacy()?;
            self.looked_at_legacy = Some(started);
            if same && generation == self.generation && self.effort.is_some() {
                return Ok(Look::Unchanged);
            }
        }
        let (mut ruleset, mut read) = self.judge(&Sets::default())?;
        let mut findings = ruleset.findings();
        // Asking for ipsets loads their module: only where a rule refers to one.
        if findings
            .iter()
            .any(|finding| finding.reason == SOURCE_PORT_IN_IPSET)
        {
            let sets = Sets::read(&mut self.netfilter);
            let sets = sets.map_err(|source| RulesetError::Nftables {
                action: "read the ipsets beside",
                source,
            })?;
            (ruleset, read) = self.judge(&sets)?;
            findings = ruleset.findings();
        }
        self.generation = read;
        self.findings = findings;
        let took = started.elapsed();
        self.effort = Some((ruleset.rules, took));
        debug!(
            rules = ruleset.rules,
            findings = self.findings.len(),
            ?took,
            "rules read"
        );
        Ok(Look::Read)
    }

    fn judge(&mut self, ipsets: &Sets) -> Result<(Ruleset, Option<u32>), RulesetError> {
        let outcome = self.netfilter.rules(self.pods, ipsets);
        let (mut ruleset, generation) = outcome.map_err(|source| RulesetError::Nftables {
            action: "read",
            source,
        })?;
        legacy::read(&self.text, self.pods, ipsets, &mut ruleset);
        Ok((ruleset, generation))
    }

    fn legacy_extents_changed(&mut self, was_locked: bool) -> bool {
        let is_due = was_locked
            || self
                .asked_extents
                .is_none_or(|asked| asked.elapsed() >= EXTENT_PERIOD);
        if !is_due {
            return false;
        }
        self.asked_extents = Some(Instant::now());
        let extents = self.legacy.extents();
        let changed = extents != self.extents;
        self.extents = extents;
        changed
    }

    /// `true` if the rules are what they were.
    fn read_legacy(&mut self) -> Result<bool, RulesetError> {
        let text = if self.extents.is_empty() {
            String::new()
        } else {
            let saved = legacy_tables::save().map_err(|source| {
                let tables = self.extents.iter().map(|(name, ..)| name.as_str());
                RulesetError::Legacy {
                    tables: tables.collect::<Vec<_>>().join(", "),
                    source,
                }
            })?;
            legacy::essence(&saved)
        };
        let same = text == self.text;
        self.text = text;
        Ok(same)
    }
}
