//! Room for many flows in conntrack, whose size is one setting of the whole machine.

use std::fs;

use anyhow::{Context, Result};

const MOST: &str = "/proc/sys/net/netfilter/nf_conntrack_max";
/// Memory of one entry, with its extensions and its share of the hash table.
const ENTRY: u64 = 400;
/// A stage has two nodes, and both track all flows.
const NODES: u64 = 2;

/// The setting, large enough; dropping it makes it what it was.
#[derive(Debug)]
pub(super) struct Room {
    /// What it was, if it had to be changed.
    before: Option<u32>,
    /// Flows at a time in each network namespace: with more, packets are lost.
    pub(super) flows: u32,
}

impl Room {
    /// For so many, or as many as the machine lets us have.
    ///
    /// # Errors
    /// Without conntrack.
    pub(super) fn make(flows: u32) -> Result<Self> {
        let before: u32 = fs::read_to_string(MOST)
            .context("conntrack is not there")?
            .trim()
            .parse()?;
        if flows <= usable(before) {
            return Ok(Self {
                before: None,
                flows: usable(before),
            });
        }
        let wanted = limit_for(flows);
        match fs::write(MOST, wanted.to_string()) {
            Ok(()) => {
                println!(
                    "net.netfilter.nf_conntrack_max is {wanted} instead of {before} while flows are measured"
                );
                Ok(Self {
                    before: Some(before),
                    flows: usable(wanted),
                })
            }
            Err(error) => {
                println!("net.netfilter.nf_conntrack_max stays {before}: {error}");
                Ok(Self {
                    before: None,
                    flows: usable(before),
                })
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = fs::write(MOST, before.to_string())
        {
            eprintln!(
                "net.netfilter.nf_conntrack_max was {before} and could not be put back: {error}"
            );
        }
    }
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
pub(super) const fn bearable(available: u64, stages: u64) -> u64 {
    available / (ENTRY * NODES * stages)
}

/// Memory that may be had, in bytes.
///
/// # Errors
/// The kernel does not tell.
pub(super) fn available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kilobytes = text
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemAvailable:")?
                .trim()
                .strip_suffix(" kB")
        })
        .context("no MemAvailable in /proc/meminfo")?;
    Ok(kilobytes.parse::<u64>()? * 1024)
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
        assert!(bearable(2_500_000_000, 3) > 1_000_000);
        assert!(bearable(2_000_000_000, 3) < 1_000_000);
        assert!(available().expect("Linux 3.14") > 0);
    }
}
