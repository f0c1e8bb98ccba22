//! `flannelctl`: what an operator asks of a running agent.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};
use flannel_user::{
    control::{self, Request},
    datapath::switch::Preference,
    observe::{status::Status, text},
};

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
    /// Switch pod traffic between eBPF and the kernel path, live and without loss
    Mode {
        /// auto returns to eBPF where this kernel can
        #[arg(value_enum)]
        datapath: Preference,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(code) => code,
        Err(cause) => {
            eprintln!("flannelctl: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    match arguments.verb {
        Verb::Status { output, all } => {
            let status = ask(arguments, &Request::Status)?;
            match output {
                Output::Text => print!("{}", text::render(&status, all)?),
                Output::Json => println!("{}", serde_json::to_string_pretty(&status)?),
            }
            Ok(ExitCode::SUCCESS)
        }
        Verb::Mode { datapath } => {
            let word = datapath
                .to_possible_value()
                .map(|value| value.get_name().to_owned());
            let status = ask(
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

fn ask(arguments: &Arguments, request: &Request) -> anyhow::Result<Status> {
    let patience = Duration::from_secs(arguments.timeout);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(control::ask(&arguments.socket, request, patience))
}
