//! Runs the lab's measurement of large clusters in place of xtask.

use anyhow::Result;

use crate::lab;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// For the measurement, such as `--leases 10000`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    lab::become_it("scale", &options.arguments)
}
