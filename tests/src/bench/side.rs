//! What is compared: a table with one row per side.

use std::{
    path::{Path, PathBuf},
    process::Command,
    str::FromStr,
};

use anyhow::{Context, Result, anyhow, ensure};

use super::{
    measure::{Target, Traffic},
    proof::Way,
};

/// The side that ratios are taken to.
pub const NETLINK: &str = "netlink";
/// What agents do unless told otherwise.
pub const LEARNED: &str = "learned";
/// The same without classes of connections.
pub const FLOWS: &str = "flows";
/// TCP from its SYN on without asking anybody; UDP as [`LEARNED`].
pub const DIRECT: &str = "direct";
/// The nodes themselves, without a rule.
pub const HOST: &str = "host";
/// The nodes themselves, with the rules of the others.
pub const HOST_NF: &str = "host-nf";

/// Between which two ends, and what joins them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ends {
    /// The nodes' own addresses, no agent.
    BareNodes,
    /// The nodes' own addresses, with agents and rules.
    Nodes,
    /// Two pods with a veth between them and nothing else.
    Joined,
    /// A pod on each node.
    Pods(Agent),
}

/// The agents of a side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    /// Ours: `--datapath`, `--fast-path`.
    Own {
        /// `--datapath`.
        datapath: &'static str,
        /// `--fast-path`.
        fast_path: &'static str,
        /// `--fast-path-classes auto`, the default.
        classes: bool,
    },
    /// Another program, from `--peer`.
    Other(PathBuf),
}

/// One side.
#[derive(Debug, Clone)]
pub struct Side {
    /// In tables and in `results.json`.
    pub name: String,
    /// In a sentence.
    pub about: &'static str,
    /// Between what.
    pub ends: Ends,
    /// The way that packets have to take to the server's own address.
    pub to_pod: Way,
    /// The same through a Service; `None` where that is impossible.
    pub to_service: Option<Way>,
}

impl Side {
    /// Whether its agents load programs of ours.
    #[must_use]
    pub fn has_programs(&self) -> bool {
        matches!(
            self.ends,
            Ends::Pods(Agent::Own {
                datapath: "ebpf",
                ..
            })
        )
    }

    /// Whether it may differ from its neighbours in such traffic. A benchmark has an end.
    #[must_use]
    pub fn is_concerned_by(&self, traffic: Traffic) -> bool {
        match traffic {
            // It is about tables of learned flows, and what they are compared with.
            Traffic::Many(_) => self.name == NETLINK || self.name == LEARNED,
            // No connection opens.
            Traffic::Flood(_) => self.name != FLOWS,
            _ => true,
        }
    }

    /// The way that packets have to take.
    #[must_use]
    pub fn way(&self, target: Target) -> Option<Way> {
        match target {
            Target::Pod => Some(self.to_pod),
            Target::Service => self.to_service,
        }
    }
}

const fn pods(datapath: &'static str, fast_path: &'static str) -> Ends {
    Ends::Pods(Agent::Own {
        datapath,
        fast_path,
        classes: true,
    })
}

/// Every side of our own, in the order of tables. Those whose agent does not
/// exist yet are left out by [`available`].
#[must_use]
pub fn all() -> Vec<Side> {
    let side = |name: &str, about, ends, to_pod, to_service| Side {
        name: name.to_owned(),
        about,
        ends,
        to_pod,
        to_service,
    };
    vec![
        side(
            HOST,
            "the nodes' own addresses, no netfilter rule",
            Ends::BareNodes,
            Way::Uplink,
            None,
        ),
        side(
            HOST_NF,
            "the nodes' own addresses, the same rules as below",
            Ends::Nodes,
            Way::Uplink,
            Some(Way::Uplink),
        ),
        side(
            NETLINK,
            "pods by bridge, routing and flannel.1, as flannel does it",
            pods("netlink", "off"),
            Way::Kernel,
            Some(Way::Kernel),
        ),
        side(
            LEARNED,
            "pods by the programs once netfilter has let a flow, or such connections, pass",
            pods("ebpf", "learned"),
            Way::Classes,
            // What netfilter translates is learned with its translation.
            Some(Way::Learned),
        ),
        side(
            FLOWS,
            "the same without classes: every connection opens and ends in the kernel",
            Ends::Pods(Agent::Own {
                datapath: "ebpf",
                fast_path: "learned",
                classes: false,
            }),
            Way::Learned,
            Some(Way::Learned),
        ),
        side(
            DIRECT,
            "pods by the programs, TCP between them from the SYN on, blind to policies",
            pods("ebpf", "direct"),
            Way::Programs,
            // What netfilter translates is learned with its translation.
            Some(Way::Learned),
        ),
        side(
            "veth",
            "two pods joined by one veth: the floor",
            Ends::Joined,
            Way::Veth,
            None,
        ),
    ]
}

/// Those of [`all`] that this agent can be, by what its `--help` says.
#[must_use]
pub fn available(help: &str) -> Vec<Side> {
    let mut sides = all();
    sides.retain(|side| match &side.ends {
        Ends::Pods(Agent::Own {
            fast_path, classes, ..
        }) => {
            knows_fast_path(help, fast_path) && (*classes || help.contains("--fast-path-classes"))
        }
        _ => true,
    });
    sides
}

/// Whether `--fast-path` takes `value`.
fn knows_fast_path(help: &str, value: &str) -> bool {
    let Some((_, text)) = help.split_once("--fast-path") else {
        return false;
    };
    // As far as the next flag.
    let text = text.split("\n      --").next().unwrap_or(text);
    text.split(|letter: char| !letter.is_alphanumeric())
        .any(|word| word == value)
}

/// What a program says to `--help`, wherever it says it.
///
/// # Errors
/// When it cannot be started.
pub fn help_of(program: &Path) -> Result<String> {
    let output = Command::new(program)
        .arg("--help")
        .output()
        .with_context(|| format!("cannot start {}", program.display()))?;
    // Go's flag package writes to standard error.
    Ok(String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr))
}

/// `--peer NAME=PATH`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    name: String,
    path: PathBuf,
}

impl FromStr for Peer {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, path) = text
            .split_once('=')
            .ok_or_else(|| anyhow!("write NAME=PATH"))?;
        ensure!(
            !name.is_empty() && !path.is_empty(),
            "neither NAME nor PATH may be empty"
        );
        ensure!(
            all().iter().all(|side| side.name != name),
            "{name} is one of our own sides"
        );
        Ok(Self {
            name: name.to_owned(),
            path: path.into(),
        })
    }
}

impl Peer {
    /// As one more side.
    #[must_use]
    pub fn side(&self) -> Side {
        Side {
            name: self.name.clone(),
            about: "pods by another agent",
            ends: Ends::Pods(Agent::Other(self.path.clone())),
            to_pod: Way::Tunnelled,
            to_service: Some(Way::Tunnelled),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::PROBES;

    const HELP: &str = "      --fast-path <FAST_PATH>\n          Which packets\n\n          [possible values: off, direct]\n\n      --forged-vxlan <X>\n          what is learned";

    #[test]
    fn sides_that_do_not_exist_yet_are_left_out() {
        let names = |help: &str| -> Vec<String> {
            available(help).into_iter().map(|side| side.name).collect()
        };
        assert_eq!(
            names(HELP),
            ["host", "host-nf", "netlink", "direct", "veth"]
        );
        let later = HELP.replace("off, direct", "off, learned, direct");
        assert_eq!(names(&later).len(), 6);
    }

    #[test]
    fn what_cannot_differ_is_not_measured_twice() {
        let concerned = |probe: &str| -> Vec<String> {
            let probe = PROBES.iter().find(|one| one.name == probe).expect("it");
            let sides = all().into_iter();
            sides
                .filter(|side| side.is_concerned_by(probe.traffic))
                .map(|side| side.name)
                .collect()
        };
        assert_eq!(concerned("tcp_crr").len(), all().len());
        assert!(!concerned("udp_64").contains(&FLOWS.to_owned()));
        assert_eq!(concerned("udp_15000_in_turn"), ["netlink", "learned"]);
    }

    #[test]
    fn a_peer_has_a_name_and_a_path() {
        let peer: Peer = "flannel=/opt/flanneld".parse().expect("a peer");
        assert_eq!(peer.side().name, "flannel");
        assert!("netlink=/x".parse::<Peer>().is_err());
        assert!("=/x".parse::<Peer>().is_err());
        assert!("/x".parse::<Peer>().is_err());
    }
}
