//! The loaded programs through BPF test_run: every row of the packet table
//! against the kernel, byte for byte. Needs root.

use std::mem;

use aya::{
    maps::{
        Array, HashMap, Map, PerCpuArray,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TestRun as _, TestRunOptions},
};
use flannel_ebpf::{
    layout::{
        COUNTERS, FROM_POD, FROM_UPLINK, FlowKey, LOCAL_PODS, LocalPod, NODE, NodeConfig, OWN,
        OwnFlow, PEER_NODES, REMOTE_SUBNETS, RemoteSubnet, Tally,
    },
    own,
    packet::Packet,
    reason::{Action, Direction, Reason},
    rows::{self, Expect, Row},
    sighting::Way,
};
use flannel_user::datapath::ebpf::Programs;

/// `TC_ACT_UNSPEC`, `TC_ACT_SHOT` and `TC_ACT_REDIRECT`.
const NEXT: u32 = u32::MAX;
const DROP: u32 = 2;
const REDIRECT: u32 = 7;

/// Offset of `gso_size` in the kernel's `struct __sk_buff` (include/uapi/linux/bpf.h).
const GSO_SIZE: usize = 176;
/// Length up to and including `gso_size`.
const CONTEXT: usize = 180;

macro_rules! map {
    ($programs:expr, $name:expr) => {
        $programs
            .ebpf_mut()
            .map_mut($name)
            .expect($name)
            .try_into()
            .expect($name)
    };
}

fn filled() -> Programs {
    assert!(
        nix::unistd::geteuid().is_root(),
        "loading programs needs root: run the tests as root"
    );
    let mut programs = Programs::load(None, flannel_ebpf::layout::DEFAULT_FLOWS)
        .expect("this kernel loads the programs");
    let mut node: Array<_, NodeConfig> = map!(programs, NODE);
    node.set(0, rows::node(), 0).expect("node written");
    let mut subnets: LpmTrie<_, [u8; 4], RemoteSubnet> = map!(programs, REMOTE_SUBNETS);
    for (base, len, remote) in rows::remotes() {
        subnets
            .insert(&Key::new(len, base), remote, 0)
            .expect("subnet written");
    }
    let mut peers: HashMap<_, [u8; 4], u32> = map!(programs, PEER_NODES);
    for (_, _, remote) in rows::remotes() {
        peers.insert(remote.node, 1, 0).expect("peer written");
    }
    let mut pods: HashMap<_, [u8; 4], LocalPod> = map!(programs, LOCAL_PODS);
    for (address, pod) in rows::pods() {
        pods.insert(address, pod, 0).expect("pod written");
    }
    programs
}

/// The flow of a row's packet, as the pod sends it, if it is TCP.
fn connection(row: &Row) -> Option<FlowKey> {
    const TCP: u8 = 6;
    let (frame, offset) = match row.direction {
        Direction::Out => (row.frame(), 14),
        _ => (row.frame(), flannel_ebpf::outer::INNER_IP),
    };
    let key = Packet::read(&frame, offset)?.key;
    let key = match row.direction {
        Direction::Out => key,
        _ => key.reversed(),
    };
    (key.protocol == TCP).then_some(key)
}

/// What the loaded program makes of a row: the packets that open nothing are of own connections,
/// so TCP meets all that the row says. Everything else is left to learning, with its own checks.
fn expected(row: &Row, is_own: bool) -> Option<Expect> {
    if is_own {
        return Some(row.expect.clone());
    }
    // Frames that are refused before anybody asks for their flow.
    match (&row.expect, row.direction) {
        (Expect::Becomes(_), Direction::Out) => Some(Expect::Stays(Reason::OutHeld)),
        (Expect::Becomes(_), _) => Some(Expect::Stays(Reason::InUnlearned)),
        (Expect::Stays(reason), _) => early(*reason).then(|| row.expect.clone()),
    }
}

/// Is it a reason that holds whether or not the flow could be carried?
fn early(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::OutNotIpv4
            | Reason::OutIpOptions
            | Reason::OutMulticast
            | Reason::InNotTunnel
            | Reason::InNotForHost
            | Reason::InOtherAddress
            | Reason::InVxlanFlags
            | Reason::InOtherVni
            | Reason::InOtherVtep
            | Reason::InNotIpv4
            | Reason::InIpOptions
            | Reason::InMulticast
            | Reason::InForged
            | Reason::InSourceUnknown
            | Reason::InProtocol
    )
}

fn tallies(programs: &mut Programs) -> Vec<u64> {
    let counters: PerCpuArray<_, Tally> = map!(programs, COUNTERS);
    let sum = |reason: &Reason| {
        let values = counters.get(&reason.index(), 0).expect("counter read");
        values.iter().map(|tally| tally.packets).sum()
    };
    Reason::ALL.iter().map(sum).collect()
}

fn run(program: &SchedClassifier, row: &Row) -> (u32, Vec<u8>) {
    let mut context = [0u8; CONTEXT];
    context[GSO_SIZE..].copy_from_slice(&row.gso_size.to_ne_bytes());
    let mut out = vec![0; row.given.len() + 256];
    let result = program
        .test_run(TestRunOptions {
            data_in: Some(&row.given),
            data_out: Some(&mut out),
            ctx_in: (row.gso_size != 0).then_some(&context[..]),
            ..TestRunOptions::default()
        })
        .unwrap_or_else(|error| panic!("test_run of {:?}: {error:?}", row.what));
    out.truncate(result.data_size_out as usize);
    (result.return_value, out)
}

/// Runs a whole table; after each row exactly its own counter has moved by one.
fn check(program: &'static str, table: Vec<Row>) {
    let mut programs = filled();
    let (mut checked, all) = (0, table.len());
    // test_run refuses frames that end inside the IP header; the host tests have those rows.
    for row in table.into_iter().filter(|row| row.given.len() >= 34) {
        let key = connection(&row);
        if let Some(key) = &key {
            let mut table: HashMap<_, FlowKey, OwnFlow> = map!(programs, OWN);
            table
                .insert(key, own::opened(Way::Out, 0), 0)
                .expect("connection written");
        }
        let Some(expect) = expected(&row, key.is_some()) else {
            continue;
        };
        checked += 1;
        let before = tallies(&mut programs);
        let (verdict, mut out) = run(programs.classifier(program).expect("program"), &row);
        let after = tallies(&mut programs);
        let refused = match row.direction {
            Direction::Out => Reason::OutNoRoom,
            _ => Reason::InNoRoom,
        };
        let reason = match &expect {
            // test_run cannot say "TCP" of a segmentation-offload packet, so the kernel
            // refuses to change its room: the case in which nothing may be touched.
            Expect::Becomes(_) if row.gso_size != 0 => {
                assert_eq!(verdict, NEXT, "{}", row.what);
                assert_eq!(out, row.given, "{}: bytes must be untouched", row.what);
                refused
            }
            Expect::Becomes(expected) => {
                assert_eq!(verdict, REDIRECT, "{}", row.what);
                if row.direction == Direction::Out {
                    assert_eq!(
                        rows::checksum(&out[14..34]),
                        [0, 0],
                        "outer checksum: {}",
                        row.what
                    );
                    let port = u16::from_be_bytes([out[34], out[35]]);
                    assert!(
                        (32768..60999).contains(&port),
                        "source port {port}: {}",
                        row.what
                    );
                    out[18..20].fill(0);
                    out[24..26].fill(0);
                    out[34..36].fill(0);
                }
                assert_eq!(&out, expected, "{}", row.what);
                if row.direction == Direction::Out {
                    Reason::Encapsulated
                } else {
                    Reason::Decapsulated
                }
            }
            Expect::Stays(reason) => {
                let expected = if reason.action() == Action::Dropped {
                    DROP
                } else {
                    NEXT
                };
                assert_eq!(verdict, expected, "{} ({reason:?})", row.what);
                assert_eq!(out, row.given, "{}: bytes must be untouched", row.what);
                *reason
            }
        };
        let outcomes = Reason::ALL.iter().enumerate();
        for (index, other) in outcomes.filter(|(_, other)| other.direction() != Direction::Own) {
            let expected = before[index] + u64::from(*other == reason);
            assert_eq!(
                after[index], expected,
                "counter {other:?} after {:?}",
                row.what
            );
        }
    }
    assert!(checked * 10 >= all * 7, "only {checked} of {all} rows");
}

#[test]
fn nothing_is_carried_while_the_fast_path_is_off() {
    let mut programs = filled();
    let mut node: Array<_, NodeConfig> = map!(programs, NODE);
    let off = NodeConfig {
        flags: 0,
        ..rows::node()
    };
    node.set(0, off, 0).expect("node written");
    for (program, row, reason) in [
        (FROM_POD, &rows::way_out()[0], Reason::OutFastPathOff),
        (FROM_UPLINK, &rows::way_in()[0], Reason::InFastPathOff),
    ] {
        let before = tallies(&mut programs);
        let (verdict, out) = run(programs.classifier(program).expect("program"), row);
        let after = tallies(&mut programs);
        assert_eq!((verdict, &out), (NEXT, &row.given));
        let index = reason.index() as usize;
        assert_eq!(after[index], before[index] + 1);
    }
}

#[test]
fn the_way_out_byte_for_byte() {
    check(FROM_POD, rows::way_out());
}

#[test]
fn the_way_in_byte_for_byte() {
    check(FROM_UPLINK, rows::way_in());
}

#[test]
fn identifications_advance_packet_by_packet() {
    let mut programs = filled();
    let row = &rows::way_out()[0];
    let mut table: HashMap<_, FlowKey, OwnFlow> = map!(programs, OWN);
    let key = connection(row).expect("TCP");
    table
        .insert(key, own::opened(Way::Out, 0), 0)
        .expect("connection written");
    let ident = |out: &[u8]| u16::from_be_bytes([out[18], out[19]]);
    let program = programs.classifier(FROM_POD).expect("program");
    // On one CPU the counter is one sequence.
    let mut cpus = nix::sched::CpuSet::new();
    cpus.set(0).expect("CPU 0");
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cpus).expect("pinned");
    let first = ident(&run(program, row).1);
    let second = ident(&run(program, row).1);
    assert_eq!(second, first.wrapping_add(1));
}

#[test]
fn values_have_the_sizes_of_the_maps() {
    let mut programs = filled();
    for (name, size) in [
        (NODE, mem::size_of::<NodeConfig>()),
        (REMOTE_SUBNETS, mem::size_of::<RemoteSubnet>()),
        (LOCAL_PODS, mem::size_of::<LocalPod>()),
        (COUNTERS, mem::size_of::<Tally>()),
    ] {
        let value_size = match programs.ebpf_mut().map_mut(name).expect("map") {
            Map::Array(data) | Map::HashMap(data) | Map::LpmTrie(data) | Map::PerCpuArray(data) => {
                data.info().expect("map info").value_size()
            }
            other => panic!("{name} is {other:?}"),
        };
        assert_eq!(value_size as usize, size, "{name}");
    }
}
