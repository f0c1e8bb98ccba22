//! The text of `iptables-legacy-save`. Pure.

use std::collections::BTreeSet;

use super::{
    held::{self, Part},
    ipset::Sets,
    judge::{ChainKey, Rule, Ruleset},
    pods::Pods,
    xt::{self, Meaning, SOURCE_PORT, SOURCE_PORT_IN_IPSET},
};

const FAMILY: &str = "iptables-legacy";
const ENTRIES: [&str; 3] = ["PREROUTING", "FORWARD", "POSTROUTING"];

/// Adds all tables in `text`.
pub(super) fn read(text: &str, pods: Pods, sets: &Sets, ruleset: &mut Ruleset) {
    let mut table = "";
    let mut chains = BTreeSet::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
            chains.clear();
        } else if let Some(chain) = line.strip_prefix(':') {
            let name = chain.split_whitespace().next().unwrap_or_default();
            chains.insert(name);
            if ENTRIES.contains(&name) {
                ruleset.enter(key(table, name));
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let mut words = words(rule).into_iter();
            let chain = words.next().unwrap_or_default();
            let rest: Vec<String> = words.collect();
            let mut found = meaning(&rest, &chains, pods, sets);
            if !found.reasons.is_empty() {
                line.clone_into(&mut found.name);
            }
            ruleset.add(key(table, &chain), found);
        }
    }
}

/// The text without what changes by itself: packet counters and dates.
pub(super) fn essence(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| match line.starts_with(':') {
            true => line.split(" [").next().unwrap_or(line),
            false => line,
        })
        .fold(String::with_capacity(text.len()), |all, line| {
            all + line + "\n"
        })
}

fn key(table: &str, chain: &str) -> ChainKey {
    ChainKey {
        family: FAMILY,
        table: table.to_owned(),
        chain: chain.to_owned(),
    }
}

/// Splits at blanks, quoted words kept whole.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(letters.next()),
            ' ' if !quoted => words.extend(word.take()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    words
}

fn meaning(words: &[String], chains: &BTreeSet<&str>, pods: Pods, sets: &Sets) -> Rule {
    let mut rule = Rule::default();
    let mut parts: Vec<(Part, String)> = Vec::new();
    let mut excluded = false;
    let mut negated = false;
    let mut target = "";
    let mut words = words.iter().map(String::as_str);
    while let Some(option) = words.next() {
        let mut value = || words.next().unwrap_or_default();
        let varies = |what: &str| Meaning::Depends(Part::Varies, what.to_owned());
        let holds = |may: bool| {
            if may {
                Meaning::Held
            } else {
                Meaning::Excluded
            }
        };
        let found = match option {
            "!" => {
                negated = true;
                continue;
            }
            "-s" | "-d" => holds(pods.may_match(value(), negated)),
            "-p" => {
                let is_tcp = matches!(value(), "tcp" | "6" | "all" | "0");
                holds(is_tcp != negated)
            }
            "-m" => {
                let name = value();
                Meaning::of(held::of_match(name), || name.to_owned())
            }
            "--sport" | "--sports" | "--ports" | "--ctorigsrcport" | "--ctrepldstport" => {
                varies(SOURCE_PORT)
            }
            "--ctexpire" => varies("age of the connection"),
            "--tcp-option" => varies("TCP option"),
            "--ctstate" | "--state" => holds(value() != "INVALID" || negated),
            "--dst-type" => {
                let unicast = value().split(',').any(|kind| kind == "UNICAST");
                holds(unicast != negated)
            }
            "--match-set" => {
                let name = value();
                if sets.named_asks_for_source_port(name, value()) {
                    varies(SOURCE_PORT_IN_IPSET)
                } else {
                    Meaning::Held
                }
            }
            "--helper" if target == "CT" => xt::helper(),
            "-j" | "-g" => {
                target = value();
                if chains.contains(target) {
                    if !excluded {
                        rule.jumps.push(target.to_owned());
                    }
                    Meaning::Held
                } else {
                    Meaning::of(held::of_target(target), || target.to_owned())
                }
            }
            _ => Meaning::Held,
        };
        negated = false;
        match found {
            Meaning::Held => {}
            Meaning::Excluded => excluded = true,
            Meaning::Depends(part, what) if !excluded => parts.push((part, what)),
            Meaning::Depends(..) => {}
        }
    }
    parts.retain(|(part, _)| !excluded || *part == Part::Counts);
    rule.reasons = parts.into_iter().map(|(_, what)| what).collect();
    rule.reasons.dedup();
    rule
}

#[cfg(test)]
mod tests {
    use super::*;

    fn findings(text: &str) -> Vec<String> {
        let pods = Pods("10.244.0.0/16".parse().expect("a network"));
        let mut ruleset = Ruleset::default();
        read(text, pods, &Sets::default(), &mut ruleset);
        ruleset
            .findings()
            .into_iter()
            .map(|finding| finding.reason)
            .collect()
    }

    fn forward(rule: &str) -> Vec<String> {
        findings(&format!(
            "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [3:180]\n:POLICY - [0:0]\n{rule}\nCOMMIT\n"
        ))
    }

    #[test]
    fn each_rule_has_its_reason() {
        for (rule, expected) in [
            (
                "-A FORWARD -p tcp -m tcp --sport 1000 -j DROP",
                "source port",
            ),
            (
                "-A FORWARD -p tcp -m multiport --ports 1000,2000 -j DROP",
                "source port",
            ),
            (
                "-A FORWARD -p tcp -m connlimit --connlimit-above 3 -j REJECT",
                "connlimit",
            ),
            (
                "-A FORWARD -m string --string \"a b -p udp\" --algo bm -j DROP",
                "string",
            ),
            ("-A FORWARD -j NFQUEUE --queue-num 3", "NFQUEUE"),
            ("-A FORWARD -j LOG --log-prefix \"new: \"", "LOG"),
            (
                "-A FORWARD -p tcp -j CT --helper ftp",
                "helper that reads connections",
            ),
            (
                "-A FORWARD -m set --match-set gone src,src -j DROP",
                "source port in an ipset",
            ),
            (
                "-A FORWARD ! -p udp -m limit --limit 3/sec -j ACCEPT",
                "limit",
            ),
            (
                "-A FORWARD -m limit --limit 3/sec -m addrtype --dst-type LOCAL -j ACCEPT",
                "limit",
            ),
            (
                "-A FORWARD -g POLICY\n-A POLICY -m time --timestart 01:00:00 -j DROP",
                "time",
            ),
        ] {
            assert_eq!(forward(rule), [expected], "{rule}");
        }
    }

    #[test]
    fn what_a_class_holds_or_never_meets_is_no_reason() {
        for rule in [
            "-A FORWARD -s 10.244.1.2/32 -d 10.244.2.3/32 -p tcp -m tcp --dport 80 --tcp-flags SYN,ACK SYN -j DROP",
            "-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "-A FORWARD -m conntrack --ctstate INVALID -m limit --limit 3/sec -j LOG",
            "-A FORWARD -m mark --mark 0x4000/0x4000 -m comment --comment \"-m limit\" -j ACCEPT",
            "-A FORWARD -p udp -m udp --sport 53 -j ACCEPT",
            "-A FORWARD ! -p tcp -m limit --limit 3/sec -j ACCEPT",
            "-A FORWARD -d 192.168.0.0/16 -m limit --limit 3/sec -j ACCEPT",
            "-A FORWARD ! -s 10.0.0.0/8 -m limit --limit 3/sec -j ACCEPT",
            "-A INPUT -m limit --limit 3/sec -j ACCEPT",
            "-A FORWARD -p udp -j POLICY\n-A POLICY -m limit --limit 3/sec -j ACCEPT",
            "-A POLICY -m limit --limit 3/sec -j ACCEPT",
        ] {
            assert_eq!(forward(rule), [""; 0], "{rule}");
        }
    }

    #[test]
    fn counters_are_not_of_the_essence() {
        let before = "# Generated\n*filter\n:FORWARD DROP [3:180]\n-A FORWARD -j ACCEPT\nCOMMIT\n";
        let after = "# Later\n*filter\n:FORWARD DROP [4:240]\n-A FORWARD -j ACCEPT\nCOMMIT\n";
        assert_eq!(essence(before), essence(after));
        assert_ne!(essence(before), essence(&after.replace("DROP", "ACCEPT")));
    }
}
