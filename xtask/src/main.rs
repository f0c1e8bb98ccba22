//! The developer's menu: one module, one `Options` and one `run` per verb.

mod bench;
mod build_ebpf;
mod check;
mod command;
mod demo;
mod kernels;
mod lab;
mod scale;
mod setup;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// What one can do with this repository, each as one command.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", version, about)]
enum Verb {
    /// Install or find what the other verbs need (they call it themselves).
    Setup(setup::Options),
    /// Build the kernel programs into target/ebpf/flannel.o.
    BuildEbpf(build_ebpf::Options),
    /// Start nodes, watch pod traffic in both modes, switch between them live.
    Demo(demo::Options),
    /// Compare the paths: host, kernel VXLAN, eBPF.
    Bench(bench::Options),
    /// Measure starts, changes and memory with 1 to 10,000 leases in an etcd.
    Scale(scale::Options),
    /// Run every test: pure logic, programs, scenarios against the real kernel.
    Test(test::Options),
    /// Formatting, lints and documentation, all without warnings.
    Check(check::Options),
    /// Load the programs and pass traffic in other kernels, under emulation.
    Kernels(kernels::Options),
}

fn main() -> ExitCode {
    // A missing tool is a sentence, not a stack trace, whatever RUST_BACKTRACE says.
    match run(&Verb::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: &Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Setup(options) => setup::run(options),
        Verb::BuildEbpf(options) => build_ebpf::run(options),
        Verb::Demo(options) => demo::run(options),
        Verb::Bench(options) => bench::run(options),
        Verb::Scale(options) => scale::run(options),
        Verb::Test(options) => test::run(options),
        Verb::Check(options) => check::run(options),
        Verb::Kernels(options) => kernels::run(options),
    }
}
