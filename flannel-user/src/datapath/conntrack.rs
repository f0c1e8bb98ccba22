//! The settings of conntrack that a TCP flow needs which comes back to it.
//!
//! While a flow bypasses the stack, conntrack does not see its sequence numbers
//! advance. What it would then hold against the flow:
//!
//! * packets beyond the window it knows are INVALID, and Kubernetes drops those:
//!   `be_liberal`;
//! * a RST whose sequence number seems old is INVALID whatever `be_liberal`
//!   says, after 2 to 4 GB: `ignore_invalid_rst` (Linux 5.14);
//! * "data unacknowledged" that was true when the bypass began stays, and an
//!   idle entry then ends after minutes instead of days: the two short timeouts
//!   are raised to that of an established connection.
//!
//! The settings belong to a network namespace. What was found is remembered in
//! a file, so that another agent can put it back.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::kernel_file::KernelFile;

const DIRECTORY: &str = "/proc/sys/net/netfilter";
const LIBERAL: &str = "nf_conntrack_tcp_be_liberal";
const IGNORE_RST: &str = "nf_conntrack_tcp_ignore_invalid_rst";
const UNACKNOWLEDGED: &str = "nf_conntrack_tcp_timeout_unacknowledged";
const MAX_RETRANS: &str = "nf_conntrack_tcp_timeout_max_retrans";
const ESTABLISHED: &str = "nf_conntrack_tcp_timeout_established";
const UDP: &str = "nf_conntrack_udp_timeout";
/// Those that are read.
const SETTINGS: [&str; 6] = [
    LIBERAL,
    IGNORE_RST,
    UNACKNOWLEDGED,
    MAX_RETRANS,
    ESTABLISHED,
    UDP,
];

/// Values by name of the setting.
pub type Settings = BTreeMap<String, u64>;

/// May TCP flows bypass the stack?
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// Conntrack can stand it, or there is none.
    Fit,
    /// It cannot, for this reason.
    Unfit(String),
}

/// What must be written for TCP to come back unharmed.
///
/// # Errors
/// What this kernel lacks.
pub fn needed(found: &Settings) -> Result<Settings, String> {
    let mut needed = Settings::new();
    let Some(liberal) = found.get(LIBERAL) else {
        // No conntrack in this namespace: nobody to come back to.
        return Ok(needed);
    };
    if *liberal != 1 {
        needed.insert(LIBERAL.to_owned(), 1);
    }
    match found.get(IGNORE_RST) {
        None => {
            return Err(format!(
                "this kernel has no {IGNORE_RST} (Linux 5.14): a reset after a long bypass would be lost"
            ));
        }
        Some(1) => {}
        Some(_) => {
            needed.insert(IGNORE_RST.to_owned(), 1);
        }
    }
    let Some(established) = found.get(ESTABLISHED) else {
        return Ok(needed);
    };
    for name in [UNACKNOWLEDGED, MAX_RETRANS] {
        if found.get(name).is_some_and(|timeout| timeout < established) {
            needed.insert(name.to_owned(), *established);
        }
    }
    Ok(needed)
}

/// Conntrack's settings in the network namespace of the calling thread.
#[derive(Debug, Clone)]
pub struct Conntrack {
    directory: PathBuf,
    files: [(&'static str, KernelFile); SETTINGS.len()],
    memory: PathBuf,
}

#[derive(Default, Serialize, Deserialize)]
struct Memory {
    /// What was there before us.
    found: Settings,
    /// What we made of it.
    #[serde(default)]
    written: Settings,
}

impl Conntrack {
    /// `memory` is the file that remembers what was found.
    #[must_use]
    pub fn new(memory: PathBuf) -> Self {
        Self::in_directory(DIRECTORY.into(), memory)
    }

    fn in_directory(directory: PathBuf, memory: PathBuf) -> Self {
        Self {
            files: SETTINGS.map(|name| (name, KernelFile::at(directory.join(name)))),
            directory,
            memory,
        }
    }

    fn read(&self) -> Settings {
        let files = self.files.iter();
        files
            .filter_map(|(name, file)| {
                let value = file.read().ok()?.trim().parse().ok()?;
                Some(((*name).to_owned(), value))
            })
            .collect()
    }

    fn write(&self, settings: &Settings) -> io::Result<()> {
        for (name, value) in settings {
            fs::write(self.directory.join(name), value.to_string()).map_err(|error| {
                io::Error::new(error.kind(), format!("write {value} to {name}: {error}"))
            })?;
        }
        Ok(())
    }

    fn remembered(&self) -> Memory {
        let text = fs::read_to_string(&self.memory).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    /// Remembers what is about to be overwritten; what is remembered already was there before us.
    fn remember(&self, found: &Settings, overwritten: &Settings) -> io::Result<()> {
        let mut memory = self.remembered();
        for (name, ours) in overwritten {
            if let Some(value) = found.get(name) {
                memory.found.entry(name.clone()).or_insert(*value);
                memory.written.insert(name.clone(), *ours);
            }
        }
        let text = serde_json::to_string(&memory)?;
        replace_file(&self.memory, &text)
    }

    /// Is everything as it must be? Writes nothing.
    #[must_use]
    pub fn standing(&self) -> Standing {
        match needed(&self.read()) {
            Ok(needed) if needed.is_empty() => Standing::Fit,
            Ok(needed) => Standing::Unfit(describe(&needed)),
            Err(reason) => Standing::Unfit(reason),
        }
    }

    /// Makes the settings what they must be, after remembering what they were.
    #[must_use]
    pub fn prepare(&self) -> Standing {
        let found = self.read();
        let wanted = match needed(&found) {
            Ok(wanted) => wanted,
            Err(reason) => return Standing::Unfit(reason),
        };
        if wanted.is_empty() {
            return Standing::Fit;
        }
        if let Err(error) = self.remember(&found, &wanted) {
            return Standing::Unfit(format!(
                "cannot remember conntrack's settings in {}: {error}",
                self.memory.display()
            ));
        }
        if let Err(error) = self.write(&wanted) {
            return Standing::Unfit(format!("conntrack's settings: {error}"));
        }
        info!(
            settings = describe(&wanted),
            "conntrack prepared for flows that bypass it"
        );
        self.standing()
    }

    /// Is there something to put back?
    #[must_use]
    pub fn is_changed(&self) -> bool {
        !self.remembered().found.is_empty()
    }

    /// Puts back what was found, except where somebody has changed our value since. False if that
    /// failed; the record stays then.
    pub fn restore(&self) -> bool {
        let before = self.remembered();
        if before.found.is_empty() {
            return true;
        }
        let now = self.read();
        let ours: Settings = before
            .found
            .iter()
            .filter(|(name, _)| {
                let written = before.written.get(*name).copied();
                now.get(*name) == written.or_else(|| ours(&now, name)).as_ref()
            })
            .map(|(name, value)| (name.clone(), *value))
            .collect();
        let outcome = self
            .write(&ours)
            .and_then(|()| fs::remove_file(&self.memory));
        match outcome {
            Ok(()) => info!(
                settings = describe(&ours),
                "conntrack's settings are as they were"
            ),
            Err(error) => warn!(%error, "cannot put conntrack's settings back"),
        }
        self.remembered().found.is_empty()
    }

    /// Seconds after which conntrack forgets a UDP flow that nothing answered.
    #[must_use]
    pub fn udp_timeout(&self) -> Option<u64> {
        self.read().get(UDP).copied()
    }
}

/// The value that we give a setting: for records that do not hold it.
fn ours(now: &Settings, name: &str) -> Option<u64> {
    match name {
        LIBERAL | IGNORE_RST => Some(1),
        _ => now.get(ESTABLISHED).copied(),
    }
}

fn describe(settings: &Settings) -> String {
    let parts: Vec<String> = settings
        .iter()
        .map(|(name, value)| format!("{name} must be {value}"))
        .collect();
    parts.join(", ")
}

/// Replaces a small file in one step.
fn replace_file(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(rows: &[(&str, u64)]) -> Settings {
        rows.iter()
            .map(|(name, value)| ((*name).to_owned(), *value))
            .collect()
    }

    fn defaults() -> Settings {
        settings(&[
            (LIBERAL, 0),
            (IGNORE_RST, 0),
            (UNACKNOWLEDGED, 300),
            (MAX_RETRANS, 300),
            (ESTABLISHED, 432_000),
            (UDP, 30),
        ])
    }

    #[test]
    fn what_is_needed_follows_from_what_is_there() {
        let all = settings(&[
            (LIBERAL, 1),
            (IGNORE_RST, 1),
            (UNACKNOWLEDGED, 432_000),
            (MAX_RETRANS, 432_000),
        ]);
        assert_eq!(needed(&defaults()), Ok(all));
        assert_eq!(
            needed(&Settings::new()),
            Ok(Settings::new()),
            "no conntrack"
        );
        let mut old = defaults();
        old.remove(IGNORE_RST);
        assert!(needed(&old).expect_err("too old").contains("5.14"));
    }

    fn in_directory(found: &Settings) -> (tempfile::TempDir, Conntrack) {
        let directory = tempfile::tempdir().expect("a directory");
        let memory = directory.path().join("memory");
        let conntrack = Conntrack::in_directory(directory.path().to_owned(), memory);
        conntrack.write(found).expect("written");
        (directory, conntrack)
    }

    #[test]
    fn prepared_and_put_back() {
        let (_directory, conntrack) = in_directory(&defaults());
        assert!(matches!(conntrack.standing(), Standing::Unfit(_)));
        assert_eq!(conntrack.prepare(), Standing::Fit);
        assert!(conntrack.is_changed());
        // A second agent prepares again: the memory stays that of the beginning.
        assert_eq!(conntrack.prepare(), Standing::Fit);
        assert!(conntrack.restore());
        assert_eq!(conntrack.read(), defaults());
        assert!(!conntrack.is_changed());
    }

    #[test]
    fn what_somebody_else_set_meanwhile_stays() {
        let (_directory, conntrack) = in_directory(&defaults());
        assert_eq!(conntrack.prepare(), Standing::Fit);
        conntrack
            .write(&settings(&[(UNACKNOWLEDGED, 77)]))
            .expect("written");
        assert!(conntrack.restore());
        assert_eq!(conntrack.read().get(UNACKNOWLEDGED), Some(&77));
        assert_eq!(conntrack.read().get(LIBERAL), Some(&0));
    }

    #[test]
    fn another_timeout_of_established_connections_does_not_hide_what_is_ours() {
        let (_directory, conntrack) = in_directory(&defaults());
        assert_eq!(conntrack.prepare(), Standing::Fit);
        conntrack
            .write(&settings(&[(ESTABLISHED, 86_400)]))
            .expect("written");
        assert!(conntrack.restore());
        assert_eq!(conntrack.read().get(UNACKNOWLEDGED), Some(&300));
    }

    #[test]
    fn a_record_of_an_earlier_version_is_understood() {
        let (_directory, conntrack) = in_directory(&defaults());
        assert_eq!(conntrack.prepare(), Standing::Fit);
        let found = conntrack.remembered().found;
        let text = serde_json::json!({ "found": found }).to_string();
        fs::write(&conntrack.memory, text).expect("written");
        assert!(conntrack.restore());
        assert_eq!(conntrack.read(), defaults());
    }

    #[test]
    fn a_setting_that_is_otherwise_is_named() {
        let (_directory, conntrack) = in_directory(&defaults());
        let Standing::Unfit(reason) = conntrack.standing() else {
            panic!("be_liberal is 0");
        };
        assert!(reason.contains(LIBERAL), "{reason}");
    }
}
