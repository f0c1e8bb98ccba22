//! Runs the lab's demo in place of xtask, so that Ctrl-C goes straight to it.

use anyhow::Result;

use crate::lab;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// For the demo, such as `--nodes 3` or `--hold`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<String>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    lab::become_it("demo", &options.arguments)
}
