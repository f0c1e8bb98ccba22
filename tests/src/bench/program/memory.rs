//! What the maps of a program take.

use std::{
    fs,
    os::fd::{AsFd, AsRawFd},
};

use anyhow::{Context, Result};
use aya::{maps::MapInfo, programs::ProgramInfo};
use serde::{Deserialize, Serialize};

/// One map.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapCost {
    /// Its name.
    pub map: String,
    /// Entries that it may hold.
    pub entries: u32,
    /// Bytes that the kernel has set aside for it.
    pub bytes: u64,
}

/// Every map that a program uses.
pub(super) fn maps(program: &ProgramInfo) -> Result<Vec<MapCost>> {
    let ids = program.map_ids()?.unwrap_or_default();
    let mut maps = ids
        .into_iter()
        .map(|id| {
            let info = MapInfo::from_id(id)?;
            let fd = info.fd()?;
            let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
            Ok(MapCost {
                map: info.name_as_str().unwrap_or("?").to_owned(),
                entries: info.max_entries(),
                bytes: memory(&fs::read_to_string(path)?)
                    .context("the kernel does not tell a map's memory")?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    maps.sort_by(|one, other| one.map.cmp(&other.map));
    Ok(maps)
}

/// `memlock:\t4096` of a map's fdinfo.
fn memory(fdinfo: &str) -> Option<u64> {
    fdinfo
        .lines()
        .find_map(|line| line.strip_prefix("memlock:"))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::memory;

    #[test]
    fn memory_of_a_map() {
        let text = "pos:\t0\nmap_type:\t2\nmemlock:\t4096\nmap_id:\t7\n";
        assert_eq!(memory(text), Some(4096));
        assert_eq!(memory("pos:\t0\n"), None);
    }
}
