//! From rules and jumps to the rules that concern a class. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// A rule that depends on more than a class holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Whose rule: a family of nftables, or `iptables-legacy`.
    pub family: &'static str,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its handle, or the rule itself.
    pub rule: String,
    /// What it depends on.
    pub reason: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            family,
            table,
            chain,
            rule,
            reason,
        } = self;
        write!(f, "{reason} ({family} {table} {chain}: {rule})")
    }
}

/// Names a chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ChainKey {
    pub(super) family: &'static str,
    pub(super) table: String,
    pub(super) chain: String,
}

/// What matters of a rule that TCP between pods may reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rule {
    /// How to find it; filled where there are reasons.
    pub(super) name: String,
    /// What it depends on that a class does not hold.
    pub(super) reasons: Vec<String>,
    /// Chains of the same table where such a packet may go on.
    pub(super) jumps: Vec<String>,
}

impl Rule {
    pub(super) fn matters(&self) -> bool {
        !(self.reasons.is_empty() && self.jumps.is_empty())
    }
}

/// The rules of all tables.
#[derive(Debug, Default)]
pub(super) struct Ruleset {
    chains: BTreeMap<ChainKey, Vec<Rule>>,
    /// Where forwarded packets enter.
    entries: BTreeSet<ChainKey>,
    /// How many rules were read.
    pub(super) rules: usize,
}

impl Ruleset {
    /// A chain that the kernel sends forwarded packets to.
    pub(super) fn enter(&mut self, chain: ChainKey) {
        self.entries.insert(chain);
    }

    /// A rule of a chain.
    pub(super) fn add(&mut self, chain: ChainKey, rule: Rule) {
        self.rules += 1;
        if rule.matters() {
            self.chains.entry(chain).or_default().push(rule);
        }
    }

    /// The rules that packets between pods may meet and that depend on more than a class holds.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut reached = self.entries.clone();
        let mut open: Vec<ChainKey> = self.entries.iter().cloned().collect();
        while let Some(chain) = open.pop() {
            for rule in self.chains.get(&chain).into_iter().flatten() {
                findings.extend(rule.reasons.iter().map(|reason| Finding {
                    family: chain.family,
                    table: chain.table.clone(),
                    chain: chain.chain.clone(),
                    rule: rule.name.clone(),
                    reason: reason.clone(),
                }));
                for jump in &rule.jumps {
                    let next = ChainKey {
                        chain: jump.clone(),
                        ..chain.clone()
                    };
                    if reached.insert(next.clone()) {
                        open.push(next);
                    }
                }
            }
        }
        findings.sort();
        findings.dedup();
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(chain: &str) -> ChainKey {
        ChainKey {
            family: "ip",
            table: "filter".to_owned(),
            chain: chain.to_owned(),
        }
    }

    fn jump(to: &str) -> Rule {
        Rule {
            jumps: vec![to.to_owned()],
            ..Rule::default()
        }
    }

    fn limit() -> Rule {
        Rule {
            name: "handle 7".to_owned(),
            reasons: vec!["limit".to_owned()],
            ..Rule::default()
        }
    }

    #[test]
    fn only_what_can_be_reached_counts() {
        let mut ruleset = Ruleset::default();
        ruleset.enter(key("FORWARD"));
        ruleset.add(key("INPUT"), limit());
        ruleset.add(key("FORWARD"), jump("a"));
        ruleset.add(key("a"), jump("b"));
        // A circle is not legal, and must not hang us.
        ruleset.add(key("b"), jump("a"));
        assert_eq!(ruleset.findings(), []);
        ruleset.add(key("b"), limit());
        let findings = ruleset.findings();
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].to_string(), "limit (ip filter b: handle 7)");
        assert_eq!(ruleset.rules, 5);
    }
}
