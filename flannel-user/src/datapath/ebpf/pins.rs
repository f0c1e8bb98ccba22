//! The pin directory: what outlives the agent.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::maps::{MapData, MapInfo};
use tracing::warn;

use super::{
    EbpfError, EbpfOptions,
    object::{MapShape, fingerprint, map_shapes},
};

/// `<bpf-dir>/vni<VNI>/<layout>` with its three parts.
pub(super) struct PinDir {
    network: PathBuf,
    layout: PathBuf,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EbpfError {
    let path = path.to_owned();
    move |source| EbpfError::Pin {
        action,
        path,
        source,
    }
}

impl PinDir {
    fn locate(options: &EbpfOptions, shapes: &[MapShape]) -> Self {
        let network = options.bpf_dir.join(format!("vni{}", options.vni));
        let layout = network.join(format!(
            "v{}-{:08x}",
            options.layout_version,
            fingerprint(shapes)
        ));
        Self { network, layout }
    }

    /// Makes the directories, and sets aside maps there that are not what they should be.
    pub(super) fn prepare(options: &EbpfOptions) -> Result<Self, EbpfError> {
        let shapes = map_shapes(options.flows)?;
        let pins = Self::locate(options, &shapes);
        pins.make()?;
        for shape in &shapes {
            let path = pins.maps().join(&shape.name);
            if path.exists() && !is_like(&path, shape) {
                warn!(map = %path.display(), "a foreign map is pinned in our place: it is replaced");
                fs::remove_file(&path).map_err(io_error("remove", &path))?;
            }
        }
        Ok(pins)
    }

    /// Makes the directories.
    pub(super) fn make(&self) -> Result<(), EbpfError> {
        for part in [self.maps(), self.programs(), self.links()] {
            fs::create_dir_all(&part).map_err(io_error("create", &part))?;
        }
        Ok(())
    }

    /// Every pinned map of this layout with its name, open.
    pub(super) fn open_maps(&self) -> Result<Vec<(String, MapData)>, EbpfError> {
        let directory = self.maps();
        let entries = fs::read_dir(&directory).map_err(io_error("read", &directory))?;
        entries
            .map(|entry| {
                let path = entry.map_err(io_error("read", &directory))?.path();
                let name = path.file_name().unwrap_or_default();
                let name = name.to_string_lossy().into_owned();
                let map = MapData::from_pin(&path).map_err(io::Error::other);
                Ok((name, map.map_err(io_error("open", &path))?))
            })
            .collect()
    }

    /// Pins maps that were pinned there before.
    pub(super) fn pin_maps(&self, maps: &[(String, MapData)]) -> Result<(), EbpfError> {
        for (name, map) in maps {
            let path = self.maps().join(name);
            map.pin(&path)
                .map_err(io::Error::other)
                .map_err(io_error("pin", &path))?;
        }
        Ok(())
    }

    /// The directory if an agent of this network has been here.
    pub(super) fn existing(options: &EbpfOptions) -> Option<Self> {
        let pins = Self::locate(options, &map_shapes(options.flows).unwrap_or_default());
        pins.network.exists().then_some(pins)
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.layout.join("maps")
    }

    pub(super) fn programs(&self) -> PathBuf {
        self.layout.join("programs")
    }

    pub(super) fn links(&self) -> PathBuf {
        self.layout.join("links")
    }

    /// The link directories of all layouts, ours first.
    pub(super) fn all_links(&self) -> Vec<PathBuf> {
        let others = self
            .other_layouts()
            .into_iter()
            .map(|layout| layout.join("links"));
        std::iter::once(self.links()).chain(others).collect()
    }

    fn other_layouts(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.network) else {
            return Vec::new();
        };
        entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| *path != self.layout)
            .collect()
    }

    /// Removes what agents with other layouts left, once nothing of it is attached.
    pub(super) fn forget_other_layouts(&self) -> Result<(), EbpfError> {
        for layout in self.other_layouts() {
            fs::remove_dir_all(&layout).map_err(io_error("remove", &layout))?;
        }
        Ok(())
    }

    /// Removes everything of this network.
    pub(super) fn remove_all(&self) -> Result<(), EbpfError> {
        match fs::remove_dir_all(&self.network) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(io_error("remove", &self.network)(error))
            }
            _ => {
                // Shared with other networks of this host: goes when the last one goes.
                let _ = self.network.parent().map(fs::remove_dir);
                Ok(())
            }
        }
    }
}

/// Is the map pinned at `path` of exactly this shape? aya reuses anything.
fn is_like(path: &Path, shape: &MapShape) -> bool {
    MapInfo::from_pin(path).is_ok_and(|info| {
        info.map_type()
            .is_ok_and(|map_type| map_type as u32 == shape.map_type)
            && info.key_size() == shape.key_size
            && info.value_size() == shape.value_size
            && info.max_entries() == shape.max_entries
            && info.map_flags() == shape.flags
    })
}
