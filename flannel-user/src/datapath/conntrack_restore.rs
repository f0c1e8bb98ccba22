//! Puts conntrack's settings back once no flow that ever bypassed the stack can live.
//!
//! Which flows bypassed is not known afterwards, above all not to an agent that
//! only found the record of another. So all TCP connections of pods that conntrack
//! knows when the bypass ends are waited for; those that begin later never
//! bypassed. A connection that dies without a word stays in conntrack for
//! `nf_conntrack_tcp_timeout_established`, and so do the settings.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use ipnet::Ipv4Net;
use tracing::{debug, info, warn};

use super::{
    conntrack::Conntrack,
    conntrack_table::{ConntrackTable, Entry, TableError, TcpState, Tuple},
};
use crate::observe::status::KeptSettings;

/// How often the connections are looked for.
const PERIOD: Duration = Duration::from_secs(2);
/// How many are looked for at a time, which takes about 10 ms.
const AT_ONCE: usize = 4096;
/// Pause after something failed.
const RETRY: Duration = Duration::from_secs(60);

/// What to restore, and what must be over before.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The settings and the record of what they were.
    pub conntrack: Conntrack,
    /// Addresses of all pods.
    pub pods: Ipv4Net,
    /// Pins of all agents of this host: while another has some, its flows need the settings.
    pub bpf_dir: PathBuf,
}

/// A thread that waits and restores; dropped, it does neither any more.
#[derive(Debug)]
pub struct Restorer {
    shared: Arc<Mutex<Shared>>,
    _stop: Sender<()>,
}

#[derive(Debug, Default)]
struct Shared {
    /// The settings are needed again.
    cancelled: bool,
    kept: Option<KeptSettings>,
}

impl Restorer {
    /// Starts waiting in the network namespace of the calling thread. `None` if there is nothing
    /// to restore, or no thread to be had.
    #[must_use]
    pub fn start(plan: Plan) -> Option<Self> {
        if !plan.conntrack.is_changed() {
            return None;
        }
        let (stop, stopped) = channel();
        let shared = Arc::new(Mutex::new(Shared {
            kept: Some(KeptSettings::default()),
            ..Shared::default()
        }));
        let waiting = Waiting {
            plan,
            shared: Arc::clone(&shared),
            table: None,
            flows: None,
        };
        thread::Builder::new()
            .name("conntrack-restore".to_owned())
            .spawn(move || waiting.run(&stopped))
            .inspect_err(|error| warn!(%error, "conntrack's settings stay: no thread for them"))
            .ok()?;
        Some(Self {
            shared,
            _stop: stop,
        })
    }

    /// Why the settings are still there; `None` once they are restored.
    #[must_use]
    pub fn kept(&self) -> Option<KeptSettings> {
        lock(&self.shared).kept.clone()
    }
}

impl Drop for Restorer {
    fn drop(&mut self) {
        // Waits for a restoring that is under way: after this nothing is written any more.
        lock(&self.shared).cancelled = true;
    }
}

fn lock(shared: &Mutex<Shared>) -> std::sync::MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A connection and the identity of its entry: the same ends may meet again.
type Flow = (Tuple, Option<u32>);

struct Waiting {
    plan: Plan,
    shared: Arc<Mutex<Shared>>,
    table: Option<ConntrackTable>,
    /// What may still live; `None` before the first look.
    flows: Option<VecDeque<Flow>>,
}

impl Waiting {
    fn run(mut self, stopped: &Receiver<()>) {
        let mut pause = Duration::ZERO;
        let mut said = None;
        while stopped.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            let outcome = self.look();
            let fault = outcome.as_ref().err().map(ToString::to_string);
            if fault != said {
                if let Some(fault) = &fault {
                    warn!(fault, "conntrack's settings stay as they are");
                }
                said.clone_from(&fault);
            }
            pause = if fault.is_some() { RETRY } else { PERIOD };
            let flows = self.flows.as_ref().map_or(0, VecDeque::len);
            let mut shared = lock(&self.shared);
            if shared.cancelled {
                return;
            }
            if matches!(outcome, Ok(Wait::Over)) && self.plan.conntrack.restore() {
                shared.kept = None;
                return;
            }
            shared.kept = Some(KeptSettings { flows, fault });
        }
    }

    fn look(&mut self) -> Result<Wait, TableError> {
        if others_bypass(&self.plan.bpf_dir) {
            // Whatever lives when they are done is waited for.
            self.flows = None;
            return Ok(Wait::On);
        }
        let table = match &mut self.table {
            Some(table) => table,
            none => none.insert(ConntrackTable::open()?),
        };
        let Some(flows) = &mut self.flows else {
            let pods = self.plan.pods;
            let found = table.dump(|entry| concerns(entry, pods) && may_live(entry))?;
            info!(
                flows = found.len(),
                "conntrack's settings stay for connections that may have bypassed it"
            );
            let flows: VecDeque<Flow> = found
                .into_iter()
                .map(|entry| (entry.original, entry.id))
                .collect();
            let wait = Wait::for_flows(&flows);
            self.flows = Some(flows);
            return Ok(wait);
        };
        let asked: Vec<Flow> = flows.drain(..flows.len().min(AT_ONCE)).collect();
        let tuples: Vec<Tuple> = asked.iter().map(|flow| flow.0).collect();
        let answers = table.get_many(&tuples);
        let before = asked.len();
        flows.extend(asked.into_iter().zip(answers).filter_map(|(flow, answer)| {
            // What cannot be asked for may live.
            answer.map_or(true, |now| lives(flow, now)).then_some(flow)
        }));
        debug!(
            before,
            left = flows.len(),
            "connections that may have bypassed"
        );
        Ok(Wait::for_flows(flows))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    On,
    Over,
}

impl Wait {
    fn for_flows(flows: &VecDeque<Flow>) -> Self {
        if flows.is_empty() {
            Self::Over
        } else {
            Self::On
        }
    }
}

/// Has an agent of this host programs?
fn others_bypass(bpf_dir: &PathBuf) -> bool {
    std::fs::read_dir(bpf_dir).is_ok_and(|mut entries| {
        entries.any(|entry| {
            entry.is_ok_and(|entry| entry.file_name().to_string_lossy().starts_with("vni"))
        })
    })
}

/// Is one of its ends, as the stack forwards it, a pod?
fn concerns(entry: &Entry, pods: Ipv4Net) -> bool {
    [entry.original.source, entry.reply.source]
        .iter()
        .any(|end| pods.contains(end.ip()))
}

/// May a packet of it come that must not be INVALID?
fn may_live(entry: &Entry) -> bool {
    !matches!(entry.state, TcpState::TimeWait | TcpState::Close)
}

/// Is the entry of `flow` that was found now still its own, and alive?
fn lives(flow: Flow, now: Option<Entry>) -> bool {
    now.is_some_and(|now| now.original == flow.0 && now.id == flow.1 && may_live(&now))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(source: &str, destination: &str) -> Entry {
        let original = Tuple {
            source: source.parse().expect("an end"),
            destination: destination.parse().expect("an end"),
        };
        Entry {
            id: Some(7),
            ..Entry::established(original, 60)
        }
    }

    #[test]
    fn only_connections_of_pods_are_waited_for() {
        let pods: Ipv4Net = "10.244.0.0/16".parse().expect("a network");
        for (source, destination, expected) in [
            ("10.244.1.2:1000", "10.244.2.3:80", true),
            ("10.244.1.2:1000", "192.168.1.1:80", true),
            ("192.168.1.1:1000", "10.244.2.3:80", true),
            ("192.168.1.1:1000", "192.168.1.2:22", false),
        ] {
            let found = concerns(&entry(source, destination), pods);
            assert_eq!(found, expected, "{source} {destination}");
        }
        // From outside to a Service that a pod serves.
        let mut translated = entry("192.168.1.1:1000", "10.96.0.1:80");
        translated.reply.source = "10.244.2.3:8080".parse().expect("an end");
        assert!(concerns(&translated, pods));
    }

    #[test]
    fn a_connection_ends_by_its_state_or_by_another_in_its_place() {
        let before = entry("10.244.1.2:1000", "10.244.2.3:80");
        let flow = (before.original, before.id);
        assert!(lives(flow, Some(before.clone())));
        assert!(!lives(flow, None));
        let closed = Entry {
            state: TcpState::TimeWait,
            ..before
        };
        assert!(!lives(flow, Some(closed)));
        let another = Entry {
            id: Some(8),
            ..before
        };
        assert!(!lives(flow, Some(another)));
    }

    #[test]
    fn programs_of_any_agent_are_seen() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().to_owned();
        assert!(!others_bypass(&path));
        assert!(!others_bypass(&path.join("none")));
        std::fs::create_dir(path.join("vni7")).expect("made");
        assert!(others_bypass(&path));
    }

    #[test]
    fn without_a_record_nothing_is_waited_for() {
        let directory = tempfile::tempdir().expect("a directory");
        let plan = Plan {
            conntrack: Conntrack::new(directory.path().join("memory")),
            pods: "10.244.0.0/16".parse().expect("a network"),
            bpf_dir: directory.path().to_owned(),
        };
        assert!(Restorer::start(plan).is_none());
    }
}
