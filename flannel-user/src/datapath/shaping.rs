//! Which veths must keep their packets: shaped ones, and those with a filter or program of
//! somebody else.
//!
//! A packet that bypasses the stack also passes by the root qdisc of a pod's
//! veth and by whatever others attached behind us: the CNI bandwidth plugin's
//! limits above all.

use std::collections::{BTreeMap, BTreeSet};

use aya::programs::{SchedClassifier, TcAttachType};
use flannel_ebpf::layout::{FROM_POD, PARKED, TO_POD};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcMessage},
};

use super::{
    ebpf::CLSACT_PRIORITY,
    netlink::rtnl::{Rtnl, RtnlError},
    pods::Pod,
};

/// Parents of filters at a clsact qdisc (`TC_H_MIN_INGRESS`, `TC_H_MIN_EGRESS`), and at the older
/// ingress qdisc.
const HOOKS: [u32; 3] = [0xffff_fff2, 0xffff_fff3, 0xffff_0000];
/// What the kernel calls a veth without queueing.
const NO_QUEUE: &str = "noqueue";

/// Why packets of a veth must not bypass the stack, by interface index. `vni` tells our own
/// filters apart.
///
/// # Errors
/// The kernel's queueing disciplines or filters could not be read.
pub async fn find(
    rtnl: &mut Rtnl,
    pods: &[Pod],
    vni: u32,
) -> Result<BTreeMap<u32, String>, RtnlError> {
    let veths: BTreeMap<u32, &str> = pods
        .iter()
        .map(|pod| (pod.ifindex, pod.interface.as_str()))
        .collect();
    if veths.is_empty() {
        return Ok(BTreeMap::new());
    }
    let answer = rtnl
        .dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))
        .await?;
    let disciplines: Vec<TcMessage> = answer
        .into_iter()
        .filter_map(|message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(discipline) => Some(discipline),
            _ => None,
        })
        .collect();
    let mut kept = shaped(&disciplines, &veths);
    for index in hooked(&disciplines, &veths) {
        if kept.contains_key(&index) {
            continue;
        }
        for parent in HOOKS {
            let mut request = TcMessage::default();
            request.header.index = index.cast_signed();
            request.header.parent = TcHandle::from(parent);
            // A hook that this qdisc has not answers with an error: no filters there.
            let answer = rtnl
                .dump(RouteNetlinkMessage::GetTrafficFilter(request))
                .await
                .unwrap_or_default();
            let foreign = answer.iter().any(|message| match message {
                RouteNetlinkMessage::NewTrafficFilter(filter) => {
                    filter.header.index == index.cast_signed() && is_foreign(filter, vni)
                }
                _ => false,
            });
            if foreign {
                kept.insert(
                    index,
                    "its veth has a tc filter of somebody else".to_owned(),
                );
            }
        }
    }
    for (index, interface) in &veths {
        if !kept.contains_key(index)
            && let Some(name) = foreign_program(interface)
        {
            kept.insert(*index, format!("its veth has the tcx program {name:?}"));
        }
    }
    Ok(kept)
}

fn kind(discipline: &TcMessage) -> &str {
    discipline
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            TcAttribute::Kind(kind) => Some(kind.as_str()),
            _ => None,
        })
        .unwrap_or_default()
}

/// Veths whose root qdisc is one that queues.
fn shaped(disciplines: &[TcMessage], veths: &BTreeMap<u32, &str>) -> BTreeMap<u32, String> {
    disciplines
        .iter()
        .filter(|one| one.header.parent == TcHandle::ROOT && kind(one) != NO_QUEUE)
        .filter_map(|one| {
            let index = one.header.index.cast_unsigned();
            veths
                .contains_key(&index)
                .then(|| (index, format!("its veth has the root qdisc {}", kind(one))))
        })
        .collect()
}

/// Veths that have a qdisc which filters can sit at.
fn hooked(disciplines: &[TcMessage], veths: &BTreeMap<u32, &str>) -> BTreeSet<u32> {
    disciplines
        .iter()
        .filter(|one| matches!(kind(one), "clsact" | "ingress"))
        .map(|one| one.header.index.cast_unsigned())
        .filter(|index| veths.contains_key(index))
        .collect()
}

/// Is this filter somebody else's? Of each priority the kernel also lists the empty head, with
/// handle 0.
fn is_foreign(filter: &TcMessage, vni: u32) -> bool {
    let priority = (filter.header.info >> 16) as u16;
    let handle = u32::from(filter.header.handle);
    handle != 0 && !(priority == CLSACT_PRIORITY && handle == vni + 1)
}

/// A tcx program on the veth that is none of ours. Without the right to ask (CAP_SYS_ADMIN)
/// there is none as far as we know.
fn foreign_program(interface: &str) -> Option<String> {
    [TcAttachType::Ingress, TcAttachType::Egress]
        .into_iter()
        .filter_map(|side| SchedClassifier::query_tcx(interface, side).ok())
        .flat_map(|(_, programs)| programs)
        .filter_map(|program| program.name_as_str().map(str::to_owned))
        .find(|name| ![FROM_POD, TO_POD, PARKED].contains(&name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn discipline(index: i32, parent: TcHandle, kind: &str) -> TcMessage {
        let mut message = TcMessage::default();
        message.header.index = index;
        message.header.parent = parent;
        message.attributes.push(TcAttribute::Kind(kind.to_owned()));
        message
    }

    #[test]
    fn only_root_qdiscs_that_queue_shape() {
        let veths = BTreeMap::from([(3, "veth3"), (4, "veth4"), (5, "veth5")]);
        let found = [
            discipline(3, TcHandle::ROOT, "noqueue"),
            discipline(4, TcHandle::ROOT, "tbf"),
            discipline(5, TcHandle::from(0xffff_fff1), "clsact"),
            discipline(9, TcHandle::ROOT, "fq_codel"),
        ];
        let shaped = shaped(&found, &veths);
        assert_eq!(shaped.keys().copied().collect::<Vec<_>>(), [4]);
        assert!(shaped[&4].contains("tbf"));
        assert_eq!(hooked(&found, &veths), BTreeSet::from([5]));
    }

    #[test]
    fn our_own_filter_and_empty_heads_are_not_foreign() {
        let filter = |priority: u32, handle: u32| {
            let mut message = TcMessage::default();
            message.header.info = priority << 16;
            message.header.handle = TcHandle::from(handle);
            message
        };
        let own = u32::from(CLSACT_PRIORITY);
        assert!(!is_foreign(&filter(own, 2), 1));
        assert!(!is_foreign(&filter(own, 0), 1));
        assert!(
            is_foreign(&filter(own, 1), 1),
            "same priority, other handle"
        );
        assert!(is_foreign(&filter(1, 2), 1));
    }
}
