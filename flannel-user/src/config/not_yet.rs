//! Flags of flannel that parse here but whose work this version cannot do.

use clap::Args;

use super::{
    FlagsError,
    go_flags::{Given, boolean},
};

const HEADING: &str = "Not available in this version";

/// Their values are checked for their type and otherwise unused.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
#[command(next_help_heading = HEADING)]
pub(super) struct NotYet {
    /// Refused: Kubernetes as lease source
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    kube_subnet_mgr: Option<bool>,
    /// Refused: Kubernetes as lease source
    #[arg(long, value_name = "URL")]
    kube_api_url: Option<String>,
    /// Refused: Kubernetes as lease source
    #[arg(long, value_name = "FILE")]
    kubeconfig_file: Option<String>,
    /// Refused: IPv6
    #[arg(long, value_name = "IP")]
    public_ipv6: Option<String>,
    /// Ignored: Kubernetes
    #[arg(long, value_name = "PREFIX")]
    kube_annotation_prefix: Option<String>,
    /// Ignored: Kubernetes
    #[arg(long, value_name = "FILE")]
    net_config_path: Option<String>,
    /// Ignored: Kubernetes
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = boolean)]
    set_node_network_unavailable: Option<bool>,
    /// Ignored: per-file log verbosity
    #[arg(long, value_name = "PATTERNS")]
    vmodule: Option<String>,
    /// Ignored: stack trace at a source line
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE")]
    log_backtrace_at: Option<String>,
}

/// What to do about a flag.
enum Lack {
    /// Without it the agent would do something else than asked: stop.
    Refused {
        what: &'static str,
        advice: &'static str,
    },
    /// The agent works without it: say so.
    Ignored(&'static str),
}

const NO_KUBERNETES: Lack = Lack::Refused {
    what: "leases from Kubernetes are",
    advice: "use etcd (--etcd-endpoints) or --lease-dir",
};

/// What this version lacks for the flag; nothing if the value asks for nothing.
fn lack_of(given: &Given) -> Option<Lack> {
    match given.name.as_str() {
        "kube-subnet-mgr" | "set-node-network-unavailable" if !given.is_on() => None,
        "kube-subnet-mgr" | "kube-api-url" | "kubeconfig-file" => Some(NO_KUBERNETES),
        "public-ipv6" => Some(Lack::Refused {
            what: "IPv6 is",
            advice: "remove it, only IPv4 exists so far",
        }),
        "kube-annotation-prefix" | "net-config-path" | "set-node-network-unavailable" => {
            Some(Lack::Ignored("leases do not come from Kubernetes"))
        }
        "vmodule" | "log_backtrace_at" => Some(Lack::Ignored(
            "log output is chosen with --v alone in this version",
        )),
        _ => None,
    }
}

/// The warnings that the flags earn.
pub(super) fn check(all: &[Given]) -> Result<Vec<String>, FlagsError> {
    let mut warnings = Vec::new();
    for given in all {
        match lack_of(given) {
            Some(Lack::Refused { what, advice }) => {
                return Err(FlagsError::NotAvailable {
                    flag: given.origin(),
                    what,
                    advice,
                });
            }
            Some(Lack::Ignored(why)) => {
                warnings.push(format!("{} has no effect: {why}", given.origin()));
            }
            None => {}
        }
    }
    Ok(warnings)
}
