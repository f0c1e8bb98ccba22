//! Flags and environment (contract section 2).
//!
//! Names, defaults and forms are flannel's: `-x` and `--x` are equal, a switch is turned
//! off with `=false`, and every flag has a variable (`--subnet-file`:
//! `FLANNELD_SUBNET_FILE`) that the command line overrides. Unlike the original, a value
//! that cannot be read is an error and ends with a status other than 0.

mod error;
mod go_flags;
mod not_yet;
#[cfg(test)]
mod tests;

use std::{net::Ipv4Addr, path::PathBuf, time::Duration};

use clap::{CommandFactory, FromArgMatches, Parser, ValueEnum};

pub use self::error::FlagsError;
use self::{go_flags::Given, not_yet::NotYet};
use crate::{
    datapath::{ebpf::TcAttach, exclusion::Exclusion, switch::Preference},
    network::FastPath,
    source::etcd::{Endpoints, EtcdOptions, Secret},
};

/// Largest `--subnet-lease-renew-margin`, in minutes: a minute less than a day.
const MAX_RENEW_MARGIN: u64 = 1439;
/// Above this, klog shows no more.
const MAX_VERBOSITY: u64 = 10;

/// Everything that the command line and the environment say, checked.
#[derive(Debug, Clone, PartialEq, Eq, Parser)]
#[command(
    name = "flanneld",
    about = "Connects the pods of all nodes; a drop-in flannel with an eBPF datapath",
    after_help = "Every flag has a variable: --subnet-file is FLANNELD_SUBNET_FILE. The command line wins.",
    args_override_self = true,
    disable_version_flag = true,
    next_line_help = false
)]
pub struct Flags {
    /// etcd servers, with commas between them; where leases come from unless --lease-dir is given
    #[arg(
        long,
        value_name = "URLS",
        default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379",
        help_heading = "Leases"
    )]
    pub etcd_endpoints: Endpoints,

    /// Root of all keys in etcd
    #[arg(
        long,
        value_name = "PATH",
        default_value = "/coreos.com/network",
        help_heading = "Leases"
    )]
    pub etcd_prefix: String,

    /// Client key for etcd; TLS is configured only with key and certificate
    #[arg(long, value_name = "FILE", help_heading = "Leases")]
    pub etcd_keyfile: Option<PathBuf>,

    /// Client certificate for etcd
    #[arg(long, value_name = "FILE", help_heading = "Leases")]
    pub etcd_certfile: Option<PathBuf>,

    /// Certificates that etcd's is checked against; else the system's
    #[arg(long, value_name = "FILE", help_heading = "Leases")]
    pub etcd_cafile: Option<PathBuf>,

    /// User in etcd
    #[arg(long, value_name = "NAME", help_heading = "Leases")]
    pub etcd_username: Option<String>,

    /// Password of that user; better given as FLANNELD_ETCD_PASSWORD
    #[arg(long, value_name = "PASSWORD", help_heading = "Leases")]
    pub etcd_password: Option<Secret>,

    /// Directory of leases and network config that all nodes share, instead of etcd
    #[arg(long, value_name = "DIR", help_heading = "Leases")]
    pub lease_dir: Option<PathBuf>,

    /// How long a lease lasts unless renewed, in seconds
    #[arg(long, value_name = "SECONDS", default_value = "86400", value_parser = seconds, help_heading = "Leases")]
    pub lease_ttl: Duration,

    /// Minutes before its end at which a lease is renewed, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = go_flags::integer, help_heading = "Leases")]
    pub subnet_lease_renew_margin: u64,

    /// Where the CNI plugin finds this node's subnet; also read back at start
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env",
        help_heading = "Leases"
    )]
    pub subnet_file: PathBuf,

    /// Uplink: an interface's name or address; the first that exists (repeatable)
    #[arg(long, value_name = "NAME|IP", help_heading = "Uplink")]
    pub iface: Vec<String>,

    /// Uplink: regular expression over addresses, then names (repeatable)
    #[arg(long, value_name = "REGEX", help_heading = "Uplink")]
    pub iface_regex: Vec<String>,

    /// Uplink: the interface through which this address is reached
    #[arg(long, value_name = "IP", help_heading = "Uplink")]
    pub iface_can_reach: Option<Ipv4Addr>,

    /// Address that other nodes send to
    #[arg(long, value_name = "IP", help_heading = "Uplink")]
    pub public_ip: Option<Ipv4Addr>,

    /// Which datapath carries pod traffic; auto takes eBPF where this kernel can
    #[arg(
        long,
        value_enum,
        ignore_case = true,
        default_value = "auto",
        help_heading = "Datapath"
    )]
    pub datapath: Preference,

    /// Which packets the programs may take; else the network config's FastPath, else learned
    #[arg(long, value_enum, ignore_case = true, help_heading = "Datapath")]
    pub fast_path: Option<FastPath>,

    /// With learned: short connections from their SYN on, where the kernel has let such
    /// connections pass; auto leaves it where rules depend on more
    #[arg(
        long,
        value_enum,
        ignore_case = true,
        default_value = "auto",
        help_heading = "Datapath"
    )]
    pub fast_path_classes: Classes,

    /// Seconds that a learned verdict holds unless confirmed, while flows are few (1 to 30)
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = validity, help_heading = "Datapath")]
    pub fast_path_revalidate: Duration,

    /// What never bypasses the stack: a prefix, an address, port:NUMBER or interface:NAME of a
    /// pod's veth on the host (repeatable)
    #[arg(long, value_name = "WHAT", help_heading = "Datapath")]
    pub fast_path_exclude: Vec<Exclusion>,

    /// Flows of each direction that are remembered at most (1024 to 1048576)
    #[arg(long, value_name = "NUMBER", default_value = "65536", value_parser = flows, help_heading = "Datapath")]
    pub fast_path_flows: u32,

    /// How programs are attached; auto takes tcx where this kernel has it (6.6)
    #[arg(
        long,
        value_enum,
        ignore_case = true,
        default_value = "auto",
        help_heading = "Datapath"
    )]
    pub tc_attach: TcAttach,

    /// What happens to tunnel packets that come from no known peer
    #[arg(
        long,
        value_enum,
        ignore_case = true,
        default_value = "drop",
        help_heading = "Datapath"
    )]
    pub forged_vxlan: ForgedVxlan,

    /// Where programs, maps and links are pinned
    #[arg(
        long,
        value_name = "DIR",
        default_value = "/sys/fs/bpf/flannel",
        help_heading = "Datapath"
    )]
    pub bpf_dir: PathBuf,

    /// Masquerade traffic that leaves the pod network
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set, value_parser = go_flags::boolean, help_heading = "Firewall")]
    pub ip_masq: bool,

    /// Masquerade without fully random source ports
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set, value_parser = go_flags::boolean, help_heading = "Firewall")]
    pub ip_masq_fully_random_disable: bool,

    /// Accept forwarded traffic from and to pods, in nftables mode as well
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", action = clap::ArgAction::Set, value_parser = go_flags::boolean, help_heading = "Firewall")]
    pub iptables_forward_rules: bool,

    /// How often rules (and the blackhole route) are looked at besides kernel events
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = go_flags::integer, help_heading = "Firewall")]
    pub iptables_resync: u64,

    /// Keep a blackhole route for this node's pod subnet, behind every other route to it
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set, value_parser = go_flags::boolean, help_heading = "Firewall")]
    pub ip_blackhole_route: bool,

    /// Socket of flannelctl
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/run/flannel/control.sock",
        help_heading = "Operation"
    )]
    pub control_socket: PathBuf,

    /// Where /healthz and /readyz are answered, if --healthz-port is given
    #[arg(
        long,
        value_name = "IP",
        default_value = "0.0.0.0",
        help_heading = "Operation"
    )]
    healthz_ip: String,

    /// TCP port of /healthz and /readyz; 0 for none
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = port, help_heading = "Operation")]
    healthz_port: u16,

    /// Verbosity: 0 facts, 2 details, 5 everything (10 is the same)
    #[arg(long = "v", value_name = "LEVEL", default_value = "0", value_parser = go_flags::integer, help_heading = "Operation")]
    pub verbosity: u64,

    /// Print the version to standard error and leave
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true", action = clap::ArgAction::Set, value_parser = go_flags::boolean, help_heading = "Operation")]
    version: bool,

    #[command(flatten)]
    not_yet: NotYet,

    /// What the user should know about the flags given, to be logged once logging works.
    #[arg(skip)]
    pub warnings: Vec<String>,
}

/// `--forged-vxlan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ForgedVxlan {
    /// Dropped and counted.
    Drop,
    /// Left to the kernel, which takes them, as flannel does: peers behind NAT need that.
    Pass,
}

/// `--fast-path-classes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Classes {
    /// Wherever no rule depends on more than a class holds.
    Auto,
    /// Never: handshake and end of each connection take the kernel.
    Off,
}

impl Flags {
    /// Reads flags from `args` (without the program's name) and variables from `env`.
    ///
    /// # Errors
    /// When help or version is asked for, something cannot be read, or something that
    /// this version lacks is asked for.
    pub fn parse(
        args: impl IntoIterator<Item = String>,
        env: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, FlagsError> {
        let mut command = Self::command();
        command.build();
        command = command.mut_arg("help", |help| help.help("Print this help"));
        let line = go_flags::from_arguments(&command, args)?;
        if line.iter().any(|given| given.name == "help") {
            return Err(FlagsError::Help(command.render_help().to_string()));
        }
        // A variable must not stop the agent from saying what it is.
        check_readable(&command, &line)?;
        if line
            .iter()
            .rev()
            .find(|given| given.name == "version")
            .is_some_and(Given::is_on)
        {
            return Err(FlagsError::Version(env!("CARGO_PKG_VERSION").to_owned()));
        }
        let environment = go_flags::from_environment(&command, &line, env);
        for given in &environment {
            check_readable(&command, std::slice::from_ref(given))?;
        }
        let all: Vec<Given> = environment.into_iter().chain(line).collect();
        let mut warnings = not_yet::check(&all)?;
        check_one_source(&all)?;
        let matches = command
            .try_get_matches_from_mut(argv(&all))
            .map_err(|error| FlagsError::Usage(text_of(&error)))?;
        let mut flags =
            Self::from_arg_matches(&matches).map_err(|error| FlagsError::Usage(text_of(&error)))?;
        let margin = flags.subnet_lease_renew_margin;
        if !(1..=MAX_RENEW_MARGIN).contains(&margin) {
            return Err(FlagsError::RenewMargin(margin));
        }
        if flags.iptables_resync == 0 {
            warnings.push(
                "--iptables-resync is 0, which would leave no pause: looking every second"
                    .to_owned(),
            );
        }
        flags.warnings = warnings;
        Ok(flags)
    }

    /// Reads the flags of this process. Where there are none to work with, prints why and
    /// ends the process: help to standard output, version and errors to standard error.
    #[must_use]
    pub fn from_process() -> Self {
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        let args = std::env::args_os().skip(1).map(lossy);
        let env = std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value)));
        Self::parse(args, env).unwrap_or_else(|error| {
            match &error {
                FlagsError::Help(text) => print!("{text}"),
                FlagsError::Version(version) => eprintln!("{version}"),
                error => eprintln!("flanneld: {error}\nflanneld --help lists every flag"),
            }
            std::process::exit(error.exit_code().into())
        })
    }

    /// How to reach etcd, if leases come from there.
    #[must_use]
    pub fn etcd(&self) -> EtcdOptions {
        EtcdOptions {
            endpoints: self.etcd_endpoints.clone(),
            prefix: self.etcd_prefix.clone(),
            key_file: self.etcd_keyfile.clone(),
            cert_file: self.etcd_certfile.clone(),
            ca_file: self.etcd_cafile.clone(),
            username: self.etcd_username.clone(),
            password: self.etcd_password.clone(),
            lease_ttl: self.lease_ttl,
        }
    }

    /// Address or name, and port, of the health checks, if they are wanted.
    #[must_use]
    pub fn healthz(&self) -> Option<(&str, u16)> {
        // To Go, no address means every one.
        let ip = match self.healthz_ip.as_str() {
            "" => "0.0.0.0",
            ip => ip,
        };
        (self.healthz_port != 0).then_some((ip, self.healthz_port))
    }

    /// How long before its end the lease is renewed: as asked for, but never more than
    /// half of its life, or a short `--lease-ttl` would mean renewing all the time.
    #[must_use]
    pub fn renew_margin(&self) -> Duration {
        Duration::from_secs(self.subnet_lease_renew_margin * 60).min(self.lease_ttl / 2)
    }

    /// The period of `--iptables-resync`.
    #[must_use]
    pub fn firewall_period(&self) -> Duration {
        Duration::from_secs(self.iptables_resync.max(1))
    }

    /// The filter for tracing that klog's verbosity stands for.
    #[must_use]
    pub fn log_filter(&self) -> &'static str {
        match self.verbosity.min(MAX_VERBOSITY) {
            0..=1 => "info",
            2..=4 => "info,flanneld=debug,flannel_user=debug",
            _ => "info,flanneld=trace,flannel_user=trace",
        }
    }
}

fn argv(given: &[Given]) -> impl Iterator<Item = String> {
    std::iter::once("flanneld".to_owned()).chain(given.iter().map(Given::argument))
}

/// A variable counts as much as a flag: nobody sets one for nothing.
fn check_one_source(all: &[Given]) -> Result<(), FlagsError> {
    let directory = all.iter().find(|given| given.name == "lease-dir");
    let etcd = all.iter().find(|given| given.name.starts_with("etcd-"));
    match (directory, etcd) {
        (Some(directory), Some(etcd)) => Err(FlagsError::TwoLeaseSources {
            lease_dir: directory.origin(),
            etcd: etcd.origin(),
        }),
        _ => Ok(()),
    }
}

fn check_readable(command: &clap::Command, given: &[Given]) -> Result<(), FlagsError> {
    match command.clone().try_get_matches_from(argv(given)) {
        Ok(_) => Ok(()),
        Err(error) => Err(match given {
            [
                Given {
                    variable: Some(variable),
                    value: Some(value),
                    ..
                },
            ] => FlagsError::Variable {
                variable: variable.clone(),
                value: value.clone(),
                cause: text_of(&error),
            },
            _ => FlagsError::Usage(text_of(&error)),
        }),
    }
}

/// Without clap's usage lines: the help is long enough.
fn text_of(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let text = text.split("\n\nUsage:").next().unwrap_or(text);
    let text = text
        .split("\n\nFor more information")
        .next()
        .unwrap_or(text);
    text.trim_end().to_owned()
}

/// A validity in seconds, fractions allowed.
fn validity(text: &str) -> Result<Duration, String> {
    text.parse::<f64>()
        .ok()
        .filter(|seconds| (1.0..=30.0).contains(seconds))
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "expected seconds from 1 to 30".to_owned())
}

/// Size of a flow table.
fn flows(text: &str) -> Result<u32, String> {
    go_flags::integer(text)
        .ok()
        .and_then(|flows| u32::try_from(flows).ok())
        .filter(|flows| (1_024..=1_048_576).contains(flows))
        .ok_or_else(|| "expected a number from 1024 to 1048576".to_owned())
}

fn port(text: &str) -> Result<u16, String> {
    let number = go_flags::integer(text)?;
    u16::try_from(number).map_err(|_| "a port is 65535 at most".to_owned())
}

fn seconds(text: &str) -> Result<Duration, String> {
    match go_flags::integer(text)? {
        0 => Err("a lease must last at least one second".to_owned()),
        seconds => Ok(Duration::from_secs(seconds)),
    }
}
