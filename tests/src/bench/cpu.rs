//! What the processors did, in seconds.

use std::fs;

use anyhow::{Context, Result};

/// Ticks of `/proc/stat` in a second (`USER_HZ`, 100 on every Linux there is).
const TICKS: f64 = 100.0;

/// CPU seconds that the whole machine has spent since boot. All of it, since
/// most of a packet's work is done in interrupts that belong to nobody; without
/// processes of low priority, which are somebody's builds.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn busy() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    busy_ticks(&text)
        .map(|ticks| ticks as f64 / TICKS)
        .context("/proc/stat is odd")
}

/// `cpu user nice system idle iowait irq softirq steal …`
fn busy_ticks(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line
        .split_whitespace()
        .map(|field| field.parse().ok())
        .collect::<Option<_>>()?;
    [0, 2, 5, 6].iter().map(|index| fields.get(*index)).sum()
}

/// CPU seconds of one process, in user space and in the kernel.
///
/// # Errors
/// When it has gone.
pub fn of_process(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    process_ticks(&text)
        .map(|ticks| ticks as f64 / TICKS)
        .with_context(|| format!("/proc/{pid}/stat is odd"))
}

/// Fields 14 and 15; the name in the second one may hold anything.
fn process_ticks(text: &str) -> Option<u64> {
    let (_, after_name) = text.rsplit_once(')')?;
    let mut fields = after_name.split_whitespace().skip(11).map(str::parse);
    let (user, kernel): (u64, u64) = (fields.next()?.ok()?, fields.next()?.ok()?);
    Some(user + kernel)
}

/// Resident memory of a process in bytes.
///
/// # Errors
/// When it has gone.
pub fn resident(pid: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    resident_bytes(&text).with_context(|| format!("/proc/{pid}/status is odd"))
}

fn resident_bytes(text: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = value.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kilobytes * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_low_priority_are_not_busy() {
        let text = "cpu  100 2000 30 40000 500 6 7 800 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n";
        assert_eq!(busy_ticks(text), Some(143));
    }

    #[test]
    fn a_process_may_have_any_name() {
        let text = "7 (a) b) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0";
        assert_eq!(process_ticks(text), Some(300));
    }

    #[test]
    fn resident_memory_is_in_bytes() {
        assert_eq!(
            resident_bytes("Name:\tx\nVmRSS:\t   2048 kB\n"),
            Some(2 << 20)
        );
    }
}
