//! The frame around every scenario: a lab before, the logs if it failed, and
//! nobody left in its namespaces afterwards.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
};

use anyhow::Result;

use crate::{
    host,
    lab::{Lab, Underlay},
};

/// `normal` repetitions, or `long` ones when all loops are to be long
/// (`cargo xtask test --full`).
#[must_use]
pub fn repetitions(normal: u32, long: u32) -> u32 {
    if std::env::var_os("FLANNEL_TEST_FULL").is_some() {
        long
    } else {
        normal
    }
}

/// Runs `body` in a lab of `nodes` nodes.
///
/// # Panics
/// When the scenario fails, with the agents' logs.
pub fn scenario(nodes: u8, body: impl FnOnce(&Lab) -> Result<()>) {
    let lab = Lab::with_nodes(nodes).unwrap_or_else(|error| panic!("no lab: {error:?}"));
    run(lab, body);
}

/// The same over a chosen underlay.
///
/// # Panics
/// As [`scenario`].
pub fn scenario_over(underlay: Underlay, nodes: u8, body: impl FnOnce(&Lab) -> Result<()>) {
    let lab = Lab::over(underlay, nodes).unwrap_or_else(|error| panic!("no lab: {error:?}"));
    run(lab, body);
}

fn run(lab: Lab, body: impl FnOnce(&Lab) -> Result<()>) {
    let namespaces = lab.inodes().expect("the lab's handles are open");
    let scratch = lab.scratch().to_owned();
    let outcome = catch_unwind(AssertUnwindSafe(|| body(&lab)));
    if !matches!(outcome, Ok(Ok(()))) {
        print_logs(&lab);
    }
    drop(lab);
    match outcome {
        Ok(Ok(())) => {}
        Ok(Err(error)) => panic!("{error:?}"),
        Err(panic) => resume_unwind(panic),
    }
    host::expect_deserted(&namespaces, &scratch).unwrap_or_else(|error| panic!("{error:?}"));
}

fn print_logs(lab: &Lab) {
    let mut files: Vec<_> = fs::read_dir(lab.scratch().join("logs"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    for path in files {
        let text = fs::read_to_string(&path).unwrap_or_default();
        eprintln!("--- {}\n{text}---", path.display());
    }
}
