//! The operations of contract section 6.2, each over whichever endpoint works.

use std::time::{Duration, SystemTime};

use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};

use super::{cluster::Cluster, error::EtcdError, keys::Keys};

/// Leases per answer: a whole list of thousands would be held several times over.
const PAGE: i64 = 1000;
/// Largest answer accepted, in bytes; tonic's default of 4 MB would be one long page of
/// somebody's large values.
pub(super) const LARGEST_ANSWER: usize = 512 << 20;
/// Lists begun anew because of a compaction between two pages.
const LIST_ATTEMPTS: usize = 3;

/// The keys of one flannel network in etcd.
#[derive(Debug)]
pub(super) struct Registry {
    cluster: Cluster,
    keys: Keys,
    lease_ttl: Duration,
}

/// A key as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) key: Vec<u8>,
    pub(super) value: Vec<u8>,
    /// The revision of its last change.
    pub(super) mod_revision: i64,
    /// The etcd lease that it is attached to; 0 is none.
    pub(super) lease: i64,
}

/// Every key that begins with `<prefix>/subnets`, in order.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub(super) revision: i64,
    pub(super) entries: Vec<Entry>,
}

/// An etcd lease of this agent.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grant {
    pub(super) id: i64,
    pub(super) expires: SystemTime,
}

impl Entry {
    pub(super) fn of(kv: KeyValue) -> Self {
        let (mod_revision, lease) = (kv.mod_revision(), kv.lease());
        let (key, value) = kv.into_key_value();
        Self {
            key,
            value,
            mod_revision,
            lease,
        }
    }
}

impl Registry {
    pub(super) fn new(cluster: Cluster, keys: Keys, lease_ttl: Duration) -> Self {
        Self {
            cluster,
            keys,
            lease_ttl,
        }
    }

    pub(super) fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(super) fn lease_ttl(&self) -> Duration {
        self.lease_ttl
    }

    /// One key.
    pub(super) async fn read(&self, key: &str) -> Result<Option<Entry>, EtcdError> {
        let mut answer = self
            .cluster
            .call(|client| async move {
                let mut kv = client.kv_client().max_decoding_message_size(LARGEST_ANSWER);
                kv.get(key, None).await
            })
            .await?;
        Ok(answer.take_kvs().pop().map(Entry::of))
    }

    /// Every lease, as of one revision.
    pub(super) async fn list(&self) -> Result<Listing, EtcdError> {
        let mut attempt = 1;
        loop {
            match self.list_pages().await {
                Err(EtcdError::Compacted) if attempt < LIST_ATTEMPTS => attempt += 1,
                listing => return listing,
            }
        }
    }

    async fn list_pages(&self) -> Result<Listing, EtcdError> {
        let mut listing = Listing::default();
        let mut from = self.keys.subnets.clone().into_bytes();
        loop {
            let options = GetOptions::new()
                .with_range(self.keys.subnets_end())
                .with_limit(PAGE)
                .with_revision(listing.revision);
            let (start, options) = (&from, &options);
            let mut page = self
                .cluster
                .call(|client| async move {
                    let mut kv = client.kv_client().max_decoding_message_size(LARGEST_ANSWER);
                    kv.get(start.clone(), Some(options.clone())).await
                })
                .await?;
            if listing.revision == 0 {
                listing.revision = page.header().map_or(0, |header| header.revision());
            }
            let more = page.more();
            listing
                .entries
                .extend(page.take_kvs().into_iter().map(Entry::of));
            match listing.entries.last() {
                Some(last) if more => {
                    from.clone_from(&last.key);
                    from.push(0);
                }
                _ => return Ok(listing),
            }
        }
    }

    /// A new etcd lease for the full time to live.
    pub(super) async fn grant(&self) -> Result<Grant, EtcdError> {
        let asked = SystemTime::now();
        let ttl = i64::try_from(self.lease_ttl.as_secs()).unwrap_or(i64::MAX);
        let granted = self
            .cluster
            .call(|client| async move { client.lease_client().grant(ttl, None).await })
            .await?;
        let seconds = u64::try_from(granted.ttl()).unwrap_or_default();
        Ok(Grant {
            id: granted.id(),
            expires: asked + Duration::from_secs(seconds),
        })
    }

    /// Gives an etcd lease back, as far as that can be done: it runs out anyway.
    pub(super) async fn revoke(&self, id: i64) {
        let revoked = self
            .cluster
            .call_once(|client| async move { client.lease_client().revoke(id).await })
            .await;
        if let Err(error) = revoked {
            tracing::debug!(%error, "an unused etcd lease is left to run out");
        }
    }

    /// Creates a key. False if it exists.
    pub(super) async fn create(
        &self,
        key: &str,
        value: &str,
        lease: i64,
    ) -> Result<bool, EtcdError> {
        let absent = Compare::version(key, CompareOp::Equal, 0);
        self.put_if(absent, key, value, lease).await
    }

    /// Replaces a key. False if it is not as of `mod_revision` any more.
    pub(super) async fn replace(
        &self,
        key: &str,
        mod_revision: i64,
        value: &str,
        lease: i64,
    ) -> Result<bool, EtcdError> {
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, mod_revision);
        self.put_if(unchanged, key, value, lease).await
    }

    async fn put_if(
        &self,
        condition: Compare,
        key: &str,
        value: &str,
        lease: i64,
    ) -> Result<bool, EtcdError> {
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)));
        self.commit(Txn::new().when([condition]).and_then([put]))
            .await
    }

    /// Removes a key. False if it is not as of `mod_revision` any more.
    pub(super) async fn remove(&self, key: &[u8], mod_revision: i64) -> Result<bool, EtcdError> {
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, mod_revision);
        let delete = TxnOp::delete(key, None);
        self.commit(Txn::new().when([unchanged]).and_then([delete]))
            .await
    }

    async fn commit(&self, transaction: Txn) -> Result<bool, EtcdError> {
        let answer = self
            .cluster
            .call_once(|client| async move { client.kv_client().txn(transaction).await })
            .await?;
        Ok(answer.succeeded())
    }
}
