//! Leases in a directory that the agents of a machine, or of a network file system, share.
//!
//! ```text
//! <dir>/config                  network config, flannel's JSON (contract section 3)
//! <dir>/subnets/10.5.52.0-24    one file per lease: flannel's lease JSON, nothing else
//! <dir>/expiry/10.5.52.0-24     when that lease ends: seconds since 1970, as `date -d @…` reads
//! <dir>/.lock                   held (flock) by whoever writes
//! ```
//!
//! - **Whole or not at all.** Every file is written beside its place (`.new-…`), flushed
//!   and moved there. Readers need no lock.
//! - **One owner per subnet.** Lists are read and subnets claimed under the lock; the claim
//!   itself also fails if the name exists, so a race that the lock did not prevent is
//!   noticed and tried again with a fresh list.
//! - **Expiry stands in a file of its own**, so that the lease is flannel's bytes exactly,
//!   and copying, restoring, touching or truncating a lease does not change when it ends.
//!   It is written before its lease and removed after it.
//! - **A lease without an expiry is a reservation** (section 6.5): what an operator writes
//!   with `echo` into `subnets/` stays for ever and is given to the node with that
//!   `PublicIP`.
//! - **One clock.** "Now" is the time that the file system stamps on the lock file, so the
//!   agents of a network file system agree and one machine with a wrong clock expires
//!   nothing. Whoever notices an expired lease removes it, except its owner.
//! - **A damaged lease file costs nobody anything.** It is named in the log once; the last
//!   good value stays in force, its subnet stays taken, and its owner writes it again at
//!   the next renewal.
//!
//! Why so: docs/decisions/0003-file-lease-source.md.

mod claim;
mod directory;
#[cfg(test)]
mod tests;
mod watch;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use anyhow::anyhow;
use async_trait::async_trait;
use ipnet::Ipv4Net;
use tokio::sync::mpsc;

use self::directory::Directory;
use super::{Conflict, LeaseEvent, LeaseSource, SourceError, own::Own};
use crate::{
    lease::{Lease, LeaseAttributes},
    network::{NetworkConfig, NetworkConfigError},
};

/// The lease source of `--lease-dir`.
#[derive(Debug, Clone)]
pub struct FileSource(Arc<Shared>);

/// What the calls and the watch of one agent have in common.
#[derive(Debug)]
struct Shared {
    directory: Directory,
    lease_ttl: Duration,
    own: Own,
}

impl FileSource {
    /// A source in the existing directory `dir`, whose leases end `lease_ttl` after
    /// they were last renewed.
    ///
    /// # Errors
    /// `Retry` when the directory is missing or unreadable, `Fatal` when it is no
    /// directory or `lease_ttl` is zero.
    pub fn new(dir: PathBuf, lease_ttl: Duration) -> Result<Self, SourceError> {
        if lease_ttl.is_zero() {
            return Err(SourceError::Fatal(anyhow!(
                "a lease must last at least one second; give --lease-ttl a larger value"
            )));
        }
        let metadata = dir.metadata().map_err(|error| {
            let advice = match error.kind() {
                io::ErrorKind::NotFound => "create it, or name another with --lease-dir",
                _ => "flanneld needs to read and write it",
            };
            SourceError::Retry(anyhow!(
                "cannot use the lease directory {}: {error}; {advice}",
                dir.display()
            ))
        })?;
        if !metadata.is_dir() {
            return Err(SourceError::Fatal(anyhow!(
                "--lease-dir {} is not a directory",
                dir.display()
            )));
        }
        Ok(Self(Arc::new(Shared {
            directory: Directory::new(dir),
            lease_ttl,
            own: Own::default(),
        })))
    }

    /// Runs file system calls where they hold up nobody.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, SourceError> + Send + 'static,
    ) -> Result<T, SourceError> {
        let shared = Arc::clone(&self.0);
        tokio::task::spawn_blocking(move || work(&shared))
            .await
            .unwrap_or_else(|failed| Err(SourceError::Retry(failed.into())))
    }
}

#[async_trait]
impl LeaseSource for FileSource {
    fn describe(&self) -> String {
        format!("file {}", self.0.directory.root().display())
    }

    async fn network_config(&self) -> Result<NetworkConfig, SourceError> {
        self.blocking(|shared| read_config(&shared.directory)).await
    }

    async fn acquire(
        &self,
        config: &NetworkConfig,
        attributes: &LeaseAttributes,
        previous: Option<Ipv4Net>,
    ) -> Result<Lease, SourceError> {
        let (config, attributes) = (config.clone(), attributes.clone());
        self.blocking(move |shared| {
            shared.own.will_publish(&attributes);
            let lease = claim::acquire(shared, &config, &attributes, previous)?;
            shared.own.hold(&lease);
            Ok(lease)
        })
        .await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SourceError> {
        let lease = lease.clone();
        self.blocking(move |shared| {
            shared.own.will_publish(&lease.attributes);
            let renewed = claim::renew(shared, &lease).map_err(SourceError::Retry)?;
            shared.own.hold(&renewed);
            Ok(renewed)
        })
        .await
    }

    fn conflicts(&self) -> Vec<Conflict> {
        self.0.own.conflicts()
    }

    async fn watch(&self) -> Result<mpsc::Receiver<LeaseEvent>, SourceError> {
        watch::start(Arc::clone(&self.0))
            .await
            .map_err(SourceError::Retry)
    }
}

fn read_config(directory: &Directory) -> Result<NetworkConfig, SourceError> {
    let path = directory.config();
    let text = std::fs::read_to_string(&path).map_err(|error| {
        SourceError::Retry(match error.kind() {
            io::ErrorKind::NotFound => anyhow!(
                r#"there is no network config at {}; write one, for instance {{"Network":"10.244.0.0/16","Backend":{{"Type":"vxlan"}}}}"#,
                path.display()
            ),
            _ => anyhow!("cannot read the network config {}: {error}", path.display()),
        })
    })?;
    text.parse().map_err(|error: NetworkConfigError| {
        let is_final = error.is_final();
        let error =
            anyhow!(error).context(format!("cannot use the network config {}", path.display()));
        if is_final {
            SourceError::Fatal(error)
        } else {
            SourceError::Retry(error)
        }
    })
}
