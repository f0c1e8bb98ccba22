//! Runs every test; a suite that fails does not hide what the others say.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::{build_ebpf, command, kernels, setup, workspace};

/// Tells the scenarios to take their long loops.
const FULL_VARIABLE: &str = "FLANNEL_TEST_FULL";

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Long loops too, and the guest kernels.
    #[arg(long)]
    full: bool,
    /// Only tests whose name contains one of these.
    filter: Vec<String>,
}

/// Test targets that run alike.
struct Suite {
    name: &'static str,
    targets: &'static [&'static str],
    which: Which,
    /// Scenarios share the kernel's counters and this machine's two cores.
    at_once: Option<&'static str>,
}

/// Which tests of the targets.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    All,
    /// Those whose name contains one of these.
    Named(&'static [&'static str]),
    /// Those that no other suite names.
    Others,
}

/// All of them select the whole workspace: another selection means other features of the
/// dependencies, and everything would be built once more.
const SUITES: [Suite; 6] = [
    Suite {
        name: "examples in the documentation",
        targets: &["--doc"],
        which: Which::All,
        at_once: None,
    },
    Suite {
        name: "logic",
        targets: &["--lib", "--bins"],
        which: Which::All,
        at_once: None,
    },
    // These two spend their time waiting for something to run out: side by side they take a part
    // of it. Those with etcd have limits of two seconds, so the others are not beside them.
    Suite {
        name: "scenarios that wait",
        targets: &["--test", "scenarios"],
        which: Which::Named(&["etcd_faults::", "learned_conntrack_idle::"]),
        at_once: Some("4"),
    },
    Suite {
        name: "scenarios that keep connections",
        targets: &["--test", "scenarios"],
        which: Which::Named(&[
            "handshaken::",
            "learned_closing::",
            "learned_conntrack_restore::",
            "own_handover::",
        ]),
        at_once: Some("3"),
    },
    // These keep the machine busy for 5 to 20 % of their time: they wait for timeouts and for rules.
    Suite {
        name: "scenarios that let the machine rest",
        targets: &["--test", "scenarios"],
        which: Which::Named(&[
            "bad_input::",
            "classes_handshakes::",
            "classes_rules::",
            "direct::",
            "forged::",
            "learned_attack::",
            "pairings::",
            "repair::",
            "restart::",
            "restart_firewall::",
            "uplink_changes::",
        ]),
        at_once: Some("3"),
    },
    Suite {
        name: "scenarios",
        targets: &["--test", "*"],
        which: Which::Others,
        at_once: Some("1"),
    },
];

struct Outcome {
    name: &'static str,
    passed: bool,
    took: Duration,
    printed: String,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    setup::lab()?;
    build_ebpf::build(&setup::build_tools()?, false, false)?;
    // The scenarios start the agent's binary, which `cargo test` alone would not build.
    command::run(workspace::cargo().args([
        "build",
        "--release",
        "--workspace",
        "--bins",
        "--tests",
    ]))?;
    println!("built in {}", seconds(started.elapsed()));

    let mut outcomes = Vec::new();
    for suite in &SUITES {
        // Who asks for some tests gets them from one suite.
        if matches!(suite.which, Which::Named(_)) && !options.filter.is_empty() {
            continue;
        }
        outcomes.push(suite.run(options)?);
    }
    if options.full {
        let begun = Instant::now();
        let result = kernels::run(&kernels::Options::default());
        if let Err(error) = &result {
            eprintln!("kernels: {error:#}");
        }
        outcomes.push(Outcome {
            name: "guest kernels",
            passed: result.is_ok(),
            took: begun.elapsed(),
            printed: String::new(),
        });
    }
    conclude(&outcomes, started.elapsed())
}

/// What some suite names.
fn named() -> impl Iterator<Item = &'static str> {
    SUITES.iter().flat_map(|suite| match suite.which {
        Which::Named(names) => names.iter().copied(),
        Which::All | Which::Others => [].iter().copied(),
    })
}

impl Suite {
    fn run(&self, options: &Options) -> Result<Outcome> {
        println!("\n=== {} ===", self.name);
        let begun = Instant::now();
        let mut cargo = workspace::cargo();
        cargo
            .args(["test", "--release", "--workspace", "--no-fail-fast"])
            .args(self.targets)
            .arg("--");
        if let Some(threads) = self.at_once {
            cargo.args(["--test-threads", threads]);
        }
        match self.which {
            Which::Named(names) => {
                cargo.args(names);
            }
            Which::Others if options.filter.is_empty() => {
                cargo.args(named().flat_map(|name| ["--skip", name]));
            }
            Which::Others | Which::All => {
                cargo.args(&options.filter);
            }
        }
        if options.full {
            cargo.env(FULL_VARIABLE, "1");
        }
        let (status, printed) = command::run_and_listen(&mut cargo)?;
        Ok(Outcome {
            name: self.name,
            passed: status.success(),
            took: begun.elapsed(),
            printed,
        })
    }
}

/// A line per suite, the failed tests by name, and the runner's own closing lines as the last.
fn conclude(outcomes: &[Outcome], total: Duration) -> Result<()> {
    println!("\n=== {} in all ===", seconds(total));
    for outcome in outcomes {
        let verdict = if outcome.passed { "passed" } else { "FAILED" };
        println!("{}: {verdict} in {}", outcome.name, seconds(outcome.took));
        for test in failed_tests(&outcome.printed) {
            println!("    {test}");
        }
    }
    for outcome in outcomes {
        for line in closing_lines(&outcome.printed) {
            println!("{line}");
        }
    }
    if outcomes.iter().any(|outcome| !outcome.passed) {
        bail!("not every test passed");
    }
    Ok(())
}

/// What the test runner says at the end of each suite that ran anything.
fn closing_lines(printed: &str) -> impl Iterator<Item = &str> {
    printed
        .lines()
        .filter(|line| line.starts_with("test result:"))
        .filter(|line| !line.contains(" 0 passed; 0 failed;"))
}

/// The names below the runner's last `failures:`.
fn failed_tests(printed: &str) -> Vec<&str> {
    let mut failed: Vec<_> = Vec::new();
    let mut listing = false;
    for line in printed.lines() {
        match line.strip_prefix("    ") {
            Some(name) if listing && !name.contains(' ') => failed.push(name),
            _ => listing = line == "failures:" || (listing && line.is_empty() && failed.is_empty()),
        }
    }
    failed
}

fn seconds(duration: Duration) -> String {
    format!("{:.0} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PRINTED: &str = "\
running 0 tests

test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s

running 2 tests
test a ... ok
test b::c ... FAILED

failures:

---- b::c stdout ----
    left: 1

failures:
    b::c

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.10s
";

    #[test]
    fn suites_without_tests_have_no_closing_line() {
        let lines: Vec<_> = closing_lines(PRINTED).collect();
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("test result: FAILED. 1 passed; 1 failed;"));
    }

    #[test]
    fn failed_tests_are_named() {
        assert_eq!(failed_tests(PRINTED), ["b::c"]);
    }
}
