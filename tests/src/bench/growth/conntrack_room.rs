//! Room for many flows in conntrack, whose size is one setting of the whole machine.

use std::fs;

use anyhow::{Context, Result};

use crate::namespace::sysctl_path;

/// Connections in one network namespace.
const MOST: &str = "net.netfilter.nf_conntrack_max";
/// Places of the hash table that all namespaces share. In one where chains get long, Linux drops
/// new connections (5.15, `chain_toolong`).
const BUCKETS: &str = "net.netfilter.nf_conntrack_buckets";
/// Memory of one entry, with its extensions and its share of the hash table.
const ENTRY: u64 = 400;
/// A stage has two nodes, and both track all flows.
const NODES: u64 = 2;

/// The settings, large enough; dropping it makes them what they were.
#[derive(Debug)]
pub(super) struct Room {
    /// What had to be changed, and what it was.
    before: Vec<(&'static str, u32)>,
    /// Flows at a time in each network namespace: with more, packets are lost.
    pub(super) flows: u32,
}

impl Room {
    /// For so many, or as many as the machine lets us have.
    ///
    /// # Errors
    /// Without conntrack.
    pub(super) fn make(flows: u32) -> Result<Self> {
        let (most, buckets) = (read(MOST)?, read(BUCKETS)?);
        let mut room = Self {
            before: Vec::new(),
            flows: usable(most),
        };
        if flows <= room.flows {
            return Ok(room);
        }
        let wanted = limit_for(flows);
        let changed = room
            .raise(BUCKETS, buckets, wanted)
            .and_then(|()| room.raise(MOST, most, wanted));
        match changed {
            Ok(()) => room.flows = usable(wanted),
            Err(error) => println!("as much room as there is: {error:#}"),
        }
        Ok(room)
    }

    fn raise(&mut self, key: &'static str, before: u32, wanted: u32) -> Result<()> {
        if wanted <= before {
            return Ok(());
        }
        write(key, wanted)?;
        self.before.push((key, before));
        println!("{key} is {wanted} instead of {before} while flows are measured");
        Ok(())
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        for (key, before) in &self.before {
            if let Err(error) = write(key, *before) {
                eprintln!("{key} was {before} and could not be put back: {error:#}");
            }
        }
    }
}

fn read(key: &str) -> Result<u32> {
    let path = sysctl_path(key);
    let text =
        fs::read_to_string(&path).with_context(|| format!("no {key}: conntrack is not there"))?;
    Ok(text.trim().parse()?)
}

fn write(key: &str, value: u32) -> Result<()> {
    fs::write(sysctl_path(key), value.to_string()).with_context(|| format!("set {key} to {value}"))
}

/// Of a limit: other probes and the agents need some, too.
const fn usable(limit: u32) -> u32 {
    limit / 4 * 3
}

/// The limit of which so many are usable.
const fn limit_for(flows: u32) -> u32 {
    flows.div_ceil(3) * 4
}

/// Flows that fit into `available` bytes with so many stages at the same time.
pub(super) const fn fitting(available: u64, stages: u64) -> u64 {
    available / (ENTRY * NODES * stages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_has_room_for_what_it_is_for() {
        for flows in [1, 3, 1000, 196_608, 1_000_000] {
            assert!(usable(limit_for(flows)) >= flows, "{flows}");
        }
        assert_eq!(usable(262_144), 196_608);
    }

    #[test]
    fn a_million_flows_of_three_sides_take_two_and_a_half_gigabytes() {
        assert!(fitting(2_500_000_000, 3) > 1_000_000);
        assert!(fitting(2_000_000_000, 3) < 1_000_000);
    }
}
