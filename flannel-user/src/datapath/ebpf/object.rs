//! The embedded kernel object and its programs.

#[cfg(test)]
mod stack;

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    path::Path,
    sync::OnceLock,
    thread,
};

use aya::{
    Ebpf, EbpfLoader,
    programs::{ProgramError, SchedClassifier, TestRun as _, TestRunOptions},
};
use flannel_ebpf::layout::{
    CLOCK, FLOWS_IN, FLOWS_OUT, FROM_POD, FROM_TUNNEL, FROM_UPLINK, PARKED, TO_POD, TO_UPLINK,
};

use super::EbpfError;

/// What `cargo xtask build-ebpf` made; the build script puts it there.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/flannel.o"));

/// Every program but [`PARKED`], the one that takes the verifier longest first.
const PROGRAMS: [&str; 6] = [FROM_POD, FROM_UPLINK, TO_UPLINK, FROM_TUNNEL, TO_POD, CLOCK];

fn missing_program(name: &str) -> EbpfError {
    EbpfError::Missing {
        kind: "program",
        name: name.to_owned(),
    }
}

/// All programs, loaded, with their maps.
pub struct Programs {
    ebpf: Ebpf,
}

/// Type, key and value size, entries and flags of one map of the object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct MapShape {
    pub(super) name: String,
    pub(super) map_type: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
    pub(super) flags: u32,
}

/// Every map of the object, in order of its name; the flow tables with room for `flows`.
pub(super) fn map_shapes(flows: u32) -> Result<Vec<MapShape>, EbpfError> {
    static SHAPES: OnceLock<Vec<MapShape>> = OnceLock::new();
    let mut shapes = match SHAPES.get() {
        Some(shapes) => shapes.clone(),
        None => {
            let parsed = parse_shapes()?;
            SHAPES.get_or_init(|| parsed).clone()
        }
    };
    for shape in &mut shapes {
        if [FLOWS_OUT, FLOWS_IN].contains(&shape.name.as_str()) {
            shape.max_entries = flows;
        }
    }
    Ok(shapes)
}

/// The same as the object has them.
fn parse_shapes() -> Result<Vec<MapShape>, EbpfError> {
    let object = aya_obj::Object::parse(OBJECT).map_err(aya::EbpfError::from)?;
    let mut shapes: Vec<MapShape> = object
        .maps
        .iter()
        .map(|(name, map)| MapShape {
            name: name.clone(),
            map_type: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            flags: map.map_flags(),
        })
        .collect();
    shapes.sort();
    Ok(shapes)
}

/// A short name for a set of shapes: equal only when every map is alike.
pub(super) fn fingerprint(shapes: &[MapShape]) -> u32 {
    let mut hasher = DefaultHasher::new();
    shapes.hash(&mut hasher);
    let hash = hasher.finish();
    (hash ^ (hash >> 32)) as u32
}

impl Programs {
    /// Loads the object into the kernel; with `maps` every map is pinned there
    /// or taken over from there. `flows` is the size of each flow table.
    ///
    /// # Errors
    /// The kernel refused a map or a program.
    pub fn load(maps: Option<&Path>, flows: u32) -> Result<Self, EbpfError> {
        Self::load_beside(maps, flows, |_, _| {})
    }

    /// The same; `meanwhile` gets [`PARKED`], which is loaded already, and may work as long as the
    /// question that it gets too says that others are being loaded.
    pub(super) fn load_beside(
        maps: Option<&Path>,
        flows: u32,
        meanwhile: impl FnOnce(&mut SchedClassifier, &dyn Fn() -> bool),
    ) -> Result<Self, EbpfError> {
        let mut loader = EbpfLoader::new();
        for name in [FLOWS_OUT, FLOWS_IN] {
            loader.map_max_entries(name, flows);
        }
        let names: Vec<String> = map_shapes(flows)?
            .into_iter()
            .map(|shape| shape.name)
            .collect();
        if let Some(directory) = maps {
            for name in &names {
                loader.map_pin_path(name, directory.join(name));
            }
        }
        let mut programs = Self {
            ebpf: loader.load(OBJECT)?,
        };
        programs.load_all(meanwhile)?;
        Ok(programs)
    }

    /// Loads each program in a thread of its own: the verifier takes up to a tenth of a second
    /// for one, and looks at several at once.
    fn load_all(
        &mut self,
        meanwhile: impl FnOnce(&mut SchedClassifier, &dyn Fn() -> bool),
    ) -> Result<(), EbpfError> {
        let mut programs = BTreeMap::new();
        for (name, program) in self.ebpf.programs_mut() {
            if let Ok(program) = <&mut SchedClassifier>::try_from(program) {
                programs.insert(name, program);
            }
        }
        let mut take = |name| programs.remove(name).ok_or_else(|| missing_program(name));
        let refused = |program| move |source| EbpfError::Program { program, source };
        let parked = take(PARKED)?;
        parked.load().map_err(refused(PARKED))?;
        let wanted = PROGRAMS.map(|name| Ok((name, take(name)?)));
        let wanted = wanted.into_iter().collect::<Result<Vec<_>, EbpfError>>()?;
        thread::scope(|scope| {
            let loads: Vec<_> = wanted
                .into_iter()
                .map(|(name, program)| (name, scope.spawn(|| program.load())))
                .collect();
            meanwhile(parked, &|| {
                loads.iter().any(|(_, load)| !load.is_finished())
            });
            for (name, load) in loads {
                load.join()
                    .unwrap_or(Err(ProgramError::NotLoaded))
                    .map_err(refused(name))?;
            }
            Ok(())
        })
    }

    /// One program by its name.
    ///
    /// # Errors
    /// The object has no TC program of that name.
    pub fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, EbpfError> {
        self.ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| missing_program(name))
    }

    /// The low 32 bits of the kernel's jiffies, as the programs read them.
    ///
    /// # Errors
    /// The kernel refused to run the program.
    pub fn jiffies(&mut self) -> Result<u32, EbpfError> {
        // The smallest frame that test_run takes.
        let frame = [0; 34];
        let result = self.classifier(CLOCK)?.test_run(TestRunOptions {
            data_in: Some(&frame),
            ..TestRunOptions::default()
        });
        result
            .map(|run| run.return_value)
            .map_err(|source| EbpfError::Program {
                program: CLOCK,
                source,
            })
    }

    /// Hands a map out of the object; it stays loaded as long as the answer or a pin lives.
    pub(super) fn take_map(&mut self, name: &'static str) -> Result<aya::maps::Map, EbpfError> {
        self.ebpf.take_map(name).ok_or_else(|| EbpfError::Missing {
            kind: "map",
            name: name.to_owned(),
        })
    }

    /// The whole object, for tests that run single programs.
    pub fn ebpf_mut(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }
}

#[cfg(test)]
mod tests {
    use flannel_ebpf::layout::DEFAULT_FLOWS;

    use super::*;

    #[test]
    fn the_object_holds_every_map_of_the_layout() {
        use flannel_ebpf::layout::{COUNTERS, IDENT, LOCAL_PODS, NODE, PEER_NODES, REMOTE_SUBNETS};
        let shapes = map_shapes(DEFAULT_FLOWS).expect("the embedded object parses");
        for name in [
            COUNTERS,
            IDENT,
            LOCAL_PODS,
            NODE,
            PEER_NODES,
            REMOTE_SUBNETS,
        ] {
            assert!(
                shapes.iter().any(|shape| shape.name == name),
                "{name} is missing in {shapes:?}"
            );
        }
    }

    #[test]
    fn any_change_of_shape_changes_the_fingerprint() {
        let shapes = map_shapes(DEFAULT_FLOWS).expect("the embedded object parses");
        let mut other = shapes.clone();
        other[0].value_size += 1;
        assert_ne!(fingerprint(&shapes), fingerprint(&other));
    }
}
