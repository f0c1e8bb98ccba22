//! The files: where they are, how they are read, and that only the holder of the lock
//! writes them.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use nix::sys::{stat::futimens, time::TimeSpec};

use crate::{
    atomic_file,
    lease::{LeaseAttributes, SubnetKey},
};

/// How long to wait for others to finish writing; each takes milliseconds.
const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks at a lock that is held.
const LOCK_PAUSE: Duration = Duration::from_millis(3);

/// The lease directory.
#[derive(Debug, Clone)]
pub(super) struct Directory {
    root: PathBuf,
}

/// When a lease ends, as its file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expiry {
    /// There is no such file: a reservation.
    Never,
    /// At this moment.
    At(SystemTime),
    /// The file is damaged, and this is how; the lease is kept.
    Unreadable(String),
}

/// One file of `subnets/` whose name is a subnet key.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    /// The lease, or what is wrong with the file.
    pub(super) attributes: Result<LeaseAttributes, String>,
    pub(super) expiry: Expiry,
}

impl Expiry {
    pub(super) fn is_over(&self, now: SystemTime) -> bool {
        matches!(self, Self::At(end) if *end <= now)
    }

    /// For a [`crate::lease::Lease`].
    pub(super) fn moment(&self) -> Option<SystemTime> {
        match self {
            Self::At(end) => Some(*end),
            Self::Never | Self::Unreadable(_) => None,
        }
    }
}

/// What is in `subnets/`.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) entries: BTreeMap<SubnetKey, Entry>,
    /// Names that are no subnet key.
    pub(super) foreign: Vec<String>,
}

/// Reads seconds since 1970, with or without milliseconds.
fn moment(text: &str) -> Option<SystemTime> {
    let (seconds, millis) = match text.split_once('.') {
        Some((seconds, millis)) if millis.len() == 3 => (seconds, millis.parse().ok()?),
        Some(_) => return None,
        None => (text, 0u16),
    };
    let since = Duration::from_secs(seconds.parse().ok()?) + Duration::from_millis(millis.into());
    UNIX_EPOCH.checked_add(since)
}

/// The right to write; ends when dropped.
#[derive(Debug)]
pub(super) struct Locked<'a> {
    directory: &'a Directory,
    file: File,
}

impl Directory {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    pub(super) fn subnets(&self) -> PathBuf {
        self.root.join("subnets")
    }

    pub(super) fn expiries(&self) -> PathBuf {
        self.root.join("expiry")
    }

    pub(super) fn lease_path(&self, key: &SubnetKey) -> PathBuf {
        self.subnets().join(key.to_string())
    }

    fn expiry_path(&self, key: &SubnetKey) -> PathBuf {
        self.expiries().join(key.to_string())
    }

    /// Makes the two directories, never the root: a mount that is missing must not be
    /// mistaken for an empty registry.
    pub(super) fn prepare(&self) -> anyhow::Result<()> {
        for path in [self.subnets(), self.expiries()] {
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).with_context(|| {
                        format!(
                            "cannot make {}; flanneld needs to write to the lease directory",
                            path.display()
                        )
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until nobody else writes.
    pub(super) fn lock(&self) -> anyhow::Result<Locked<'_>> {
        let path = self.root.join(".lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open the lock file {}", path.display()))?;
        let started = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => {
                    return Ok(Locked {
                        directory: self,
                        file,
                    });
                }
                Err(TryLockError::WouldBlock) if started.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => bail!(
                    "another process has held {} for {} s; `fuser -v` on that file names it",
                    path.display(),
                    LOCK_PATIENCE.as_secs()
                ),
                Err(TryLockError::Error(error)) => {
                    return Err(error).with_context(|| {
                        format!(
                            "cannot lock {}; a network file system must be mounted with locks",
                            path.display()
                        )
                    });
                }
            }
        }
    }

    /// Reads everything.
    pub(super) fn list(&self) -> anyhow::Result<Listing> {
        let subnets = self.subnets();
        let unreadable = || format!("cannot read the leases in {}", subnets.display());
        let mut listing = Listing::default();
        for file in fs::read_dir(&subnets).with_context(unreadable)? {
            let name = file.with_context(unreadable)?.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') {
                continue;
            }
            // Only the canonical name: two files of one subnet would be two leases.
            match name.parse::<SubnetKey>() {
                Ok(key) if key.to_string() == name => {
                    if let Some(entry) = self.read(&key) {
                        listing.entries.insert(key, entry);
                    }
                }
                _ => listing.foreign.push(name.into_owned()),
            }
        }
        Ok(listing)
    }

    /// Reads one lease; `None` if there is none.
    pub(super) fn read(&self, key: &SubnetKey) -> Option<Entry> {
        let attributes = match fs::read(self.lease_path(key)) {
            Ok(bytes) => String::from_utf8(bytes)
                .map_err(|error| error.to_string())
                .and_then(|text| {
                    LeaseAttributes::from_json(&text).map_err(|error| error.to_string())
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
        };
        Some(Entry {
            attributes,
            expiry: self.read_expiry(key),
        })
    }

    pub(super) fn read_expiry(&self, key: &SubnetKey) -> Expiry {
        let path = self.expiry_path(key);
        let fault = |what: &dyn std::fmt::Display| {
            Expiry::Unreadable(format!(
                "{} is unreadable, so the lease does not expire: {what}",
                path.display()
            ))
        };
        match fs::read_to_string(&path) {
            Ok(text) => moment(text.trim()).map_or_else(
                || fault(&format!("{text:?} is no number of seconds since 1970")),
                Expiry::At,
            ),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Expiry::Never,
            Err(error) => fault(&error),
        }
    }

    /// Expiry files without a lease: left by someone who removed a lease by hand, or by
    /// an agent that died between two steps.
    pub(super) fn has_orphans(&self, listing: &Listing) -> bool {
        !self.orphans(listing).is_empty()
    }

    fn orphans(&self, listing: &Listing) -> Vec<SubnetKey> {
        let Ok(files) = fs::read_dir(self.expiries()) else {
            return Vec::new();
        };
        files
            .filter_map(|file| file.ok()?.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .filter_map(|name| {
                name.parse::<SubnetKey>()
                    .ok()
                    .filter(|key| key.to_string() == name)
            })
            .filter(|key| !listing.entries.contains_key(key))
            .collect()
    }
}

impl Locked<'_> {
    /// The file system's own time, which all who share it have in common, in whole
    /// milliseconds as expiry files have it.
    pub(super) fn now(&self) -> SystemTime {
        let now = self.stamp().unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot stamp the lock file, taking this machine's clock");
            SystemTime::now()
        });
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        let whole = Duration::new(since.as_secs(), since.subsec_millis() * 1_000_000);
        UNIX_EPOCH + whole
    }

    fn stamp(&self) -> io::Result<SystemTime> {
        futimens(&self.file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW)?;
        self.file.metadata()?.modified()
    }

    /// Claims a subnet. `Ok(false)` when its name exists already.
    pub(super) fn create(
        &self,
        key: &SubnetKey,
        attributes: &LeaseAttributes,
        end: SystemTime,
    ) -> anyhow::Result<bool> {
        let path = self.directory.lease_path(key);
        if path.symlink_metadata().is_ok() {
            return Ok(false);
        }
        self.set_expiry(key, end)?;
        match atomic_file::create(&path, attributes.to_json().as_bytes()) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => {
                Err(error).with_context(|| format!("cannot write the lease {}", path.display()))
            }
        }
    }

    /// Writes a lease over the one there is.
    pub(super) fn publish(
        &self,
        key: &SubnetKey,
        attributes: &LeaseAttributes,
    ) -> anyhow::Result<()> {
        let path = self.directory.lease_path(key);
        atomic_file::replace(&path, attributes.to_json().as_bytes())
            .with_context(|| format!("cannot write the lease {}", path.display()))
    }

    /// Says when a lease ends.
    pub(super) fn set_expiry(&self, key: &SubnetKey, end: SystemTime) -> anyhow::Result<()> {
        let path = self.directory.expiry_path(key);
        let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
        let text = format!("{}.{:03}\n", since.as_secs(), since.subsec_millis());
        atomic_file::replace(&path, text.as_bytes())
            .with_context(|| format!("cannot write the lease's end to {}", path.display()))
    }

    /// Removes a lease; one that is gone already is no fault.
    pub(super) fn remove(&self, key: &SubnetKey) -> anyhow::Result<()> {
        for path in [
            self.directory.lease_path(key),
            self.directory.expiry_path(key),
        ] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Removes what a crash left behind: while the lock is held nobody else is writing,
    /// so every temporary file and every expiry without a lease is such a rest.
    pub(super) fn tidy(&self) -> anyhow::Result<()> {
        let listing = self.directory.list()?;
        for key in self.directory.orphans(&listing) {
            // A listing taken while files were replaced may have missed the lease.
            if self.directory.read(&key).is_none() {
                self.remove(&key)?;
            }
        }
        for directory in [self.directory.subnets(), self.directory.expiries()] {
            for file in fs::read_dir(directory)?.flatten() {
                let name = file.file_name();
                if name
                    .to_string_lossy()
                    .starts_with(atomic_file::TEMPORARY_PREFIX)
                {
                    fs::remove_file(file.path())?;
                }
            }
        }
        Ok(())
    }
}
