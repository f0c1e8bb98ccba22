//! `flannelctl`: what an operator asks of a running agent.

use std::{
    ffi::OsString,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::{Parser, Subcommand, ValueEnum};
use flannel_user::{
    control::{self, Request},
    datapath::switch::Preference,
    docker_opts::{self, DockerOpts, Wanted},
    observe::{
        flows::{Filter, Flows},
        flows_text,
        status::Status,
        text,
    },
};
use serde::de::DeserializeOwned;

/// Asks the flanneld of this machine, or switches its datapath
#[derive(Parser)]
#[command(name = "flannelctl", version)]
struct Arguments {
    /// Control socket of the agent
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "FLANNELD_CONTROL_SOCKET",
        default_value = "/run/flannel/control.sock"
    )]
    socket: PathBuf,
    /// Longest wait for an answer, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30)]
    timeout: u64,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Mode, peers, pods, and every packet by its outcome
    Status {
        /// Form of the answer
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
        /// Outcomes that no packet had, too
        #[arg(short, long)]
        all: bool,
    },
    /// Learned flows: who talks to whom, by which path and why
    ///
    /// A row is a connection of a local pod with a pod of another node, those with most packets
    /// first. What is not listed was not learned: the stack carries it. All filters that are given
    /// have to hold.
    Flows {
        /// Form of the answer
        #[arg(short, long, value_enum, default_value_t = Output::Text)]
        output: Output,
        /// Flows of the local pod with this address
        #[arg(long, value_name = "ADDR")]
        pod: Option<Ipv4Addr>,
        /// Flows with this far end: a pod, a Service or the public address of a node
        #[arg(long, value_name = "ADDR|NODE")]
        peer: Option<Ipv4Addr>,
        /// Flows with this port at either end
        #[arg(long, value_name = "N")]
        port: Option<u16>,
        /// Show so many at most; 0 for all
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
    },
    /// Switch pod traffic between eBPF and the kernel path, live and without loss
    Mode {
        /// auto returns to eBPF where this kernel can
        #[arg(value_enum)]
        datapath: Preference,
    },
    /// Write Docker's options from the subnet file, as flannel's mk-docker-opts.sh does
    ///
    /// Options on docker0's address, masquerading and MTU, for an EnvironmentFile of Docker's unit.
    /// Without -i and -c both kinds are written. A link to flannelctl named mk-docker-opts.sh does
    /// the same. Ends with 1 if a route sends this node's own subnet to a gateway.
    MkDockerOpts(MkDockerOpts),
}

#[derive(clap::Args)]
struct MkDockerOpts {
    /// flannel's subnet file
    #[arg(
        short = 'f',
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env"
    )]
    subnet_file: PathBuf,
    /// File to write
    #[arg(
        short = 'd',
        value_name = "FILE",
        default_value = "/run/docker_opts.env"
    )]
    docker_file: PathBuf,
    /// A variable for each option
    #[arg(short)]
    individual: bool,
    /// One variable with all of them
    #[arg(short)]
    combined: bool,
    /// Without --ip-masq
    #[arg(short = 'm')]
    without_ip_masq: bool,
    /// Name of the one variable; what it holds in the environment stays in front
    #[arg(short = 'k', value_name = "NAME", default_value = "DOCKER_OPTS")]
    key: String,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    match run(&Arguments::parse_from(command_line(std::env::args_os()))) {
        Ok(code) => code,
        Err(cause) => {
            eprintln!("flannelctl: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

/// What `mk-docker-opts.sh` is asked, `flannelctl mk-docker-opts` is asked.
fn command_line(given: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut line: Vec<OsString> = given.into_iter().collect();
    let name = line.first().map(Path::new).and_then(Path::file_stem);
    if name.is_some_and(|name| name == "mk-docker-opts") {
        line.insert(1, "mk-docker-opts".into());
    }
    line
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match arguments.verb {
        Verb::MkDockerOpts(ref options) => {
            make_docker_opts(options)?;
            Ok(ExitCode::SUCCESS)
        }
        Verb::Status { output, all } => {
            let status: Status = ask(arguments, &Request::Status)?;
            match output {
                Output::Text => print!("{}", text::render(&status, all)?),
                Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Flows {
            output,
            pod,
            peer,
            port,
            limit,
        } => {
            let filter = Filter {
                pod,
                peer,
                port,
                limit: (limit > 0).then_some(limit),
            };
            let flows: Flows = ask(arguments, &Request::Flows(filter))?;
            match output {
                Output::Text => print!("{}", flows_text::render(&flows)?),
                Output::Json => println!("{}", serde_json::to_string_pretty(&flows)?),
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Mode { datapath } => {
            let word = datapath
                .to_possible_value()
                .map(|value| value.get_name().to_owned());
            let status: Status = ask(
                arguments,
                &Request::Mode {
                    datapath: word.unwrap_or_default(),
                },
            )?;
            let mode = serde_json::to_value(status.mode)?;
            println!(
                "{} ({})",
                mode.as_str().unwrap_or_default(),
                status.mode_reason
            );
            let refused = datapath == Preference::Ebpf && mode != "ebpf";
            Ok(if refused {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            })
        }
    }
}

fn make_docker_opts(options: &MkDockerOpts) -> anyhow::Result<()> {
    const ROUTES: &str = "/proc/net/route";
    let path = &options.subnet_file;
    let text = fs::read_to_string(path).with_context(|| {
        format!(
            "cannot read {}: has flanneld written it yet?",
            path.display()
        )
    })?;
    let found =
        DockerOpts::parse(&text).with_context(|| format!("cannot use {}", path.display()))?;
    let routes = fs::read_to_string(ROUTES).with_context(|| format!("cannot read {ROUTES}"))?;
    if let Some(route) = docker_opts::route_by_gateway(&routes, found.subnet()) {
        let interface = route.split_whitespace().next().unwrap_or_default();
        bail!(
            "a route sends this node's own subnet {} to a gateway on {interface}: remove it first, docker0 would be cut off",
            found.subnet()
        );
    }
    let both = !options.individual && !options.combined;
    let wanted = Wanted {
        individual: options.individual || both,
        combined: (options.combined || both).then(|| options.key.clone()),
        without_ip_masq: options.without_ip_masq,
    };
    let given = std::env::var(&options.key).unwrap_or_default();
    let file = found.render(&wanted, &given)?;
    let target = &options.docker_file;
    fs::write(target, file).with_context(|| format!("cannot write {}", target.display()))
}

fn ask<T: DeserializeOwned>(arguments: &Arguments, request: &Request) -> anyhow::Result<T> {
    let patience = Duration::from_secs(arguments.timeout);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(control::ask(&arguments.socket, request, patience))
}
