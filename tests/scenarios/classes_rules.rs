//! Rules that depend on more than a class holds, put under running short connections: classes go
//! off in time, the status names the rule, and the rule acts as on the kernel path.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_user::observe::status::Status;
use lab::{
    classes::{established, opened, poll_status, rush, serve, until_hot},
    kube::{CONNECTIONS_PORT, Kube, Side, Via, on, pause},
    node::Node,
    traffic::connections::{ConnectionsReport, Ending},
};

/// From the command's return until classes are off.
const OFF: Duration = Duration::from_millis(200);
/// Until the status names the rule: where another change was read just before, reading rests.
const NAMED: Duration = Duration::from_secs(1);
/// Connections that try a rule, all at once.
const TRIED: u64 = 20;
/// Connections that `connlimit` lets be.
const HELD: u64 = 3;
/// First packets of connections to the server.
const SYNS: &str = "-p tcp --dport 6200 --syn";
const NFT_SYNS: &str = "tcp dport 6200 tcp flags & (syn|ack) == syn";
const TABLE: &str = "lab-kinds";

/// Whose command writes the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Nft,
    Iptables,
    Legacy,
}

/// What the rule makes of [`TRIED`] connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Acts {
    /// None gets through.
    Denies,
    /// Five a second, and five before that.
    Limits,
    /// Every other one gets through.
    Halves,
    /// All get through, and the rule has seen each.
    Counts,
    /// [`HELD`] at a time.
    Holds,
}

struct Kind {
    name: &'static str,
    /// How the status names it, in small letters, for `nft` and for the others.
    reasons: (&'static str, &'static str),
    /// The rules in nftables' words, if it can.
    nft: &'static [&'static str],
    /// The same behind `-p tcp … --syn`.
    iptables: &'static [&'static str],
    acts: Acts,
}

const KINDS: [Kind; 10] = [
    Kind {
        name: "source port",
        reasons: ("source port", "source port"),
        nft: &["tcp sport 1024-65535 drop"],
        iptables: &["--sport 1024:65535 -j DROP"],
        acts: Acts::Denies,
    },
    Kind {
        name: "connlimit",
        reasons: ("connlimit", "connlimit"),
        nft: &["ct count over 3 drop"],
        iptables: &["-m connlimit --connlimit-above 3 -j DROP"],
        acts: Acts::Holds,
    },
    Kind {
        name: "hashlimit",
        reasons: ("set that packets change", "hashlimit"),
        nft: &["update @seen { ip saddr limit rate over 5/second burst 5 packets } drop"],
        iptables: &[
            "-m hashlimit --hashlimit-above 5/sec --hashlimit-burst 5 --hashlimit-mode srcip --hashlimit-name lab -j DROP",
        ],
        acts: Acts::Limits,
    },
    Kind {
        name: "limit",
        reasons: ("limit", "limit"),
        nft: &["limit rate over 5/second burst 5 packets drop"],
        iptables: &[
            "-m limit --limit 5/sec --limit-burst 5 -j ACCEPT",
            "-j DROP",
        ],
        acts: Acts::Limits,
    },
    Kind {
        name: "quota",
        reasons: ("quota", "quota"),
        nft: &["quota over 3000 bytes drop"],
        iptables: &["-m quota --quota 3000 -j ACCEPT", "-j DROP"],
        acts: Acts::Denies,
    },
    Kind {
        name: "statistic",
        reasons: ("numgen", "statistic"),
        nft: &["numgen inc mod 2 0 drop"],
        iptables: &["-m statistic --mode nth --every 2 --packet 0 -j DROP"],
        acts: Acts::Halves,
    },
    Kind {
        name: "recent",
        reasons: ("set that packets change", "recent"),
        nft: &["ip saddr @seen drop", "add @seen { ip saddr }"],
        iptables: &[
            "-m recent --name lab --update --seconds 60 --hitcount 5 -j DROP",
            "-m recent --name lab --set",
        ],
        acts: Acts::Denies,
    },
    Kind {
        name: "NFQUEUE",
        reasons: ("", "queue"),
        nft: &[],
        // Nobody takes them.
        iptables: &["-j NFQUEUE --queue-num 7"],
        acts: Acts::Denies,
    },
    Kind {
        name: "NFLOG",
        // Both commands for nftables write its own `log`.
        reasons: ("log", "log"),
        nft: &["counter log group 7"],
        iptables: &["-j NFLOG --nflog-group 7"],
        acts: Acts::Counts,
    },
    Kind {
        name: "time",
        reasons: ("time", "time"),
        nft: &["meta time > \"2020-01-01 00:00:00\" drop"],
        iptables: &["-m time --datestart 2020-01-01 -j DROP"],
        acts: Acts::Denies,
    },
];

fn run(node: &Node, words: &str) -> Result<String> {
    let argv: Vec<&str> = words.split_whitespace().collect();
    node.namespace().run(&argv)
}

impl Tool {
    fn restore(self) -> &'static str {
        match self {
            Self::Legacy => "iptables-legacy-restore",
            _ => "iptables-restore",
        }
    }

    /// All rules of a kind by one commit.
    fn put(self, kind: &Kind, node: &Node) -> Result<()> {
        if self == Self::Nft {
            let rules: String = kind
                .nft
                .iter()
                .map(|rule| format!("    {NFT_SYNS} {rule}\n"))
                .collect();
            let text = format!(
                "table ip {TABLE} {{\n  set seen {{ type ipv4_addr; flags dynamic,timeout; timeout 60s; }}\n  \
                 chain forward {{\n    type filter hook forward priority -10; policy accept;\n{rules}  }}\n}}\n"
            );
            return node
                .namespace()
                .run_with_input(&["nft", "-f", "-"], &text)
                .map(drop);
        }
        let rules: String = kind
            .iptables
            .iter()
            .enumerate()
            .map(|(index, rule)| format!("-I FORWARD {} {SYNS} {rule}\n", index + 1))
            .collect();
        self.commit(node, &rules)
    }

    fn take_away(self, kind: &Kind, node: &Node) -> Result<()> {
        if self == Self::Nft {
            return run(node, &format!("nft delete table ip {TABLE}")).map(drop);
        }
        self.commit(node, &"-D FORWARD 1\n".repeat(kind.iptables.len()))
    }

    fn commit(self, node: &Node, rules: &str) -> Result<()> {
        let text = format!("*filter\n{rules}COMMIT\n");
        node.namespace()
            .run_with_input(&[self.restore(), "--noflush"], &text)
            .map(drop)
    }

    /// Packets that the first rule has counted.
    fn counted(self, node: &Node) -> Result<u64> {
        let text = match self {
            Self::Nft => run(node, &format!("nft list chain ip {TABLE} forward"))?,
            Self::Iptables => run(node, "iptables -nvxL FORWARD 1")?,
            Self::Legacy => run(node, "iptables-legacy -nvxL FORWARD 1")?,
        };
        let mut words = text.split_whitespace();
        let count = match self {
            Self::Nft => words.skip_while(|word| *word != "packets").nth(1),
            _ => words.next(),
        };
        let count = count.and_then(|word| word.parse().ok());
        count.with_context(|| format!("no counter in:\n{text}"))
    }
}

/// Connections that all begin at once; how many were established.
fn try_all(kube: &Kube, count: u64, ending: Ending) -> Result<u64> {
    let target = kube.target(Via::Pod, CONNECTIONS_PORT);
    let mut task = kube.client().tool(&format!(
        "connections --to {target} --ending {} --count {count} --at-once {count} --exchanges 1 --size 64 --patience 0.7",
        ending.name()
    ))?;
    // Who is silent reports before the end.
    let report: ConnectionsReport = task.next_report()?;
    Ok(report.established)
}

/// Does the rule what it is for? Gives the number of connections that got through.
fn check_acts(kube: &Kube, node: &Node, tool: Tool, kind: &Kind) -> Result<u64> {
    if kind.acts == Acts::Holds {
        let held = try_all(kube, TRIED, Ending::Silent)?;
        ensure!(held == HELD, "{held} at a time");
        return Ok(held);
    }
    let before = if kind.acts == Acts::Counts {
        tool.counted(node)?
    } else {
        0
    };
    let through = try_all(kube, TRIED, Ending::ClientFin)?;
    let wanted = match kind.acts {
        Acts::Denies => 0..=0,
        // What the limit gives while the last ones wait.
        Acts::Limits => 1..=10,
        Acts::Halves => TRIED / 2 - 2..=TRIED / 2 + 2,
        Acts::Counts | Acts::Holds => TRIED..=TRIED,
    };
    ensure!(
        wanted.contains(&through),
        "{through} of {TRIED} got through"
    );
    if kind.acts == Acts::Counts {
        let seen = tool.counted(node)? - before;
        ensure!(seen >= TRIED, "the rule has seen {seen} of {TRIED}");
    }
    Ok(through)
}

/// One kind of rule, under running connections.
fn one(kube: &Kube, node: &Node, tool: Tool, kind: &Kind) -> Result<()> {
    let load = rush(kube)?;
    let reason = if tool == Tool::Nft {
        kind.reasons.0
    } else {
        kind.reasons.1
    };
    let (mut off, mut named) = (Duration::ZERO, Duration::ZERO);
    if kube.side() == Side::Classes {
        until_hot(kube)?;
        tool.put(kind, node)?;
        let put = Instant::now();
        let paused = |status: &Status| status.bypass.as_ref()?.own.as_ref()?.paused.clone();
        let reason_then;
        (off, reason_then) = poll_status(node, NAMED, |status| {
            paused(status).map(|reason| (put.elapsed(), reason))
        })?;
        ensure!(off < OFF, "off after {off:?}: {reason_then}");
        named = poll_status(node, NAMED, |status| {
            let named = paused(status)?.to_lowercase();
            named.contains(reason).then(|| put.elapsed())
        })?;
        let before = opened(node)?;
        pause(0.2);
        let opened = opened(node)? - before;
        ensure!(opened == 0, "{opened} opened by class all the same");
    } else {
        tool.put(kind, node)?;
        pause(0.4);
    }
    drop(load);
    // What was under way ends.
    pause(0.2);
    let before = established(kube.server())?;
    let through = check_acts(kube, node, tool, kind)?;
    let served = established(kube.server())? - before;
    println!(
        "{:?} {tool:?} {}: off after {off:?}, named after {named:?}, {through} of {TRIED} got through ({served} at the server)",
        kube.side(),
        kind.name
    );
    tool.take_away(kind, node)
}

fn every_kind(tool: Tool) {
    for side in [Side::Netlink, Side::Classes] {
        on(side, |kube| {
            let (a, b) = kube.cluster.nodes();
            let server = serve(kube.server())?;
            for (index, kind) in KINDS.iter().enumerate() {
                if tool == Tool::Nft && kind.nft.is_empty() {
                    continue;
                }
                // On either node in turn.
                let node = if index % 2 == 0 { a } else { b };
                one(kube, node, tool, kind)
                    .with_context(|| format!("{} by {tool:?} on {}", kind.name, node.name()))?;
            }
            drop(server);
            Ok(())
        });
    }
}

#[test]
fn every_kind_of_rule_by_nft() {
    every_kind(Tool::Nft);
}

#[test]
fn every_kind_of_rule_by_iptables() {
    every_kind(Tool::Iptables);
}

#[test]
fn every_kind_of_rule_by_legacy_iptables() {
    every_kind(Tool::Legacy);
}
