//! Leases in etcd, API v3, exactly where and as flannel keeps them.
//!
//! ```text
//! <prefix>/config                  network config, flannel's JSON (contract section 3)
//! <prefix>/subnets/10.5.52.0-24    flannel's lease JSON, attached to an etcd lease of 24 h
//! ```
//!
//! - **One owner per subnet.** A subnet is created by a transaction that fails if its key
//!   exists, and changed by one that fails if anybody else wrote since it was read. A lost
//!   race means a fresh list, never an overwritten claim.
//! - **A key without an etcd lease is a reservation** (section 6.5) and stays one.
//! - **No `LeaseTimeToLive`.** The original asks for the remaining life of every lease it
//!   reads, one by one. Nothing here needs it: etcd itself removes what has run out, the
//!   own lease always comes from a new grant whose life the answer names, and a
//!   reservation shows in the key itself. For peers [`crate::lease::Lease::expires`] is
//!   therefore the latest possible end.
//! - **A bad value costs nobody anything.** It is named in the log once; the last good
//!   value stays in force and its subnet stays taken.
//! - **Endpoints are tried, not trusted.** See `cluster.rs`.
//!
//! Why so: docs/decisions/0010-etcd-lease-source.md.

mod backoff;
mod claim;
mod cluster;
mod error;
mod follower;
mod keys;
mod options;
mod registry;
mod watch;

use std::sync::Arc;

use anyhow::{Context, anyhow};
use async_trait::async_trait;
use ipnet::Ipv4Net;
use tokio::sync::mpsc;

pub use self::{
    error::EtcdError,
    options::{Endpoints, EtcdOptions, OptionsError, Secret},
};
use self::{keys::Keys, registry::Registry};
use super::{Conflict, LeaseEvent, LeaseSource, SourceError, own::Own};
use crate::{
    lease::{Lease, LeaseAttributes},
    network::{NetworkConfig, NetworkConfigError},
};

/// The lease source of `--etcd-endpoints`.
#[derive(Debug, Clone)]
pub struct EtcdSource(Arc<Shared>);

/// What the calls and the watch of one agent have in common.
#[derive(Debug)]
struct Shared {
    registry: Registry,
    own: Own,
    description: String,
}

impl EtcdSource {
    /// A source that connects when it is first asked for something.
    ///
    /// # Errors
    /// An endpoint is no address, or a certificate file cannot be used.
    pub fn new(options: &EtcdOptions) -> Result<Self, OptionsError> {
        let keys = Keys::under(&options.prefix);
        let cluster = cluster::Cluster::new(options, keys.config.clone())?;
        for warning in options.warnings() {
            tracing::warn!("{warning}");
        }
        Ok(Self(Arc::new(Shared {
            description: format!("etcd {} {}", cluster.names(), keys.root),
            registry: Registry::new(cluster, keys, options.lease_ttl),
            own: Own::default(),
        })))
    }
}

#[async_trait]
impl LeaseSource for EtcdSource {
    fn describe(&self) -> String {
        self.0.description.clone()
    }

    async fn network_config(&self) -> Result<NetworkConfig, SourceError> {
        let retry = SourceError::Retry;
        let key = &self.0.registry.keys().config;
        let read = self.0.registry.read(key).await;
        let value = read.map_err(|error| retry(error.into()))?.ok_or_else(|| {
            retry(anyhow!(
                "there is no network config at the key {key} of etcd's API v3; write one, for instance `ETCDCTL_API=3 etcdctl put {key} '{{\"Network\":\"10.244.0.0/16\",\"Backend\":{{\"Type\":\"vxlan\"}}}}'` (what was written through the API v2 is not seen)"
            ))
        })?;
        let unusable = || format!("cannot use the network config at {key}");
        let text = std::str::from_utf8(&value.value)
            .context("it is no UTF-8 text")
            .with_context(unusable)
            .map_err(retry)?;
        text.parse().map_err(|error: NetworkConfigError| {
            // Waiting would not bring what this version lacks.
            let outcome = match error.is_final() {
                true => SourceError::Fatal,
                false => retry,
            };
            outcome(anyhow!(error).context(unusable()))
        })
    }

    async fn acquire(
        &self,
        config: &NetworkConfig,
        attributes: &LeaseAttributes,
        previous: Option<Ipv4Net>,
    ) -> Result<Lease, SourceError> {
        claim::acquire(&self.0, config, attributes, previous).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SourceError> {
        claim::renew(&self.0, lease)
            .await
            .map_err(SourceError::Retry)
    }

    fn conflicts(&self) -> Vec<Conflict> {
        self.0.own.conflicts()
    }

    async fn watch(&self) -> Result<mpsc::Receiver<LeaseEvent>, SourceError> {
        Ok(watch::start(Arc::clone(&self.0)))
    }
}
