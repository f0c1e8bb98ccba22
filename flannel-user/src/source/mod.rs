//! Where leases come from: a snapshot, then changes.

pub mod etcd;
pub mod file;
mod own;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use tokio::sync::mpsc;

pub use self::own::{Conflict, Quarrel};
use crate::{
    lease::{Lease, LeaseAttributes, SubnetKey},
    network::NetworkConfig,
};

/// What a source reports. The first event of a watch is always a snapshot, and
/// another one follows whenever the source cannot tell the changes any more.
#[derive(Debug, Clone, PartialEq)]
pub enum LeaseEvent {
    /// Every lease there is, the own one included.
    Snapshot(Vec<Lease>),
    /// A lease appeared or any part of it changed.
    Put(Lease),
    /// A lease was removed or ran out.
    Removed(SubnetKey),
}

/// Why a source could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Worth another try: the registry is away, a file is half written, a race was lost.
    #[error("{0:#}")]
    Retry(anyhow::Error),
    /// Another try changes nothing: refused config, no free subnet.
    #[error("{0:#}")]
    Fatal(anyhow::Error),
}

/// A registry of leases. etcd and Kubernetes implement the same.
#[async_trait]
pub trait LeaseSource: Send + Sync {
    /// A name for status and logs, without secrets: `file /var/lib/leases`.
    fn describe(&self) -> String;

    /// Reads and validates the network config.
    async fn network_config(&self) -> Result<NetworkConfig, SourceError>;

    /// Claims a subnet for this node and publishes `attributes` with it.
    ///
    /// Order as in contract section 6.3: own previous lease by public IP, then
    /// `previous` (from the subnet file), then a free one.
    async fn acquire(
        &self,
        config: &NetworkConfig,
        attributes: &LeaseAttributes,
        previous: Option<Ipv4Net>,
    ) -> Result<Lease, SourceError>;

    /// Extends the own lease, or publishes changed attributes under it.
    /// Fails with `Retry` when another node holds the subnet now.
    async fn renew(&self, lease: &Lease) -> Result<Lease, SourceError>;

    /// Claims of other agents on what this one holds, as of the last event of the watch.
    fn conflicts(&self) -> Vec<Conflict>;

    /// Starts watching. Events arrive until the receiver is dropped; faults are
    /// logged and retried inside, one bad value never costs a good lease.
    async fn watch(&self) -> Result<mpsc::Receiver<LeaseEvent>, SourceError>;
}
