//! The `lab` command: the demo, the benchmark, and the tools that run inside pods.

use anyhow::Result;
use clap::{Parser, Subcommand};
use lab::{
    bench, demo, guest,
    lab::Lab,
    namespace::{self, Kind},
    original, scale, scratch,
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
    /// Measure starts, changes and memory with thousands of leases in an etcd.
    Scale(scale::ScaleArgs),
    /// Set up a cluster and tell a short story with live figures.
    Demo(demo::DemoArgs),
    /// Check this kernel with both datapaths (run inside guest kernels).
    Guest(guest::GuestArgs),
    #[command(flatten)]
    Tool(Tool),
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Hold { mounts, name: _ } => {
            namespace::hold(if mounts { Kind::Node } else { Kind::Network })
        }
        Command::Bench(args) => bench::run(&args),
        Command::Scale(args) => scale::run(&args),
        Command::Up { nodes, pods } => up(nodes, pods),
        Command::Demo(args) => demo::run(&args),
        Command::Guest(args) => guest::run(&args),
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
    scratch::wait_for_ctrl_c()
}
