//! The benchmark: every path side by side, as ratios.
//!
//! Client and server share one CPU for the figures that count most, so a
//! transaction's time is the time of all code it passes, and nothing of the
//! scheduler's luck. The sides run in turn, round by round. Before a figure
//! counts, the counters of both nodes have to say that the packets took the
//! side's path. How to read the results is in docs/performance.md.

pub mod check;
pub mod cpu;
pub mod growth;
pub mod machine;
pub mod markdown;
pub mod measure;
pub mod packet;
pub mod peer;
pub mod plot;
pub mod probe;
pub mod program;
pub mod proof;
pub mod results;
pub mod rounds;
pub mod select;
pub mod side;
pub mod stage;
pub mod stats;
mod turns;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

use self::{
    machine::Machine,
    measure::{PROBES, Target},
    probe::Pace,
    results::{Report, Settings, rows},
    rounds::Measured,
    select::{Part, Selection},
    side::{NETLINK, Peer, Side},
    stage::Stage,
};
use crate::binaries;

/// Arguments of `lab bench`.
#[derive(Debug, clap::Args)]
pub struct BenchArgs {
    /// The short form: fewer measures, shorter rounds, at most five minutes.
    #[arg(long)]
    quick: bool,
    /// Only these measures, sides or parts (`program`, `growth`, `growth-agent`, …), separated by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Another agent as one more side.
    #[arg(long, value_name = "NAME=PATH-TO-FLANNELD")]
    peer: Vec<Peer>,
    /// Fail where a ratio has lost more than a tenth against the baseline.
    #[arg(long)]
    check: bool,
    /// The baseline of `--check` and `--write-baseline`.
    #[arg(long, default_value = BASELINE)]
    baseline: PathBuf,
    /// Make this run the baseline.
    #[arg(long)]
    write_baseline: bool,
    /// Where results go; by default `bench` in the build directory.
    #[arg(long)]
    out: Option<PathBuf>,
    /// Measure nothing: draw and write again what this results.json holds.
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Rounds; each runs every side once.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds that each side is measured per round; by default 1, with --quick 0.3.
    #[arg(long)]
    seconds: Option<f64>,
    /// The CPU that client and server share.
    #[arg(long, default_value_t = 1)]
    cpu: usize,
    /// Fail unless `tcp_rr` on side `direct` reaches this multiple of the kernel path.
    #[arg(long)]
    at_least: Option<f64>,
}

const BASELINE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/bench-baseline.json");

/// Runs the benchmark, prints its figures and writes its files.
///
/// # Errors
/// When packets took another path than the side's, or a demand is not met.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds 0 measures nothing");
    let start = Instant::now();
    let sides = sides(args)?;
    let selection = Selection::of(&args.only, &sides)?;
    let mut report = match &args.from {
        Some(file) => {
            let text = fs::read_to_string(file)
                .with_context(|| format!("cannot read {}", file.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("{} is no report", file.display()))?
        }
        None => measured(args, &sides, &selection)?,
    };
    let directory = args.out.clone().map_or_else(default_directory, Ok)?;
    write(&directory, &report)?;
    if args.from.is_none() && selection.growth() {
        // The longest part, and after all others: what they gave is safe.
        report.growth = growth::measure(
            &sides,
            &selection,
            args.quick,
            pace_of(args, &report.machine),
        )?;
        write(&directory, &report)?;
    }
    println!(
        "\n{:.0} s; every figure's path was proven by the counters of both nodes. {} holds results.json, results.md and the pictures.",
        start.elapsed().as_secs_f64(),
        directory.display()
    );
    if args.write_baseline {
        let text = serde_json::to_string_pretty(&check::baseline(&report.results))?;
        fs::write(&args.baseline, text + "\n")
            .with_context(|| format!("cannot write {}", args.baseline.display()))?;
        println!("the baseline is now {}", args.baseline.display());
    }
    if let Some(floor) = args.at_least {
        let ratio = report
            .row("tcp_rr", "direct", Target::Pod.name())
            .and_then(|row| row.ratio_to_netlink)
            .context("--at-least needs tcp_rr on direct and netlink")?;
        ensure!(
            ratio >= floor,
            "tcp_rr direct is {ratio:.2} x netlink, not {floor} x"
        );
    }
    if args.check {
        check::check(&args.baseline, &report.results)?;
    }
    Ok(())
}

/// Our own sides as far as the agent has them, and the peers.
fn sides(args: &BenchArgs) -> Result<Vec<Side>> {
    let mut sides = side::available(&side::help_of(&binaries::flanneld()?)?);
    sides.extend(args.peer.iter().map(Peer::side));
    Ok(sides)
}

fn measured(args: &BenchArgs, sides: &[Side], selection: &Selection) -> Result<Report> {
    let machine = Machine::look()?;
    println!("{}", machine.describe());
    if machine.background > 0.1 {
        println!("this machine is not idle: expect wide spreads");
    }
    let pace = pace_of(args, &machine);
    let Pace { seconds, cpu, .. } = pace;
    println!(
        "{} rounds of {seconds} s a side; medians, in brackets the ratio to {NETLINK}\n",
        args.rounds
    );
    let stages = sides
        .iter()
        .filter(|side| selection.side(&side.name))
        .map(|side| Stage::set(side).with_context(|| format!("side {}", side.name)))
        .collect::<Result<Vec<Stage>>>()?;
    let mut all = Measured::default();
    for probe in PROBES.iter().filter(|probe| selection.probe(probe.name)) {
        let targets: Vec<Target> = [Target::Pod, Target::Service]
            .into_iter()
            .filter(|target| selection.names(probe.name) || probe.included(*target, args.quick))
            .collect();
        rounds::measure(&stages, probe, &targets, args.rounds, pace, &mut all)?;
    }
    let mut programs = Vec::new();
    if selection.part(Part::Program) {
        for stage in stages.iter().filter(|stage| stage.side.has_programs()) {
            programs.extend(program::weigh(stage, pace)?);
        }
    }
    drop(stages);
    Ok(Report {
        machine,
        settings: Settings {
            quick: args.quick,
            rounds: args.rounds,
            seconds,
            cpu,
        },
        results: rows(&all.series),
        distributions: all.distributions,
        programs,
        growth: Vec::new(),
    })
}

fn pace_of(args: &BenchArgs, machine: &Machine) -> Pace {
    let cpu = args.cpu.min(machine.processors - 1);
    Pace {
        seconds: args.seconds.unwrap_or(if args.quick { 0.3 } else { 1.0 }),
        cpu,
        other_cpu: (cpu + 1) % machine.processors,
    }
}

/// `target/bench`, beside `target/release/lab`.
fn default_directory() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let target = exe
        .ancestors()
        .nth(2)
        .context("lab lies in an odd place: use --out")?;
    Ok(target.join("bench"))
}

fn write(directory: &Path, report: &Report) -> Result<()> {
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let json = serde_json::to_string_pretty(report)?;
    fs::write(directory.join("results.json"), json)?;
    fs::write(directory.join("results.md"), markdown::report(report))?;
    plot::all(directory, report)?;
    Ok(())
}
