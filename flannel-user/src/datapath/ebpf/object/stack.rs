//! How much stack the programs take, as older kernels count it.
//!
//! A chain of calls may take 512 bytes. Linux 6.1 counts each of its functions in steps of 32
//! bytes, newer kernels in smaller ones: what loads here may be refused there.

use std::collections::{BTreeMap, BTreeSet};

use aya_obj::generated::bpf_insn;

use super::{OBJECT, PROGRAMS};

/// `MAX_BPF_STACK` (include/linux/filter.h).
const LIMIT: i32 = 512;
/// The step of `check_max_stack_depth` in Linux 6.1 (kernel/bpf/verifier.c).
const STEP: i32 = 32;
/// The frame pointer.
const FRAME: u8 = 10;

/// `BPF_PSEUDO_CALL` in a call's source register: a function of the program itself.
fn callee(at: usize, insn: &bpf_insn) -> Option<usize> {
    const CALL: u8 = 0x85;
    (insn.code == CALL && insn.src_reg() == 1)
        .then(|| (at + 1).checked_add_signed(insn.imm as isize))
        .flatten()
}

/// How far below its frame pointer a function reaches, in bytes.
fn depth(function: &[bpf_insn]) -> i32 {
    const LDX: u8 = 1;
    const ST: u8 = 2;
    const STX: u8 = 3;
    const MOVE: u8 = 0xbf;
    const ADD: u8 = 0x07;
    // Which registers point into the frame, and where to.
    let mut pointers = BTreeMap::from([(FRAME, 0)]);
    let mut lowest = 0;
    for insn in function {
        let (to, from) = (insn.dst_reg(), insn.src_reg());
        let base = match insn.code & 7 {
            LDX => pointers.get(&from),
            ST | STX => pointers.get(&to),
            _ => None,
        };
        if let Some(base) = base {
            lowest = lowest.min(base + i32::from(insn.off));
        }
        match insn.code {
            MOVE => match pointers.get(&from).copied() {
                Some(pointer) => drop(pointers.insert(to, pointer)),
                None => drop(pointers.remove(&to)),
            },
            ADD => {
                if let Some(pointer) = pointers.get_mut(&to) {
                    *pointer += insn.imm;
                    lowest = lowest.min(*pointer);
                }
            }
            code if matches!(code & 7, 0 | LDX | 4 | 7) && to != FRAME => {
                pointers.remove(&to);
            }
            _ => {}
        }
    }
    -lowest
}

/// The deepest chain of calls from the function that starts at `start`.
fn chain(instructions: &[bpf_insn], starts: &BTreeSet<usize>, start: usize) -> i32 {
    let end = starts.range(start + 1..).next();
    let function = &instructions[start..end.copied().unwrap_or(instructions.len())];
    let own = (depth(function).max(1) + STEP - 1) / STEP * STEP;
    let callees = function.iter().enumerate();
    let callees = callees.filter_map(|(at, insn)| callee(start + at, insn));
    let deepest = callees.map(|callee| chain(instructions, starts, callee));
    own + deepest.max().unwrap_or(0)
}

#[test]
fn every_program_has_stack_enough_on_older_kernels() {
    let mut object = aya_obj::Object::parse(OBJECT).expect("the embedded object parses");
    let sections = object.functions.keys().map(|(section, _)| *section);
    object
        .relocate_calls(&sections.collect())
        .expect("its calls lead somewhere");
    for name in PROGRAMS {
        let program = &object.programs[name];
        let instructions = &object.functions[&program.function_key()].instructions;
        let calls = instructions.iter().enumerate();
        let mut starts: BTreeSet<_> = calls.filter_map(|(at, insn)| callee(at, insn)).collect();
        starts.insert(0);
        let taken = chain(instructions, &starts, 0);
        println!(
            "{name}: {taken} bytes of {LIMIT} in {} functions",
            starts.len()
        );
        assert!(
            taken > 0 && taken <= LIMIT,
            "{name} takes {taken} bytes of stack"
        );
    }
}

#[test]
fn what_is_written_to_the_frame_counts_whatever_points_there() {
    let insn = |code, to: u8, from: u8, off, imm| bpf_insn {
        code,
        off,
        imm,
        _bitfield_align_1: [],
        _bitfield_1: bpf_insn::new_bitfield_1(to, from),
    };
    let stored = insn(0x7b, FRAME, 1, -40, 0);
    assert_eq!(depth(&[stored]), 40);
    let pointer = [insn(0xbf, 2, FRAME, 0, 0), insn(0x07, 2, 0, 0, -64)];
    assert_eq!(depth(&pointer), 64);
    let behind_it = [&pointer[..], &[insn(0x7b, 2, 1, -8, 0)]].concat();
    assert_eq!(depth(&behind_it), 72);
    let no_longer = [&pointer[..1], &[insn(0xb7, 2, 0, 0, 5), pointer[1]]].concat();
    assert_eq!(depth(&no_longer), 0);
    let calls = [insn(0x85, 0, 1, 0, 1), insn(0x95, 0, 0, 0, 0), stored];
    let starts = BTreeSet::from([0, 2]);
    assert_eq!(chain(&calls, &starts, 0), STEP + 64);
}
