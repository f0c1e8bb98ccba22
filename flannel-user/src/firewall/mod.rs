//! Firewall rules: masquerading and forwarding of pod traffic (contract sections 14 and 15).
//!
//! [`rules`] says what is wanted, as data; [`iptables`] and [`nftables`] write it in their words,
//! compare it with what the kernel has and change that in one commit; [`watch`] keeps it so.
//! Rules stay when the agent leaves.
//!
//! The tools are run rather than their netlink protocols spoken: both packet filters must remain
//! readable by the host's own tools, and only those know how (see
//! `docs/decisions/0011-firewall.md`).

pub mod blackhole;
mod command;
mod events;
pub mod iptables;
mod kernel_chains;
pub mod nftables;
mod pace;
pub mod rules;
pub mod watch;

use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

pub use self::{
    command::CommandError,
    rules::{Chain, Policy, System},
};
use self::{iptables::Iptables, nftables::Nftables};

/// Without it, traffic between pods on one bridge never meets iptables.
const BRIDGE_NETFILTER: &str = "/proc/sys/net/bridge/bridge-nf-call-iptables";

/// Why rules are not in place.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// A tool failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The tool for the chosen system is missing.
    #[error("firewall rules cannot be written: {advice}")]
    NoTool {
        /// What the operator can do.
        advice: &'static str,
        /// Which program it is.
        #[source]
        source: CommandError,
    },
    /// A tool printed something else than expected.
    #[error("cannot read what {command} printed")]
    Unreadable {
        /// The command line.
        command: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Contract section 1, step 8.
    #[error(
        "{} does not exist, so the firewall would not see traffic between pods on a bridge: load the kernel module with `modprobe br_netfilter`",
        .0.display()
    )]
    NoBridgeNetfilter(PathBuf),
}

/// The rules of this agent in one packet-filter system.
#[derive(Debug)]
pub enum Firewall {
    /// By the iptables tools.
    Iptables(Iptables),
    /// By nft.
    Nftables(Nftables),
    /// Neither masquerading nor forwarding was asked for: hands off, and no tool is needed.
    None,
}

impl Firewall {
    /// The firewall for `system`. With nothing to install, iptables is left alone entirely;
    /// nftables still gets its two tables, as flannel has them.
    ///
    /// `previous` is the network of this agent's last run; if it was another one, its rules go.
    ///
    /// # Errors
    /// The tools of `system` are not installed.
    pub async fn open(
        system: System,
        policy: Policy,
        previous: Option<Ipv4Net>,
    ) -> Result<Self, FirewallError> {
        let forget = previous.filter(|network| *network != policy.network);
        Ok(match system {
            System::Nftables => Self::Nftables(Nftables::new(policy, forget)),
            System::Iptables if policy.is_empty() => Self::None,
            System::Iptables => Self::Iptables(Iptables::open(policy, forget).await?),
        })
    }

    /// Puts in order what is not, and names the chains that changed. A second call right after
    /// changes nothing.
    ///
    /// # Errors
    /// A tool failed; what it was to change is as before.
    pub async fn apply(&mut self) -> Result<Vec<Chain>, FirewallError> {
        match self {
            Self::Iptables(iptables) => iptables.apply().await,
            Self::Nftables(nftables) => nftables.apply().await,
            Self::None => Ok(Vec::new()),
        }
    }

    /// True if [`Self::apply`] would change nothing.
    ///
    /// # Errors
    /// A tool failed.
    pub async fn is_in_order(&self) -> Result<bool, FirewallError> {
        match self {
            Self::Iptables(iptables) => iptables.is_in_order().await,
            Self::Nftables(nftables) => nftables.is_in_order().await,
            Self::None => Ok(true),
        }
    }

    /// Removes what flannel has left in the systems that are not in use, and counts the tables
    /// that were changed. Comes after [`Self::apply`], so that a switch leaves no gap.
    ///
    /// # Errors
    /// A tool failed. One that is not installed is no failure: it has left nothing.
    pub async fn clean_other(&self) -> Result<usize, FirewallError> {
        match self {
            Self::Iptables(iptables) => {
                let (tables, others) = tokio::join!(
                    nftables::clean(),
                    iptables::clean_except(Some(iptables.variant()))
                );
                Ok(tables? + others?)
            }
            Self::Nftables(_) => iptables::clean_except(None).await,
            Self::None => nftables::clean().await,
        }
    }

    /// True if the kernel tells when these rules change.
    #[must_use]
    pub fn has_events(&self) -> bool {
        match self {
            Self::Iptables(iptables) => iptables.has_events(),
            Self::Nftables(_) => true,
            Self::None => false,
        }
    }
}

/// Contract section 1, step 8: iptables mode needs br_netfilter. Asked only if there are rules to
/// install, since without any it does not matter what the firewall sees.
///
/// # Errors
/// The module is not loaded.
pub fn check_bridge_netfilter(system: System, policy: &Policy) -> Result<(), FirewallError> {
    check_bridge_file(Path::new(BRIDGE_NETFILTER), system, policy)
}

fn check_bridge_file(file: &Path, system: System, policy: &Policy) -> Result<(), FirewallError> {
    if system == System::Nftables || policy.is_empty() || file.exists() {
        Ok(())
    } else {
        Err(FirewallError::NoBridgeNetfilter(file.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contract_1_step_8_bridge_netfilter_is_needed_for_iptables_rules_only() {
        let policy = |forward| Policy {
            network: "10.244.0.0/16".parse().expect("a network"),
            subnet: "10.244.1.0/24".parse().expect("a network"),
            masquerade: false,
            random_fully: true,
            forward,
        };
        let missing = Path::new("/no/such/file");
        let check = |file, system, forward| check_bridge_file(file, system, &policy(forward));
        let error = check(missing, System::Iptables, true).expect_err("missing");
        assert!(error.to_string().contains("modprobe br_netfilter"));
        check(missing, System::Iptables, false).expect("no rules");
        check(missing, System::Nftables, true).expect("not by nftables");
        check(Path::new("/"), System::Iptables, true).expect("only existence counts");
    }
}
