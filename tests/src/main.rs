//! The `lab` command: the demo, the benchmark, and the tools that run inside pods.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lab::{
    bench,
    lab::Lab,
    namespace::{self, Kind},
    original,
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
    /// Set up nodes as the original flannel configures them, say how to enter, wait.
    Up {
        /// How many.
        #[arg(long, default_value_t = 2)]
        nodes: u8,
        /// Pods on each.
        #[arg(long, default_value_t = 1)]
        pods: u8,
    },
    /// Compare the paths by what a request and its response cost.
    Bench(bench::BenchArgs),
    #[command(flatten)]
    Tool(Tool),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Hold { mounts, name: _ } => {
            namespace::hold(if mounts { Kind::Node } else { Kind::Network })
        }
        Command::Bench(args) => bench::run(&args),
        Command::Up { nodes, pods } => up(nodes, pods),
        Command::Tool(tool) => tool.run(),
    }
}

fn up(nodes: u8, pods: u8) -> Result<()> {
    let lab = Lab::with_nodes(nodes)?;
    original::configure_all(&lab)?;
    let mut all = Vec::new();
    for node in lab.nodes() {
        println!("{:<24} {}", node.name(), node.namespace().nsenter_line());
        for _ in 0..pods {
            let pod = node.add_pod()?;
            let namespace = pod.namespace();
            println!("  pod {:<18} {}", pod.address(), namespace.nsenter_line());
            all.push(pod);
        }
    }
    println!("ready; Ctrl-C takes everything down");
    loop {
        std::thread::park();
    }
}
