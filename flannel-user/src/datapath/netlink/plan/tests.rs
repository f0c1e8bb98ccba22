use super::{super::entries::FoundRoute, *};
use crate::forwarding::ForwardingTable;

fn net(text: &str) -> Ipv4Net {
    text.parse().expect("a network")
}

fn ip(text: &str) -> Ipv4Addr {
    text.parse().expect("an address")
}

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

fn table(rows: &[(&str, &str, u8)]) -> ForwardingTable {
    ForwardingTable(
        rows.iter()
            .map(|(subnet, node, last)| {
                let via = Via::Vxlan {
                    node: ip(node),
                    vtep_mac: mac(*last),
                };
                (net(subnet), via)
            })
            .collect(),
    )
}

/// Bases whose objects are needed.
fn objects(entries: &Entries) -> BTreeSet<Ipv4Addr> {
    let bases = entries.routes.keys().map(Ipv4Net::network);
    bases.filter(|base| entries.needs_object(*base)).collect()
}

/// The kernel state in which nothing but `entries` exists.
fn as_found(entries: &Entries) -> Actual {
    Actual {
        fdb: entries
            .fdb
            .iter()
            .map(|(&mac, &node)| {
                let found = FoundFdb {
                    node: Some(node),
                    ours: true,
                };
                (mac, found)
            })
            .collect(),
        neighbours: entries
            .neighbours
            .iter()
            .map(|(&base, &mac)| {
                let found = FoundNeighbour {
                    mac: Some(mac),
                    permanent: true,
                };
                (base, found)
            })
            .collect(),
        routes: entries
            .routes
            .iter()
            .map(|(&subnet, &form)| (subnet, vec![FoundRoute { ours: Some(form) }]))
            .collect(),
        next_hops: Some(objects(entries)),
    }
}

fn wanted(rows: &[(&str, &str, u8)]) -> Entries {
    let (entries, conflicts) = Entries::wanted(&table(rows));
    assert_eq!(conflicts, []);
    entries
}

const TWO: &[(&str, &str, u8)] = &[
    ("10.244.1.0/24", "192.168.50.1", 1),
    ("10.244.2.0/24", "192.168.50.2", 2),
];

#[test]
fn an_empty_kernel_gets_everything_and_a_right_one_nothing() {
    let entries = wanted(TWO);
    let plan = Plan::between(&Actual::default(), &entries);
    assert_eq!(
        plan.fdb.len() + plan.neighbours.len() + plan.routes.len(),
        6
    );
    assert!(plan.withdraw.is_empty() && plan.stale_fdb.is_empty());
    assert!(Plan::between(&as_found(&entries), &entries).is_empty());
}

/// A few changes give the plan and the entries of a whole look, or no plan at all.
#[test]
fn the_plan_of_a_few_changes_is_that_of_the_whole() {
    const THIRD: (&str, &str, u8) = ("10.244.3.0/24", "192.168.50.3", 3);
    let more = [TWO[0], TWO[1], THIRD];
    let rows: &[(&[_], &[_], bool)] = &[
        (TWO, &more, true),
        (&more, TWO, true),
        (TWO, &[TWO[0], THIRD], true),
        (TWO, &[], true),
        // Another address, another MAC, both.
        (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.9", 2)], true),
        (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.2", 9)], true),
        (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.9", 9)], true),
        // Two that change places, another's MAC, a MAC that goes from one to another.
        (
            TWO,
            &[
                ("10.244.1.0/24", "192.168.50.2", 2),
                ("10.244.2.0/24", "192.168.50.1", 1),
            ],
            false,
        ),
        (TWO, &[TWO[0], ("10.244.2.0/24", "192.168.50.1", 1)], false),
        (TWO, &[("10.244.2.0/24", "192.168.50.1", 1)], false),
        // A MAC that is in use, a base that is in use, a MAC that stays in use.
        (
            TWO,
            &[TWO[0], TWO[1], ("10.244.3.0/24", "192.168.50.2", 2)],
            false,
        ),
        (
            TWO,
            &[TWO[0], TWO[1], ("10.244.2.0/25", "192.168.50.3", 3)],
            false,
        ),
        (
            &[TWO[0], ("10.244.3.0/24", "192.168.50.1", 1)],
            &TWO[..1],
            false,
        ),
    ];
    let in_form = |rows: &[_], form| {
        let mut entries = wanted(rows);
        entries.routes.values_mut().for_each(|route| *route = form);
        entries
    };
    for (before, after, is_simple) in rows {
        for form in [Form::Plain, Form::Object] {
            let mut programmed = in_form(before, form);
            let changes = Changes::between(&table(before), &table(after));
            let plan = Plan::of_changes(&changes, &programmed, form);
            assert_eq!(plan.is_some(), *is_simple, "{after:?}");
            let Some(plan) = plan else { continue };
            let before = as_found(&programmed);
            programmed.follow(&plan);
            let after = in_form(after, form);
            let whole = Plan::between(&before, &after);
            let sorted = |mut plan: Plan| {
                plan.stale_fdb.sort();
                plan.fdb.sort();
                plan
            };
            assert_eq!(sorted(plan), sorted(whole), "{after:?}");
            assert_eq!(programmed, after);
        }
    }
}

#[test]
fn a_vanished_peer_leaves_nothing() {
    let plan = Plan::between(&as_found(&wanted(TWO)), &wanted(&TWO[..1]));
    assert_eq!(
        plan,
        Plan {
            withdraw: vec![(net("10.244.2.0/24"), Form::Plain)],
            stale_neighbours: vec![ip("10.244.2.0")],
            stale_fdb: vec![(mac(2), Some(ip("192.168.50.2")))],
            ..Plan::default()
        }
    );
}

#[test]
fn a_new_mac_replaces_the_neighbour_and_the_old_fdb_entry() {
    let after = wanted(&[TWO[0], ("10.244.2.0/24", "192.168.50.2", 9)]);
    let plan = Plan::between(&as_found(&wanted(TWO)), &after);
    assert_eq!(
        plan,
        Plan {
            fdb: vec![(mac(9), ip("192.168.50.2"))],
            neighbours: vec![(ip("10.244.2.0"), mac(9))],
            stale_fdb: vec![(mac(2), Some(ip("192.168.50.2")))],
            ..Plan::default()
        }
    );
}

#[test]
fn a_new_address_replaces_the_fdb_entry_alone() {
    let after = wanted(&[TWO[0], ("10.244.2.0/24", "192.168.50.7", 2)]);
    let plan = Plan::between(&as_found(&wanted(TWO)), &after);
    assert_eq!(
        plan,
        Plan {
            fdb: vec![(mac(2), ip("192.168.50.7"))],
            ..Plan::default()
        }
    );
}

#[test]
fn a_strangers_route_in_front_is_replaced_and_elsewhere_left_alone() {
    let entries = wanted(TWO);
    let mut actual = as_found(&entries);
    let stranger = FoundRoute { ours: None };
    let plain = FoundRoute {
        ours: Some(Form::Plain),
    };
    actual.routes.insert(net("10.244.1.0/24"), vec![stranger]);
    actual
        .routes
        .insert(net("10.244.2.0/24"), vec![stranger, plain]);
    actual.routes.insert(net("0.0.0.0/0"), vec![stranger]);
    assert_eq!(
        Plan::between(&actual, &entries),
        Plan {
            withdraw: vec![(net("10.244.2.0/24"), Form::Plain)],
            routes: vec![
                (net("10.244.1.0/24"), Form::Plain),
                (net("10.244.2.0/24"), Form::Plain)
            ],
            ..Plan::default()
        }
    );
}

#[test]
fn what_others_put_on_the_device_stays_unless_a_peer_needs_the_key() {
    let entries = wanted(TWO);
    let mut actual = as_found(&entries);
    let learned = |node| FoundFdb {
        node: Some(ip(node)),
        ours: false,
    };
    actual.fdb.insert(mac(1), learned("192.168.50.66"));
    actual.fdb.insert(mac(77), learned("192.168.50.77"));
    let failed = FoundNeighbour {
        mac: None,
        permanent: false,
    };
    actual.neighbours.insert(ip("10.244.1.0"), failed);
    actual.neighbours.insert(ip("10.244.1.9"), failed);
    assert_eq!(
        Plan::between(&actual, &entries),
        Plan {
            fdb: vec![(mac(1), ip("192.168.50.1"))],
            neighbours: vec![(ip("10.244.1.0"), mac(1))],
            ..Plan::default()
        }
    );
}

#[test]
fn the_object_of_a_route_is_made_before_it_and_deleted_with_it() {
    let mut entries = wanted(TWO);
    entries.routes.insert(net("10.244.2.0/24"), Form::Object);
    let mut actual = as_found(&wanted(TWO));
    // A stranger made the route plain or took it away; the object is still there, or is not.
    actual.routes.remove(&net("10.244.2.0/24"));
    let mut plan = Plan {
        next_hops: vec![ip("10.244.2.0")],
        routes: vec![(net("10.244.2.0/24"), Form::Object)],
        ..Plan::default()
    };
    assert_eq!(Plan::between(&actual, &entries), plan);
    actual.next_hops = Some(BTreeSet::from([ip("10.244.2.0")]));
    plan.next_hops.clear();
    assert_eq!(Plan::between(&actual, &entries), plan);

    assert_eq!(
        Plan::between(&as_found(&entries), &wanted(&TWO[..1])),
        Plan {
            withdraw: vec![(net("10.244.2.0/24"), Form::Object)],
            stale_next_hops: vec![ip("10.244.2.0")],
            stale_neighbours: vec![ip("10.244.2.0")],
            stale_fdb: vec![(mac(2), Some(ip("192.168.50.2")))],
            ..Plan::default()
        }
    );
}

/// The original agent replaces the route by a plain one and leaves the object.
#[test]
fn an_object_that_no_route_needs_is_stale() {
    let entries = wanted(TWO);
    let mut actual = as_found(&entries);
    actual.next_hops = Some(BTreeSet::from([ip("10.244.1.0"), ip("10.244.9.0")]));
    assert_eq!(
        Plan::between(&actual, &entries),
        Plan {
            stale_next_hops: vec![ip("10.244.1.0"), ip("10.244.9.0")],
            ..Plan::default()
        }
    );
    actual.next_hops = None;
    assert!(Plan::between(&actual, &entries).is_empty());
}

#[test]
fn a_refused_object_makes_the_route_plain_and_a_refused_neighbour_leaves_it_out() {
    let both = [ip("10.244.1.0"), ip("10.244.2.0")];
    let mut plan = Plan {
        next_hops: both.to_vec(),
        routes: vec![
            (net("10.244.1.0/24"), Form::Object),
            (net("10.244.2.0/24"), Form::Object),
        ],
        ..Plan::default()
    };
    plan.without_objects(&BTreeSet::from([both[0]]));
    assert_eq!(plan.routes[0].1, Form::Plain);
    assert_eq!(plan.routes[1].1, Form::Object);
    plan.without_routes(&BTreeSet::from([both[1]]));
    assert_eq!(plan.routes, [(net("10.244.1.0/24"), Form::Plain)]);
    assert_eq!(plan.next_hops, [both[0]]);
}
