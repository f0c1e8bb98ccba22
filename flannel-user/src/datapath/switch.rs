//! The live switch between the two datapaths.
//!
//! The kernel path is complete in both; the switch only decides whether the
//! programs sit above it. What an operator chose at run time is remembered
//! beside the control socket and survives a restart of the agent, until the
//! `--datapath` flag is changed or the machine reboots.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use flannel_ebpf::layout::FAST_PATH_LEARNED;
use ipnet::Ipv4Net;
use tracing::{debug, error, info, warn};

use super::{
    conntrack::Conntrack,
    conntrack_restore::{Plan, Restorer},
    ebpf::{EbpfDatapath, EbpfError, EbpfOptions, SyncReport, Wanted},
};
use crate::{
    error_chain::in_one_line,
    observe::status::{KeptSettings, Mode},
};

/// Pause between attempts after eBPF failed.
const RETRY: Duration = Duration::from_secs(60);

/// Which datapath is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Preference {
    /// eBPF where this kernel can, else the kernel path.
    Auto,
    /// eBPF; where it cannot be, the kernel path with an error.
    Ebpf,
    /// The kernel path only.
    Netlink,
}

impl Preference {
    const fn word(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Netlink => "netlink",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [Self::Auto, Self::Ebpf, Self::Netlink]
            .into_iter()
            .find(|one| one.word() == word)
    }
}

/// The eBPF datapath, on or off, and why.
pub struct Switch {
    options: EbpfOptions,
    flag: Preference,
    preference: Preference,
    memory: PathBuf,
    ebpf: Option<EbpfDatapath>,
    /// Loaded ahead, not in use yet.
    loaded: Option<Result<EbpfDatapath, EbpfError>>,
    reason: String,
    /// When a failure was last met; the next attempt waits for [`RETRY`].
    failed: Option<Instant>,
    /// Attachments that failed, to say each once.
    said: Vec<String>,
    /// Addresses of all pods.
    pods: Ipv4Net,
    /// While nothing bypasses conntrack, and what had changed its settings.
    restorer: Option<Restorer>,
}

impl Switch {
    /// A switch that has touched nothing yet. `flag` is `--datapath`, `memory`
    /// the file that remembers an operator's choice, `pods` the addresses of all pods.
    #[must_use]
    pub fn new(options: EbpfOptions, flag: Preference, memory: PathBuf, pods: Ipv4Net) -> Self {
        let (preference, reason) = match remembered(&memory, flag) {
            Some(chosen) => (chosen, format!("an operator chose {}", chosen.word())),
            None => (flag, format!("--datapath {}", flag.word())),
        };
        Self {
            options,
            flag,
            preference,
            memory,
            ebpf: None,
            loaded: None,
            reason,
            failed: None,
            said: Vec::new(),
            pods,
            restorer: None,
        }
    }

    /// The datapath in force.
    #[must_use]
    pub fn mode(&self) -> Mode {
        if self.ebpf.is_some() {
            Mode::Ebpf
        } else {
            Mode::Netlink
        }
    }

    /// Why, in a sentence.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The programs, while they are on.
    #[must_use]
    pub fn ebpf(&self) -> Option<&EbpfDatapath> {
        self.ebpf.as_ref()
    }

    /// The same, to ask what needs a run of a program.
    pub fn ebpf_mut(&mut self) -> Option<&mut EbpfDatapath> {
        self.ebpf.as_mut()
    }

    /// Would eBPF be on if it could? Then it is worth knowing pods and next hops.
    #[must_use]
    pub fn wants_ebpf(&self) -> bool {
        self.preference != Preference::Netlink
            && self.failed.is_none_or(|failed| failed.elapsed() >= RETRY)
    }

    /// An operator's choice; takes effect with the next [`Switch::apply`].
    pub fn choose(&mut self, preference: Preference) {
        self.preference = preference;
        self.failed = None;
        self.reason = format!("an operator chose {}", preference.word());
        if let Err(error) = remember(&self.memory, preference, self.flag) {
            warn!(path = %self.memory.display(), %error, "the choice will not survive a restart");
        }
    }

    /// Loads the programs where they are wanted, without effect on any packet. What that
    /// takes for a moment, above all memory, is over before the first peers are known.
    pub fn prepare(&mut self) {
        if self.wants_ebpf() && self.ebpf.is_none() {
            self.loaded = Some(EbpfDatapath::open(&self.options));
        }
    }

    /// Brings the programs in line: on, filled and attached. False if they are off instead,
    /// without a trace.
    pub fn apply(&mut self, wanted: &Wanted, thorough: bool) -> bool {
        let is_on = self.turn_on(wanted, thorough);
        self.restore_conntrack();
        is_on
    }

    fn turn_on(&mut self, wanted: &Wanted, thorough: bool) -> bool {
        let fresh = self.ebpf.is_none();
        let outcome = match self.ebpf.take() {
            Some(open) => Ok(open),
            None => {
                let loaded = self.loaded.take();
                loaded.unwrap_or_else(|| EbpfDatapath::open(&self.options))
            }
        };
        let restorer = &mut self.restorer;
        let outcome = outcome.and_then(|mut ebpf| {
            if wanted.node.flags & FAST_PATH_LEARNED != 0 {
                // Flows are about to bypass conntrack.
                *restorer = None;
            }
            let report = ebpf.sync(wanted, thorough)?;
            Ok((ebpf, report))
        });
        match outcome {
            Ok((ebpf, report)) => {
                self.ebpf = Some(ebpf);
                self.settle(fresh, &report);
                true
            }
            Err(cause) => {
                // Programs with tables that are not right must not stay: the kernel path is complete.
                let reason = format!("no eBPF: {:#}", anyhow::Error::from(cause));
                if reason == self.reason {
                    debug!(reason, "still no eBPF datapath");
                } else {
                    error!(
                        reason,
                        "pod traffic takes the kernel path; trying again each minute"
                    );
                }
                self.reason = reason;
                self.failed = Some(Instant::now());
                self.clear();
                false
            }
        }
    }

    fn settle(&mut self, fresh: bool, report: &SyncReport) {
        self.failed = None;
        let failures = report.failures.iter().map(|failure| in_one_line(failure));
        let failures: Vec<String> = failures.collect();
        for failure in failures
            .iter()
            .filter(|failure| !self.said.contains(failure))
        {
            warn!(failure, "packets there take the kernel path");
        }
        self.said = failures;
        if fresh {
            self.reason = match self.preference {
                Preference::Auto => "this kernel runs the programs".to_owned(),
                _ if self.preference == self.flag => format!("--datapath {}", self.flag.word()),
                other => format!("an operator chose {}", other.word()),
            };
            info!(
                attached = report.attached,
                reason = self.reason,
                "eBPF datapath on"
            );
        }
    }

    /// Takes the programs away where they are.
    pub fn turn_off(&mut self) {
        let loaded = self.loaded.take().and_then(Result::ok);
        if let Some(ebpf) = self.ebpf.take().or(loaded) {
            match ebpf.close() {
                Ok(()) => info!(
                    reason = self.reason,
                    "eBPF datapath off: pod traffic takes the kernel path"
                ),
                Err(cause) => warn!(
                    error = &cause as &dyn std::error::Error,
                    "programs are off, pins remain"
                ),
            }
        }
        self.restore_conntrack();
    }

    /// Where nothing bypasses conntrack any more, its settings go back when they can.
    fn restore_conntrack(&mut self) {
        let bypasses = self.ebpf().is_some_and(|ebpf| ebpf.bypass().is_some());
        if bypasses {
            self.restorer = None;
        } else if self.restorer.is_none() {
            self.restorer = Restorer::start(Plan {
                conntrack: Conntrack::new(self.options.conntrack_memory.clone()),
                pods: self.pods,
                bpf_dir: self.options.bpf_dir.clone(),
            });
        }
    }

    /// Why conntrack's settings are still ours although nothing bypasses it.
    #[must_use]
    pub fn kept_settings(&self) -> Option<KeptSettings> {
        self.restorer.as_ref().and_then(Restorer::kept)
    }

    /// Removes what an earlier agent left attached; for starts in netlink mode.
    pub fn clear(&self) {
        if let Err(cause) = EbpfDatapath::clear(&self.options) {
            warn!(
                error = &cause as &dyn std::error::Error,
                "cannot remove what an earlier agent pinned"
            );
        }
    }
}

fn remembered(path: &Path, flag: Preference) -> Option<Preference> {
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split_whitespace();
    let (chosen, under) = (words.next()?, words.next()?);
    (under == flag.word())
        .then(|| Preference::from_word(chosen))
        .flatten()
}

fn remember(path: &Path, chosen: Preference, flag: Preference) -> io::Result<()> {
    if chosen == flag {
        return match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
    }
    fs::write(path, format!("{} {}\n", chosen.word(), flag.word()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_is_remembered_until_the_flag_changes() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("mode");
        assert_eq!(remembered(&path, Preference::Auto), None);
        remember(&path, Preference::Netlink, Preference::Auto).expect("written");
        assert_eq!(
            remembered(&path, Preference::Auto),
            Some(Preference::Netlink)
        );
        assert_eq!(
            remembered(&path, Preference::Ebpf),
            None,
            "the flag was changed since"
        );
        remember(&path, Preference::Auto, Preference::Auto).expect("removed");
        assert_eq!(remembered(&path, Preference::Auto), None);
    }

    #[test]
    fn a_torn_memory_is_no_memory() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("mode");
        for text in ["", "netlink", "sideways auto"] {
            fs::write(&path, text).expect("written");
            assert_eq!(remembered(&path, Preference::Auto), None, "{text:?}");
        }
    }
}
