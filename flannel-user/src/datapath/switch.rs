//! The live switch between the two datapaths.
//!
//! The kernel path is complete in both; the switch only decides whether the
//! programs sit above it. What an operator chose at run time is remembered
//! beside the control socket and survives a restart of the agent, until the
//! `--datapath` flag is changed or the machine reboots.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::mpsc::{self, Sender},
    time::{Duration, Instant},
};

use flannel_ebpf::layout::FAST_PATH_LEARNED;
use ipnet::Ipv4Net;
use tokio::task::{self, JoinHandle};
use tracing::{debug, error, info, warn};

use super::{
    conntrack::Conntrack,
    conntrack_restore::{Plan, Restorer},
    ebpf::{EbpfDatapath, EbpfError, EbpfOptions, Parked, Places, SyncReport, Wanted},
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

/// The programs on their way into the kernel.
struct Loading {
    task: JoinHandle<Result<EbpfDatapath, EbpfError>>,
    /// Takes the places that they will sit at.
    places: Sender<Places>,
}

/// The eBPF datapath, on or off, and why.
pub struct Switch {
    options: EbpfOptions,
    flag: Preference,
    preference: Preference,
    memory: PathBuf,
    ebpf: Option<EbpfDatapath>,
    /// Being loaded ahead, not in use yet.
    loading: Option<Loading>,
    /// Switched off not long ago.
    parked: Option<Parked>,
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
            loading: None,
            parked: None,
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

    /// Begins to load the programs where they are wanted, without effect on any packet: the
    /// kernel takes its time for that, and the agent has other things to do meanwhile.
    pub fn prepare(&mut self) {
        if self.wants_ebpf() && self.ebpf.is_none() {
            let options = self.options.clone();
            let (places, told) = mpsc::channel();
            let task = task::spawn_blocking(move || EbpfDatapath::open_beside(&options, &told));
            self.loading = Some(Loading { task, places });
        }
    }

    /// What was loaded ahead, if anything was; what it will be `wanted` for is done as far as
    /// possible meanwhile.
    async fn loaded(&mut self, wanted: Option<&Wanted>) -> Option<Result<EbpfDatapath, EbpfError>> {
        let Loading { task, places } = self.loading.take()?;
        if let Some(wanted) = wanted {
            // Nobody listens any more: loaded already.
            let _ = places.send(Places::of(wanted));
        }
        drop(places);
        task.await
            .inspect_err(|error| warn!(%error, "loading the programs ended early"))
            .ok()
    }

    /// The programs, from wherever they are to be had soonest.
    async fn open(&mut self, wanted: &Wanted) -> Result<EbpfDatapath, EbpfError> {
        if let Some(ebpf) = self.ebpf.take() {
            return Ok(ebpf);
        }
        if let Some(loaded) = self.loaded(Some(wanted)).await {
            return loaded;
        }
        if let Some(parked) = self.parked.take() {
            match parked.resume() {
                Ok(ebpf) => return Ok(ebpf),
                Err(cause) => warn!(
                    error = &cause as &dyn std::error::Error,
                    "what was loaded before cannot be used again: loading anew"
                ),
            }
        }
        self.prepare();
        let loaded = self.loaded(Some(wanted)).await;
        loaded.unwrap_or_else(|| EbpfDatapath::open(&self.options))
    }

    /// Brings the programs in line: on, filled and attached. False if they are off instead,
    /// without a trace.
    pub async fn apply(&mut self, wanted: &Wanted, thorough: bool) -> bool {
        let is_on = self.turn_on(wanted, thorough).await;
        self.restore_conntrack();
        is_on
    }

    async fn turn_on(&mut self, wanted: &Wanted, thorough: bool) -> bool {
        let fresh = self.ebpf.is_none();
        let outcome = self.open(wanted).await;
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
    pub async fn turn_off(&mut self) {
        let closed = if let Some(ebpf) = self.ebpf.take() {
            Some(ebpf.park().map(|parked| self.parked = Some(parked)))
        } else {
            let loaded = self.loaded(None).await.and_then(Result::ok);
            loaded.map(EbpfDatapath::close)
        };
        match closed {
            None => {}
            Some(Ok(())) => info!(
                reason = self.reason,
                "eBPF datapath off: pod traffic takes the kernel path"
            ),
            Some(Err(cause)) => warn!(
                error = &cause as &dyn std::error::Error,
                "programs are off, pins remain"
            ),
        }
        self.restore_conntrack();
    }

    /// When to call [`Switch::shrink`] next.
    #[must_use]
    pub fn parked_until(&self) -> Option<Instant> {
        self.parked.as_ref().map(Parked::until)
    }

    /// Gives up what was kept since switching off, and is not likely to be wanted again.
    pub fn shrink(&mut self) {
        self.parked = self.parked.take().and_then(Parked::shrink);
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
