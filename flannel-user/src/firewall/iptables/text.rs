//! Rules in the words of iptables: what `-S` lists and `-restore` reads.

use std::{fmt::Write as _, net::Ipv4Addr};

use ipnet::Ipv4Net;

use crate::firewall::rules::{Chain, MASQUERADE_MARK, Rule, Side, Verdict};

/// Where a chain of ours hangs, and how it is called there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) table: &'static str,
    pub(super) parent: &'static str,
    pub(super) name: &'static str,
    pub(super) comment: &'static str,
}

pub(super) fn place(chain: Chain) -> Place {
    match chain {
        Chain::Masquerade => Place {
            table: "nat",
            parent: "POSTROUTING",
            name: "FLANNEL-POSTRTG",
            comment: "flanneld masq",
        },
        Chain::Forward => Place {
            table: "filter",
            parent: "FORWARD",
            name: "FLANNEL-FWD",
            comment: "flanneld forward",
        },
    }
}

impl Place {
    /// The rule in the parent chain that leads to ours.
    pub(super) fn jump(&self) -> String {
        let Self {
            parent,
            name,
            comment,
            ..
        } = self;
        format!("-A {parent} -m comment --comment \"{comment}\" -j {name}")
    }

    /// The line that appends `rule`.
    pub(super) fn line(&self, rule: &Rule) -> String {
        let mut line = format!("-A {}", self.name);
        for (option, side) in [("-s", rule.source), ("-d", rule.destination)] {
            if let Some(Side { net, negated }) = side {
                let not = if negated { " !" } else { "" };
                let _ = write!(line, "{not} {option} {net}");
            }
        }
        if rule.marked {
            let _ = write!(
                line,
                " -m mark --mark {MASQUERADE_MARK:#x}/{MASQUERADE_MARK:#x}"
            );
        }
        let verdict = match rule.verdict {
            Verdict::Return => "RETURN",
            Verdict::Accept => "ACCEPT",
            Verdict::Masquerade {
                random_fully: false,
            } => "MASQUERADE",
            Verdict::Masquerade { random_fully: true } => "MASQUERADE --random-fully",
        };
        let _ = write!(
            line,
            " -m comment --comment \"{}\" -j {verdict}",
            self.comment
        );
        line
    }

    /// Reads a line of `-S`; `None` for anything that [`Self::line`] does not write, whatever
    /// order its parts have.
    pub(super) fn parse(&self, line: &str) -> Option<Rule> {
        let words = words(line);
        let mut words = words.iter().map(String::as_str);
        (words.next() == Some("-A") && words.next() == Some(self.name)).then_some(())?;
        let (mut source, mut destination, mut verdict) = (None, None, None);
        let (mut marked, mut commented, mut negated) = (false, false, false);
        while let Some(word) = words.next() {
            let was_negated = std::mem::take(&mut negated);
            let side = |text| side(text, was_negated);
            match word {
                "!" => negated = true,
                "-s" if source.is_none() => source = Some(side(words.next()?)?),
                "-d" if destination.is_none() => destination = Some(side(words.next()?)?),
                _ if was_negated => return None,
                "-m" => matches!(words.next()?, "mark" | "comment").then_some(())?,
                "--mark" => {
                    is_the_mark(words.next()?).then_some(())?;
                    marked = true;
                }
                "--comment" => commented = words.next()? == self.comment,
                "-j" => verdict = Some(target(words.next()?)?),
                "--random-fully" => match &mut verdict {
                    Some(Verdict::Masquerade { random_fully }) => *random_fully = true,
                    _ => return None,
                },
                _ => return None,
            }
        }
        (commented && !negated).then_some(())?;
        Some(Rule {
            marked,
            source,
            destination,
            verdict: verdict?,
        })
    }

    /// True for a rule, in whatever chain, that leads to ours.
    pub(super) fn is_reference(&self, line: &str) -> bool {
        let words = words(line);
        words.first().is_some_and(|word| word == "-A")
            && words
                .windows(2)
                .any(|pair| matches!(pair[0].as_str(), "-j" | "-g") && pair[1] == self.name)
    }
}

fn side(text: &str, negated: bool) -> Option<Side> {
    let net = text
        .parse::<Ipv4Net>()
        .or_else(|_| text.parse::<Ipv4Addr>().map(Ipv4Net::from))
        .ok()?;
    Some(Side { net, negated })
}

fn is_the_mark(text: &str) -> bool {
    let number = |text: &str| u32::from_str_radix(text.strip_prefix("0x")?, 16).ok();
    text.split_once('/').is_some_and(|(mark, mask)| {
        number(mark) == Some(MASQUERADE_MARK) && number(mask) == Some(MASQUERADE_MARK)
    })
}

fn target(name: &str) -> Option<Verdict> {
    match name {
        "RETURN" => Some(Verdict::Return),
        "ACCEPT" => Some(Verdict::Accept),
        "MASQUERADE" => Some(Verdict::Masquerade {
            random_fully: false,
        }),
        _ => None,
    }
}

/// Splits as `-restore` does: blanks separate, double quotes hold together, a backslash
/// inside them takes the next character as it is.
fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            '\\' if quoted => word.get_or_insert_default().extend(characters.next()),
            blank if blank.is_whitespace() && !quoted => words.extend(word.take()),
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::firewall::rules::{Policy, System};

    fn policy(random_fully: bool) -> Policy {
        Policy {
            network: "10.244.0.0/16".parse().expect("a network"),
            subnet: "10.244.1.0/24".parse().expect("a network"),
            masquerade: true,
            random_fully,
            forward: true,
        }
    }

    fn listing(chain: Chain, random_fully: bool) -> String {
        let place = place(chain);
        let rules = policy(random_fully).rules(chain, System::Iptables);
        let lines: Vec<String> = rules.iter().map(|rule| place.line(rule)).collect();
        format!("{}\n{}", place.jump(), lines.join("\n"))
    }

    const MASQUERADE: &str = r#"-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.1.0/24 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.244.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully"#;

    const FORWARD: &str = r#"-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT"#;

    #[test]
    fn contract_14_1_the_seven_masquerade_rules() {
        assert_eq!(listing(Chain::Masquerade, true), MASQUERADE);
        let plain = MASQUERADE.replace(" --random-fully", "");
        assert_eq!(listing(Chain::Masquerade, false), plain);
    }

    #[test]
    fn contract_14_2_the_forward_rules() {
        assert_eq!(listing(Chain::Forward, true), FORWARD);
    }

    #[test]
    fn what_is_listed_is_read_back() {
        for chain in Chain::ALL {
            let rules = policy(true).rules(chain, System::Iptables);
            for rule in rules {
                assert_eq!(place(chain).parse(&place(chain).line(&rule)), Some(rule));
            }
        }
    }

    #[test]
    fn a_rule_that_differs_in_anything_is_not_taken_for_ours() {
        let place = place(Chain::Masquerade);
        for line in MASQUERADE.lines().skip(1) {
            assert!(place.parse(line).is_some(), "{line}");
            for changed in [
                line.replace("flanneld masq", "flanneld"),
                line.replace("FLANNEL-POSTRTG", "FLANNEL-FWD"),
                line.replace("-A", "-N"),
                line.replace("-j", "-p tcp -j"),
                line.replace("-j", "-m tcp -j"),
                line.replace("-j", "! -j"),
                line.replace("-j", "-o eth0 -j"),
                line.replace("RETURN", "DROP").replace("MASQUERADE", "SNAT"),
                line.split(" -j").next().unwrap_or_default().to_owned(),
                line.replace(" -m comment --comment \"flanneld masq\"", ""),
            ] {
                assert_eq!(place.parse(&changed), None, "{changed}");
            }
        }
        let other_mark = MASQUERADE.replace("0x4000/0x4000", "0x4000/0xffff");
        let other_mark = other_mark.lines().nth(1).expect("a line");
        assert_eq!(place.parse(other_mark), None);
    }

    #[test]
    fn every_way_to_our_chain_is_seen() {
        let place = place(Chain::Masquerade);
        assert!(place.is_reference(&place.jump()));
        assert!(place.is_reference("-A OTHER -p tcp -g FLANNEL-POSTRTG"));
        for other in [
            "-N FLANNEL-POSTRTG",
            "-A OTHER -j FLANNEL-POSTRTG2",
            "-A OTHER -m comment --comment \"-j FLANNEL-POSTRTG\" -j RETURN",
            "-A FLANNEL-POSTRTG -j RETURN",
        ] {
            assert!(!place.is_reference(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = place(Chain::Masquerade).parse(&text);
            let _ = place(Chain::Forward).is_reference(&text);
        }
    }
}
