//! Rules in the words of nftables: the language of `nft -f`, and the JSON that `nft -j` lists.

use std::fmt::Write as _;

use ipnet::Ipv4Net;
use serde_json::Value;

use crate::firewall::rules::{Chain, MASQUERADE_MARK, Rule, Side, Verdict};

pub(super) const TABLE_V4: &str = "flannel-ipv4";
pub(super) const TABLE_V6: &str = "flannel-ipv6";

/// A chain of ours and the hook it hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    pub(super) hook: &'static str,
    pub(super) priority: i64,
    pub(super) comment: &'static str,
}

pub(super) fn place(chain: Chain) -> Place {
    match chain {
        Chain::Forward => Place {
            name: "forward",
            kind: "filter",
            hook: "forward",
            priority: 0,
            comment: "chain to accept flannel traffic",
        },
        Chain::Masquerade => Place {
            name: "postrtg",
            kind: "nat",
            hook: "postrouting",
            priority: 100,
            comment: "chain to manage traffic masquerading by flannel",
        },
    }
}

/// Adds both tables, whichever families are in use.
pub(super) fn add_tables(comments: bool) -> String {
    [("ip", TABLE_V4), ("ip6", TABLE_V6)]
        .map(|(family, table)| {
            let comment = if comments {
                format!(" {{ comment \"rules for {table}\"; }}")
            } else {
                String::new()
            };
            format!("add table {family} {table}{comment}\n")
        })
        .concat()
}

impl Place {
    pub(super) fn add(&self, comments: bool) -> String {
        let Self {
            name,
            kind,
            hook,
            priority,
            comment,
        } = self;
        let comment = if comments {
            format!(" comment \"{comment}\";")
        } else {
            String::new()
        };
        format!(
            "add chain ip {TABLE_V4} {name} {{ type {kind} hook {hook} priority {priority}; policy accept;{comment} }}\n"
        )
    }

    pub(super) fn flush(&self) -> String {
        format!("flush chain ip {TABLE_V4} {}\n", self.name)
    }

    pub(super) fn delete(&self) -> String {
        format!("delete chain ip {TABLE_V4} {}\n", self.name)
    }

    pub(super) fn add_rule(&self, rule: &Rule) -> String {
        format!("add rule ip {TABLE_V4} {} {}\n", self.name, sentence(rule))
    }

    /// True if `chain`, an object of `nft -j`, hangs where it should.
    pub(super) fn fits(&self, chain: &Value) -> bool {
        chain["type"] == self.kind
            && chain["hook"] == self.hook
            && chain["prio"] == self.priority
            && chain["policy"] == "accept"
    }
}

/// The rule as it is written in a chain.
pub(super) fn sentence(rule: &Rule) -> String {
    let mut text = String::new();
    if rule.marked {
        let _ = write!(text, "meta mark {MASQUERADE_MARK:#x} ");
    }
    for (field, side) in [("saddr", rule.source), ("daddr", rule.destination)] {
        if let Some(Side { net, negated }) = side {
            let not = if negated { "!= " } else { "" };
            let _ = write!(text, "ip {field} {not}{net} ");
        }
    }
    text + match rule.verdict {
        Verdict::Return => "return",
        Verdict::Accept => "accept",
        Verdict::Masquerade {
            random_fully: false,
        } => "masquerade",
        Verdict::Masquerade { random_fully: true } => "masquerade fully-random",
    }
}

/// Reads the `expr` of a listed rule; `None` for anything that [`sentence`] does not write.
pub(super) fn parse(expressions: &Value) -> Option<Rule> {
    let (verdict, matches) = expressions.as_array()?.split_last()?;
    let mut rule = Rule {
        marked: false,
        source: None,
        destination: None,
        verdict: parse_verdict(verdict)?,
    };
    for expression in matches {
        let comparison = expression.get("match")?;
        let negated = match comparison["op"].as_str()? {
            "==" => false,
            "!=" => true,
            _ => return None,
        };
        let (left, right) = (&comparison["left"], &comparison["right"]);
        if left["meta"]["key"] == "mark" {
            (!negated && *right == MASQUERADE_MARK).then_some(())?;
            rule.marked = true;
            continue;
        }
        let payload = left.get("payload").filter(|it| it["protocol"] == "ip")?;
        let side = match payload["field"].as_str()? {
            "saddr" => &mut rule.source,
            "daddr" => &mut rule.destination,
            _ => return None,
        };
        let net = parse_net(right)?;
        if side.replace(Side { net, negated }).is_some() {
            return None;
        }
    }
    Some(rule)
}

fn parse_verdict(expression: &Value) -> Option<Verdict> {
    let (name, detail) = expression.as_object()?.iter().next()?;
    match (name.as_str(), detail) {
        ("return", Value::Null) => Some(Verdict::Return),
        ("accept", Value::Null) => Some(Verdict::Accept),
        ("masquerade", Value::Null) => Some(Verdict::Masquerade {
            random_fully: false,
        }),
        ("masquerade", Value::Object(options)) if options.len() == 1 => {
            let flags = &options.get("flags")?;
            // A word, or from nftables 1.1 on a list of words.
            (**flags == "fully-random" || **flags == serde_json::json!(["fully-random"]))
                .then_some(Verdict::Masquerade { random_fully: true })
        }
        _ => None,
    }
}

/// A single address is listed without its length.
fn parse_net(value: &Value) -> Option<Ipv4Net> {
    if let Some(address) = value.as_str() {
        return Some(Ipv4Net::from(address.parse::<std::net::Ipv4Addr>().ok()?));
    }
    let prefix = value.get("prefix")?;
    let address = prefix["addr"].as_str()?.parse().ok()?;
    let length = prefix["len"]
        .as_u64()
        .and_then(|len| u8::try_from(len).ok())?;
    Ipv4Net::new(address, length).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

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

    fn sentences(chain: Chain, random_fully: bool) -> Vec<String> {
        let rules = policy(random_fully).rules(chain, System::Nftables);
        rules.iter().map(sentence).collect()
    }

    #[test]
    fn contract_15_2_the_rules_in_order_with_their_quirks() {
        let masquerade = [
            "meta mark 0x4000 return",
            "ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
            "ip saddr 10.244.0.0/16 ip daddr 10.244.1.0/24 return",
            "ip saddr != 10.244.1.0/24 ip daddr 10.244.0.0/16 return",
            "ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
            "ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random",
        ];
        assert_eq!(sentences(Chain::Masquerade, true), masquerade);
        let plain = masquerade.map(|rule| rule.replace(" fully-random", ""));
        assert_eq!(sentences(Chain::Masquerade, false), plain);
        assert_eq!(
            sentences(Chain::Forward, true),
            [
                "ip saddr 10.244.0.0/16 accept",
                "ip daddr 10.244.0.0/16 accept"
            ]
        );
    }

    #[test]
    fn contract_15_1_tables_and_chains_with_their_comments() {
        assert_eq!(
            add_tables(true),
            "add table ip flannel-ipv4 { comment \"rules for flannel-ipv4\"; }\nadd table ip6 flannel-ipv6 { comment \"rules for flannel-ipv6\"; }\n"
        );
        assert_eq!(
            place(Chain::Masquerade).add(true),
            "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 100; policy accept; comment \"chain to manage traffic masquerading by flannel\"; }\n"
        );
        assert_eq!(
            place(Chain::Forward).add(true),
            "add chain ip flannel-ipv4 forward { type filter hook forward priority 0; policy accept; comment \"chain to accept flannel traffic\"; }\n"
        );
        assert_eq!(
            add_tables(false),
            "add table ip flannel-ipv4\nadd table ip6 flannel-ipv6\n"
        );
        assert!(!place(Chain::Forward).add(false).contains("comment"));
    }

    fn compare(field: &str, op: &str, right: &Value) -> Value {
        json!({"match": {"op": op, "left": {"payload": {"protocol": "ip", "field": field}}, "right": right}})
    }

    #[test]
    fn what_nft_lists_is_read_back() {
        let network = json!({"prefix": {"addr": "10.244.0.0", "len": 16}});
        let multicast = json!({"prefix": {"addr": "224.0.0.0", "len": 4}});
        let rules = policy(true).rules(Chain::Masquerade, System::Nftables);
        let mark =
            json!({"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 16384}});
        assert_eq!(parse(&json!([mark, {"return": null}])), Some(rules[0]));
        for flags in [json!("fully-random"), json!(["fully-random"])] {
            let listed = json!([
                compare("saddr", "==", &network),
                compare("daddr", "!=", &multicast),
                {"masquerade": {"flags": flags}},
            ]);
            assert_eq!(parse(&listed), Some(rules[4]));
        }
        let single = parse(&json!([compare("saddr", "==", &json!("10.0.0.1")), {"accept": null}]));
        let source = single.expect("ours").source.expect("a side");
        assert_eq!(source.net.to_string(), "10.0.0.1/32");
    }

    #[test]
    fn anything_else_is_not_taken_for_ours() {
        let network = json!({"prefix": {"addr": "10.244.0.0", "len": 16}});
        let accept = json!({"accept": null});
        for listed in [
            json!([]),
            json!(null),
            json!([{"counter": {"packets": 0, "bytes": 0}}, accept]),
            json!([compare("saddr", "<", &network), accept]),
            json!([compare("protocol", "==", &json!("tcp")), accept]),
            json!([
                compare("saddr", "==", &json!({"set": ["10.0.0.1"]})),
                accept
            ]),
            json!([
                compare(
                    "saddr",
                    "==",
                    &json!({"prefix": {"addr": "10.0.0.0", "len": 99}})
                ),
                accept
            ]),
            json!([
                compare("saddr", "==", &network),
                compare("saddr", "==", &network),
                accept
            ]),
            json!([compare("saddr", "==", &network), {"drop": null}]),
            json!([compare("saddr", "==", &network), {"masquerade": {"flags": "persistent"}}]),
            json!([{"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 1}}, {"return": null}]),
        ] {
            assert_eq!(parse(&listed), None, "{listed}");
        }
    }

    #[test]
    fn a_chain_on_another_hook_does_not_fit() {
        let place = place(Chain::Forward);
        let right = json!({"type": "filter", "hook": "forward", "prio": 0, "policy": "accept"});
        assert!(place.fits(&right));
        for (key, value) in [
            ("type", json!("nat")),
            ("hook", json!("input")),
            ("prio", json!(1)),
            ("policy", json!("drop")),
        ] {
            let mut wrong = right.clone();
            wrong[key] = value;
            assert!(!place.fits(&wrong), "{wrong}");
        }
        assert!(!place.fits(&json!({"name": "forward"})));
    }
}
