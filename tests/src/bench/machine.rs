//! Where a run was made; without it no figure means anything.

use std::fs;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::cpu;

/// Processor, kernel, and how idle it was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// How many of them.
    pub processors: usize,
    /// Memory in gibibytes.
    pub memory_gib: f64,
    /// Kernel release.
    pub kernel: String,
    /// Seconds since 1970 at the start of the run.
    pub started: u64,
    /// Share of all processors that others used just before the run.
    pub background: f64,
}

impl Machine {
    /// Looks around for half a second.
    ///
    /// # Errors
    /// When `/proc` cannot be read.
    pub fn look() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        // All there are, not those that this process may use.
        let processors = cpuinfo
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count()
            .max(1);
        let before = cpu::busy_with_anything()?;
        let pause = std::time::Duration::from_millis(500);
        std::thread::sleep(pause);
        let background =
            (cpu::busy_with_anything()? - before) / pause.as_secs_f64() / processors as f64;
        Ok(Self {
            processor: field(&cpuinfo, "model name")
                .unwrap_or("unknown")
                .to_owned(),
            processors,
            memory_gib: memory("MemTotal")?.map_or(0.0, |bytes| bytes as f64 / f64::from(1 << 30)),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            started: std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)?
                .as_secs(),
            background,
        })
    }

    /// In one line.
    #[must_use]
    pub fn describe(&self) -> String {
        format!(
            "{} × {}, {:.0} GiB, Linux {}, {:.0} % busy with other things at the start",
            self.processors,
            self.processor,
            self.memory_gib,
            self.kernel,
            self.background * 100.0
        )
    }
}

/// Memory that `/proc/meminfo` tells of under this name, in bytes.
///
/// # Errors
/// When it cannot be read.
pub(super) fn memory(name: &str) -> Result<Option<u64>> {
    let meminfo = fs::read_to_string("/proc/meminfo")?;
    Ok(field(&meminfo, name)
        .and_then(|value| value.strip_suffix(" kB")?.parse::<u64>().ok())
        .map(|kilobytes| kilobytes * 1024))
}

/// `name : value`, the first of them.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (found, value) = line.split_once(':')?;
        (found.trim() == name).then(|| value.trim())
    })
}

#[cfg(test)]
mod tests {
    use super::{field, memory};

    #[test]
    fn this_machine_has_memory() {
        let of = |name| memory(name).expect("readable").unwrap_or(0);
        assert!(of("MemAvailable") > 0 && of("MemAvailable") <= of("MemTotal"));
        assert_eq!(memory("Mem").expect("readable"), None);
    }

    #[test]
    fn fields_of_proc() {
        let text = "processor\t: 0\nmodel name\t: A: B\nMemTotal:       1024 kB\n";
        assert_eq!(field(text, "model name"), Some("A: B"));
        assert_eq!(field(text, "MemTotal"), Some("1024 kB"));
        assert_eq!(field(text, "cpu"), None);
    }
}
