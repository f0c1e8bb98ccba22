//! Reading the flow tables whole, at the size they have in the field. Needs root.

use std::{collections::BTreeSet, time::Instant};

use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData};
use bytemuck::Zeroable as _;
use flannel_ebpf::{
    header,
    layout::{DEFAULT_FLOWS, EXCLUDED_PORTS, FLOWS_OUT, FlowKey, InFlow, OutFlow, PORT_WORDS},
};
use flannel_user::datapath::ebpf::{Programs, batch};

/// Few enough that none displaces another, many enough for a dozen batches.
const FLOWS: u32 = 50_000;

fn key(number: u32) -> FlowKey {
    FlowKey {
        src: [10, 1, 1, 2],
        dst: number.to_be_bytes(),
        protocol: header::UDP,
        ..FlowKey::default()
    }
}

fn programs() -> Programs {
    assert!(
        nix::unistd::geteuid().is_root(),
        "loading programs needs root: run the tests as root"
    );
    Programs::load(None, DEFAULT_FLOWS).expect("this kernel loads the programs")
}

fn table(programs: &mut Programs) -> &mut Map {
    programs.ebpf_mut().map_mut(FLOWS_OUT).expect(FLOWS_OUT)
}

fn data(programs: &mut Programs) -> &MapData {
    match table(programs) {
        Map::LruHashMap(data) => data,
        other => panic!("{FLOWS_OUT} is {other:?}"),
    }
}

#[test]
fn every_flow_is_read_once_and_quickly() {
    let mut programs = programs();
    let count = |programs: &mut Programs| {
        let mut seen = BTreeSet::new();
        let mut visits = 0;
        let start = Instant::now();
        batch::for_each(data(programs), |key: &FlowKey, flow: &OutFlow| {
            visits += 1;
            assert_eq!(
                flow.mark,
                u32::from_be_bytes(key.dst),
                "another flow's value"
            );
            seen.insert(*key);
        })
        .expect("read");
        println!("{visits} flows in {:?}", start.elapsed());
        assert_eq!(seen.len(), visits, "a flow was read twice");
        (visits, start.elapsed())
    };
    assert_eq!(count(&mut programs).0, 0);
    let mut flows: HashMap<_, FlowKey, OutFlow> = table(&mut programs).try_into().expect("map");
    for number in 0..FLOWS {
        let flow = OutFlow {
            mark: number,
            ..OutFlow::zeroed()
        };
        flows.insert(key(number), flow, 0).expect("written");
    }
    let (visits, taken) = count(&mut programs);
    assert_eq!(visits, FLOWS as usize);
    // A debug build on a busy machine; key by key it would take several times as long.
    assert!(taken.as_secs_f64() < 1.0, "{taken:?}");
}

#[test]
fn a_table_is_emptied_whole() {
    let mut programs = programs();
    let mut flows: HashMap<_, FlowKey, OutFlow> = table(&mut programs).try_into().expect("map");
    for number in 0..FLOWS {
        flows
            .insert(key(number), OutFlow::zeroed(), 0)
            .expect("written");
    }
    let start = Instant::now();
    batch::empty(data(&mut programs)).expect("emptied");
    println!("{FLOWS} flows in {:?}", start.elapsed());
    batch::empty(data(&mut programs)).expect("empty already");
    batch::for_each(data(&mut programs), |key: &FlowKey, _: &OutFlow| {
        panic!("{key:?} is left");
    })
    .expect("read");
}

#[test]
fn an_array_is_read_whole() {
    let mut programs = programs();
    let map = programs.ebpf_mut().map_mut(EXCLUDED_PORTS);
    let mut words: Array<_, u64> = map.expect(EXCLUDED_PORTS).try_into().expect("an array");
    for index in 0..PORT_WORDS {
        words
            .set(index, u64::from(index) << 32, 0)
            .expect("written");
    }
    let mut read = Vec::new();
    batch::for_each(words.map(), |index: &u32, word: &u64| {
        read.push((*index, *word))
    })
    .expect("read");
    let written: Vec<_> = (0..PORT_WORDS)
        .map(|index| (index, u64::from(index) << 32))
        .collect();
    assert_eq!(read, written);
}

#[test]
fn values_of_another_size_are_refused() {
    let mut programs = programs();
    let read = batch::for_each(data(&mut programs), |_: &FlowKey, _: &InFlow| {
        panic!("nothing is there");
    });
    let error = read.expect_err("too small a room");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
}
