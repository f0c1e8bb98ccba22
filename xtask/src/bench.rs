//! Runs the lab's benchmarks in place of xtask.

use anyhow::Result;

use crate::lab;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// For the benchmark.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    lab::become_it("bench", &options.arguments)
}
