//! The `lab` command: the demo, the benchmark, and the tools that run inside pods.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lab::{
    namespace::{self, Kind},
    traffic::Tool,
};

/// Nodes and pods as network namespaces.
#[derive(Debug, Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Hold a namespace open until standard input ends (used by the lab itself).
    #[command(hide = true)]
    Hold {
        /// For process lists.
        name: String,
        /// With own mounts, as a node.
        #[arg(long)]
        mounts: bool,
    },
    #[command(flatten)]
    Tool(Tool),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Hold { mounts, name: _ } => {
            namespace::hold(if mounts { Kind::Node } else { Kind::Network })
        }
        Command::Tool(tool) => tool.run(),
    }
}
