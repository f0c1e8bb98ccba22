//! The pods of this node, and which of them stay with the kernel.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use tracing::{debug, info, warn};

use crate::datapath::{
    exclusion::Exclusions,
    netlink::Rtnl,
    pods::{self, Ambiguous, Pod},
    shaping,
};

/// What was found last.
#[derive(Debug, Default)]
pub(super) struct Pods {
    pub(super) all: Vec<Pod>,
    ambiguous: Vec<Ambiguous>,
    /// Pods that stay with the kernel, by the index of their veth, and why.
    pub(super) kept: BTreeMap<u32, String>,
}

impl Pods {
    /// Looks for them. Better the ones known so far than none, where that fails.
    pub(super) async fn find(
        &mut self,
        rtnl: &mut Rtnl,
        subnet: Ipv4Net,
        vni: u32,
        exclusions: &Exclusions,
    ) {
        match pods::discover(rtnl, subnet).await {
            Ok(found) => {
                for claim in found
                    .ambiguous
                    .iter()
                    .filter(|claim| !self.ambiguous.contains(claim))
                {
                    let interfaces = claim.interfaces.join(", ");
                    warn!(address = %claim.address, interfaces, "claimed more than once: the kernel forwards it");
                }
                self.ambiguous = found.ambiguous;
                if self.all.len() != found.pods.len() {
                    debug!(pods = found.pods.len(), "pods on this node");
                }
                self.all = found.pods;
                self.find_kept(rtnl, vni, exclusions).await;
            }
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "cannot look for pods"
            ),
        }
    }

    /// Finds the pods whose packets must not pass by their veth's queue and filters.
    async fn find_kept(&mut self, rtnl: &mut Rtnl, vni: u32, exclusions: &Exclusions) {
        match shaping::find(rtnl, &self.all, vni).await {
            Ok(mut kept) => {
                for pod in &self.all {
                    if exclusions.interfaces.contains(&pod.interface) {
                        kept.insert(
                            pod.ifindex,
                            "--fast-path-exclude names its interface".to_owned(),
                        );
                    }
                }
                for (ifindex, reason) in &kept {
                    if self.kept.get(ifindex) != Some(reason) {
                        info!(ifindex, reason, "a pod stays with the kernel");
                    }
                }
                self.kept = kept;
            }
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "cannot look for shaped pods"
            ),
        }
    }
}
