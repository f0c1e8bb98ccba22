//! The vxlan backend.
//!
//! Each node has one VXLAN device, `flannel.<VNI>`, and publishes its MAC address in
//! its lease. The kernel never has to ask for anything: it knows each peer's tunnel
//! device (neighbour entry) and the node behind it (FDB entry) before the route to the
//! pod subnet appears. Per remote node, in this order (contract section 9.4):
//!
//! 1. neighbour `<subnet base> lladdr <VtepMAC>` on the device, permanent
//! 2. FDB entry `<VtepMAC> dst <PublicIP> self permanent`
//! 3. route `<subnet> via <subnet base> dev flannel.<VNI> onlink`, last, because the
//!    kernel would ask for the neighbour at once
//!
//! This module only says which peer is reached how; the datapaths program it.

use std::{collections::BTreeMap, net::Ipv4Addr};

use crate::{
    forwarding::{ForwardingTable, Update, Via},
    lease::{
        Lease, LeaseAttributes, SubnetKey, VxlanData,
        attributes::{VXLAN, VxlanDataError},
        table::LeaseTable,
    },
    mac::MacAddr,
};

/// A lease that gives no way to its node. It costs no other lease anything.
#[derive(Debug)]
pub struct Skipped {
    /// The lease.
    pub key: SubnetKey,
    /// What is wrong with it.
    pub reason: SkipReason,
}

/// Why a lease gives no way to its node.
#[derive(Debug, thiserror::Error)]
pub enum SkipReason {
    /// The node runs another backend.
    #[error("its backend is {0:?}, not \"vxlan\"")]
    OtherBackend(String),
    /// The lease does not say where the node is, or names an address no node has.
    #[error("its PublicIP {0} is no node's address")]
    UnusablePublicIp(Ipv4Addr),
    /// The backend data is missing or bad.
    #[error("{0}")]
    BadData(#[from] VxlanDataError),
    /// All-zero, multicast or broadcast: in an FDB, that is every destination.
    #[error("its VtepMAC {0} is no single device's address")]
    UnusableMac(MacAddr),
}

/// What this node publishes.
#[must_use]
pub fn attributes(public_ip: Ipv4Addr, vtep_mac: MacAddr, vni: u32) -> LeaseAttributes {
    let data = VxlanData {
        vni: Some(vni),
        vtep_mac,
    };
    LeaseAttributes::vxlan(public_ip, data)
}

/// The way to each of these peers, and the leases that give none, in order of their keys.
#[must_use]
pub fn forwarding_table<'a>(
    peers: impl Iterator<Item = &'a Lease>,
) -> (ForwardingTable, Vec<Skipped>) {
    let mut forwarding = ForwardingTable::default();
    let mut skipped = Vec::new();
    for lease in peers {
        match way_to(lease) {
            Ok(via) => {
                forwarding.0.insert(lease.key.v4, via);
            }
            Err(reason) => skipped.push(Skipped {
                key: lease.key,
                reason,
            }),
        }
    }
    (forwarding, skipped)
}

/// What an event about leases means for the ways to peers: a change of one lease costs the
/// reading of one lease, however many there are.
#[derive(Debug, Default)]
pub struct Ways {
    /// Leases that give no way, with the reason.
    left_out: BTreeMap<SubnetKey, String>,
}

impl Ways {
    /// The news in `leases` after an event about one subnet, or about all of them. Names what is
    /// left out from now on, or for another reason than before.
    pub fn follow(
        &mut self,
        leases: &LeaseTable,
        about: Option<&SubnetKey>,
    ) -> (Update, Vec<Skipped>) {
        let (update, skipped) = match about {
            None => {
                let (table, skipped) = forwarding_table(leases.peers());
                (Update::Whole(table), skipped)
            }
            // A dual-stack lease and another one may share the IPv4 half.
            Some(key) => {
                let (table, skipped) = forwarding_table(leases.peers_at(&key.v4));
                let way = table.0.get(&key.v4).copied();
                (Update::Some(BTreeMap::from([(key.v4, way)])), skipped)
            }
        };
        let concerned = |other: &SubnetKey| about.is_none_or(|key| other.v4 == key.v4);
        let mut before = BTreeMap::new();
        self.left_out.retain(|key, reason| {
            let stays = !concerned(key);
            if !stays {
                before.insert(*key, std::mem::take(reason));
            }
            stays
        });
        let mut news = Vec::new();
        for lease in skipped {
            let reason = lease.reason.to_string();
            let is_known = before.get(&lease.key) == Some(&reason);
            self.left_out.insert(lease.key, reason);
            if !is_known {
                news.push(lease);
            }
        }
        (update, news)
    }
}

fn way_to(lease: &Lease) -> Result<Via, SkipReason> {
    let attributes = &lease.attributes;
    if attributes.backend_type != VXLAN {
        return Err(SkipReason::OtherBackend(attributes.backend_type.clone()));
    }
    let node = attributes.public_ip;
    if node.is_unspecified() || node.is_multicast() || node.is_broadcast() {
        return Err(SkipReason::UnusablePublicIp(node));
    }
    let vtep_mac = attributes.vxlan_data()?.vtep_mac;
    let is_group = vtep_mac.0[0] & 1 == 1;
    if is_group || vtep_mac == MacAddr::default() {
        return Err(SkipReason::UnusableMac(vtep_mac));
    }
    Ok(Via::Vxlan { node, vtep_mac })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::source::LeaseEvent;

    const MAC: MacAddr = MacAddr([0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]);
    const NODE: Ipv4Addr = Ipv4Addr::new(192, 168, 50, 2);

    fn lease(key: &str, attributes: LeaseAttributes) -> Lease {
        Lease {
            key: key.parse().expect("a key"),
            attributes,
            expires: None,
        }
    }

    fn table_of(leases: Vec<Lease>) -> LeaseTable {
        let mut table = LeaseTable::new(&"10.244.1.0-24".parse().expect("a key"));
        table.apply(LeaseEvent::Snapshot(leases));
        table
    }

    #[test]
    fn this_node_publishes_what_flannel_publishes() {
        assert_eq!(
            attributes(NODE, MAC, 4096).to_json(),
            r#"{"PublicIP":"192.168.50.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":4096,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#
        );
    }

    #[test]
    fn every_peer_and_only_peers_have_a_way() {
        let (forwarding, skipped) = forwarding_table(
            table_of(vec![
                lease("10.244.1.0-24", attributes(Ipv4Addr::LOCALHOST, MAC, 1)),
                lease("10.244.2.0-24", attributes(NODE, MAC, 1)),
                lease("10.244.3.0-24&fd00::-64", attributes(NODE, MAC, 9)),
            ])
            .peers(),
        );
        assert!(skipped.is_empty(), "{skipped:?}");
        let via = Via::Vxlan {
            node: NODE,
            vtep_mac: MAC,
        };
        let wanted = ["10.244.2.0/24", "10.244.3.0/24"];
        let wanted = wanted.map(|subnet| (subnet.parse().expect("a network"), via));
        assert_eq!(forwarding, ForwardingTable(wanted.into()));
    }

    #[rstest]
    #[case(r#"{"PublicIP":"192.168.50.3"}"#, r#"its backend is """#)]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"host-gw"}"#,
        r#"its backend is "host-gw""#
    )]
    #[case(
        r#"{"BackendType":"vxlan","BackendData":{"VtepMAC":"c6:d2:32:6f:8f:45"}}"#,
        "PublicIP 0.0.0.0"
    )]
    #[case(
        r#"{"PublicIP":"224.0.0.1","BackendType":"vxlan","BackendData":{"VtepMAC":"c6:d2:32:6f:8f:45"}}"#,
        "PublicIP 224.0.0.1"
    )]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"vxlan"}"#,
        "BackendData is missing"
    )]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"vxlan","BackendData":7}"#,
        "BackendData is 7"
    )]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"vxlan","BackendData":{"VtepMAC":""}}"#,
        r#"bad VtepMAC: """#
    )]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"vxlan","BackendData":{"VtepMAC":"00:00:00:00:00:00"}}"#,
        "VtepMAC 00:00:00:00:00:00"
    )]
    #[case(
        r#"{"PublicIP":"192.168.50.3","BackendType":"vxlan","BackendData":{"VtepMAC":"ff:ff:ff:ff:ff:ff"}}"#,
        "VtepMAC ff:ff:ff:ff:ff:ff"
    )]
    fn a_bad_lease_is_named_and_costs_no_good_peer(#[case] bad: &str, #[case] says: &str) {
        let bad = LeaseAttributes::from_json(bad).expect("a lease");
        let (forwarding, skipped) = forwarding_table(
            table_of(vec![
                lease("10.244.2.0-24", attributes(NODE, MAC, 1)),
                lease("10.244.3.0-24", bad),
            ])
            .peers(),
        );
        assert_eq!(forwarding.0.len(), 1);
        let [skipped] = skipped.as_slice() else {
            panic!("one is skipped: {skipped:?}");
        };
        assert_eq!(skipped.key.to_string(), "10.244.3.0-24");
        let reason = skipped.reason.to_string();
        assert!(reason.contains(says), "{reason}");
    }

    /// Whatever comes in whatever order: event by event gives what the whole gives.
    #[test]
    fn following_event_by_event_gives_the_whole_table() {
        let mut leases = table_of(Vec::new());
        let mut ways = Ways::default();
        let mut table = ForwardingTable::default();
        let (update, skipped) = ways.follow(&leases, None);
        assert!(skipped.is_empty());
        table.update(update);
        let good = |last: u8| attributes(Ipv4Addr::new(192, 168, 50, last), MAC, 1);
        let bad = LeaseAttributes::plain(NODE);
        let put = |key: &str, attributes| LeaseEvent::Put(lease(key, attributes));
        let gone = |key: &str| LeaseEvent::Removed(key.parse().expect("a key"));
        for (event, said) in [
            (put("10.244.2.0-24", good(2)), 0),
            (put("10.244.3.0-24", bad.clone()), 1),
            (put("10.244.3.0-24", bad.clone()), 0),
            (put("10.244.4.0-24&fd00::-64", good(4)), 0),
            (put("10.244.4.0-24", good(5)), 0),
            (put("10.244.2.0-24", good(6)), 0),
            (put("10.244.2.0-24", bad), 1),
            (gone("10.244.4.0-24"), 0),
            (put("10.244.3.0-24", good(3)), 0),
            (gone("10.244.2.0-24"), 0),
            (gone("10.244.9.0-24"), 0),
        ] {
            let key = match &event {
                LeaseEvent::Put(lease) => lease.key,
                LeaseEvent::Removed(key) => *key,
                LeaseEvent::Snapshot(_) => unreachable!("none above"),
            };
            leases.apply(event);
            let (update, news) = ways.follow(&leases, Some(&key));
            assert_eq!(news.len(), said, "{key}");
            table.update(update);
            let (whole, skipped) = forwarding_table(leases.peers());
            assert_eq!(table, whole, "{key}");
            assert_eq!(ways.left_out.len(), skipped.len(), "{key}");
        }
    }
}
