//! Maps of the kernel, a batch of entries a system call.
//!
//! Reading key by key would take two calls an entry, and start anew whenever the key
//! that it stands at is removed, as happens all the time in a table of the
//! least recently used. Batches go by the table's buckets and come to an end.

use std::{
    io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{Pod, maps::MapData};

use super::syscall::bpf;

/// `BPF_MAP_LOOKUP_BATCH`.
const LOOKUP_BATCH: libc::c_long = 24;
/// `BPF_MAP_LOOKUP_AND_DELETE_BATCH`.
const TAKE_BATCH: libc::c_long = 25;
/// `BPF_MAP_UPDATE_BATCH`.
const UPDATE_BATCH: libc::c_long = 26;
/// Entries of one call: more than any bucket of a table holds.
const ENTRIES: u32 = 4096;

/// `union bpf_attr` of the batch commands.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    elem_flags: u64,
    flags: u64,
}

/// Writes each of `keys` with its value. For several pages of entries the kernel asks for memory of
/// that size, so they go in parts.
///
/// # Errors
/// What the kernel says, among others that it takes no batches for this map; what was written
/// before stays written.
pub fn update<K: Pod, V: Pod>(map: &MapData, keys: &[K], values: &[V]) -> io::Result<()> {
    expect_sizes::<K, V>(map)?;
    for (keys, values) in keys
        .chunks(ENTRIES as usize)
        .zip(values.chunks(ENTRIES as usize))
    {
        let mut attributes = Attributes {
            keys: keys.as_ptr() as u64,
            values: values.as_ptr() as u64,
            count: keys.len().min(values.len()) as u32,
            map: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            ..Attributes::default()
        };
        // SAFETY: the kernel reads `count` keys and values of the sizes compared above out of the
        // slices, which live until it returns.
        unsafe { bpf(UPDATE_BATCH, &mut attributes) }?;
    }
    Ok(())
}

fn expect_sizes<K, V>(map: &MapData) -> io::Result<()> {
    let info = map.info().map_err(io::Error::other)?;
    if (info.key_size() as usize, info.value_size() as usize) != (size_of::<K>(), size_of::<V>()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "keys or values of another size",
        ));
    }
    Ok(())
}

/// Calls `visit` with each entry of a hash map or an array whose keys are `K` and whose values are
/// `V`.
///
/// # Errors
/// What the kernel says; what was visited before stays visited.
pub fn for_each<K: Pod, V: Pod>(map: &MapData, mut visit: impl FnMut(&K, &V)) -> io::Result<()> {
    expect_sizes::<K, V>(map)?;
    let entries = ENTRIES as usize;
    let mut keys: Vec<K> = Vec::with_capacity(entries);
    let mut values: Vec<V> = Vec::with_capacity(entries);
    let room = [keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64];
    let took = |found: usize| {
        let found = found.min(entries);
        // SAFETY: the kernel has written so many; any bytes are valid for plain data.
        unsafe {
            keys.set_len(found);
            values.set_len(found);
        }
        for (key, value) in keys.iter().zip(&values) {
            visit(key, value);
        }
    };
    // SAFETY: the vectors have room for so many keys and values of the sizes compared above, and
    // are not moved meanwhile.
    unsafe { walk(map, LOOKUP_BATCH, room, took) }
}

/// Removes every entry of a hash map.
///
/// # Errors
/// What the kernel says; what was removed before stays removed.
pub fn empty(map: &MapData) -> io::Result<()> {
    let info = map.info().map_err(io::Error::other)?;
    let room = |size: u32| vec![0_u8; size as usize * ENTRIES as usize];
    let (mut keys, mut values) = (room(info.key_size()), room(info.value_size()));
    let room = [keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64];
    // SAFETY: the vectors have room for so many keys and values of the map's sizes.
    unsafe { walk(map, TAKE_BATCH, room, |_| ()) }
}

/// Goes through the whole map by `command`, [`ENTRIES`] at a time; `took` hears how many keys and
/// values the kernel has written to the start of the two places of `room`.
///
/// # Errors
/// What the kernel says; what came before was told.
///
/// # Safety
/// Each place of `room` has room for [`ENTRIES`] keys or values of this map until this returns.
unsafe fn walk(
    map: &MapData,
    command: libc::c_long,
    room: [u64; 2],
    mut took: impl FnMut(usize),
) -> io::Result<()> {
    let (mut place, mut next) = (0u32, 0u32);
    let mut is_first = true;
    loop {
        let mut attributes = Attributes {
            in_batch: if is_first {
                0
            } else {
                (&raw const place) as u64
            },
            out_batch: (&raw mut next) as u64,
            keys: room[0],
            values: room[1],
            count: ENTRIES,
            map: map.fd().as_fd().as_raw_fd().cast_unsigned(),
            ..Attributes::default()
        };
        // SAFETY: the kernel writes at most `count` keys and values, for which the caller has room,
        // and a word into `next`, which lives until it returns.
        let is_last = match unsafe { bpf(command, &mut attributes) } {
            Ok(()) => false,
            // The last bucket was reached.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            Err(error) => return Err(error),
        };
        took(attributes.count as usize);
        if is_last {
            return Ok(());
        }
        place = next;
        is_first = false;
    }
}
