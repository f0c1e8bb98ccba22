//! Runs the lab's benchmarks in place of xtask, and proves that their check is worth something.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use crate::{build_ebpf, command, lab, setup, workspace};

#[derive(clap::Args)]
pub(crate) struct Options {
    /// Measure nothing: show that `--check` notices programs that take 500 ns more.
    #[arg(long)]
    prove_check: bool,
    /// For the benchmark, such as `--quick` or `--help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.prove_check {
        return prove_check();
    }
    lab::become_it("bench", &options.arguments)
}

/// A baseline of this machine, the same programs against it, then slower ones.
fn prove_check() -> Result<()> {
    setup::lab()?;
    let directory = workspace::artifacts().join("bench/prove-check");
    fs::create_dir_all(&directory)?;
    let slowed = slowed_agent(&directory)?;
    lab::build()?;

    let bench = |more: &[&str]| {
        let mut bench = Command::new(workspace::release_binary("lab"));
        bench
            .args(["bench", "--quick", "--only", "tcp_rr,direct"])
            .arg("--out")
            .arg(&directory)
            .arg("--baseline")
            .arg(directory.join("baseline.json"))
            .args(more);
        bench
    };
    println!("\na baseline:");
    command::run(&mut bench(&["--write-baseline"]))?;
    println!("\nthe same programs, which have to pass:");
    command::run(&mut bench(&["--check"]))?;
    println!("\nprograms that take 500 ns more, which have to be noticed:");
    let (status, said) = command::run_and_listen(bench(&["--check"]).env("FLANNELD", slowed))?;
    ensure!(
        !status.success() && said.contains("LOST"),
        "nobody noticed that the programs are slower"
    );
    println!("\nprove-check: 500 ns were noticed");
    Ok(())
}

/// An agent with the slowed programs, out of the way of the right one.
fn slowed_agent(directory: &Path) -> Result<std::path::PathBuf> {
    let object = build_ebpf::build_slowed(&setup::build_tools()?)?;
    command::run(
        workspace::cargo()
            .args([
                "build",
                "--release",
                // Both, as the lab is built: else every dependency is built anew for its features.
                "--package=flannel-user",
                "--package=lab",
                "--bin=flanneld",
            ])
            .env("FLANNEL_EBPF_OBJECT", &object),
    )?;
    let agent = directory.join("flanneld-slowed");
    let built = workspace::release_binary("flanneld");
    fs::copy(&built, &agent).with_context(|| format!("cannot copy {}", built.display()))?;
    Ok(agent)
}
