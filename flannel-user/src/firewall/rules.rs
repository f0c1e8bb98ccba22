//! What the firewall has to say about pod traffic, as data (contract 14.1, 14.2, 15.2).
//!
//! One model serves both packet-filter systems; where flannel's two rule sets differ (rule 4
//! of nftables is rule 5 of iptables with the two networks swapped, and the mark is compared
//! whole instead of masked) so do ours, because their listings are part of the contract.
//!
//! Several agents may run on one host, and flannel gives their rules the same chains. A chain
//! is therefore judged by what concerns this agent: complete sets of rules for a network that
//! has nothing in common with ours belong to another agent and stay. Everything else that is not
//! ours goes.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

/// kube-proxy's mark for packets that it masquerades itself.
pub const MASQUERADE_MARK: u32 = 0x4000;

/// Where pods may send without their source being changed.
pub const MULTICAST: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 4);

/// What an agent wants of the firewall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// All pod addresses of the cluster.
    pub network: Ipv4Net,
    /// This node's pod subnet.
    pub subnet: Ipv4Net,
    /// `--ip-masq`: traffic from pods to the outside gets the node's address.
    pub masquerade: bool,
    /// Masqueraded connections get fully random source ports.
    pub random_fully: bool,
    /// `--iptables-forward-rules`: traffic from and to pods may be forwarded.
    pub forward: bool,
}

/// The two places where rules stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Chain {
    /// After routing, where sources are rewritten.
    Masquerade,
    /// Where forwarded packets are accepted.
    Forward,
}

impl Chain {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Masquerade, Self::Forward];
}

/// The packet-filter system that a set of rules is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// Section 14.
    Iptables,
    /// Section 15.
    Nftables,
}

/// A network that an address is in, or is not in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// The network.
    pub net: Ipv4Net,
    /// The address must be outside.
    pub negated: bool,
}

/// What happens to a packet that a rule fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It leaves the chain as it is.
    Return,
    /// It may pass.
    Accept,
    /// Its source becomes the node's address.
    Masquerade {
        /// With a fully random port.
        random_fully: bool,
    },
}

/// One rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// The packet has [`MASQUERADE_MARK`].
    pub marked: bool,
    /// Where it comes from.
    pub source: Option<Side>,
    /// Where it goes.
    pub destination: Option<Side>,
    /// What happens to it.
    pub verdict: Verdict,
}

impl Rule {
    /// Exempts what kube-proxy masquerades. Every agent's set begins with it.
    const MARKED: Self = Self {
        marked: true,
        source: None,
        destination: None,
        verdict: Verdict::Return,
    };
}

impl Policy {
    /// True if there is no rule at all to install.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.masquerade && !self.forward
    }

    /// The rules of `chain` in order; none if it is not wanted.
    #[must_use]
    pub fn rules(&self, chain: Chain, system: System) -> Vec<Rule> {
        match chain {
            Chain::Masquerade if self.masquerade => {
                masquerade_rules(self.network, self.subnet, self.random_fully, system)
            }
            Chain::Forward if self.forward => forward_rules(self.network),
            Chain::Masquerade | Chain::Forward => Vec::new(),
        }
    }
}

const fn within(net: Ipv4Net) -> Option<Side> {
    Some(Side {
        net,
        negated: false,
    })
}

const fn outside(net: Ipv4Net) -> Option<Side> {
    Some(Side { net, negated: true })
}

fn masquerade_rules(
    network: Ipv4Net,
    subnet: Ipv4Net,
    random_fully: bool,
    system: System,
) -> Vec<Rule> {
    let rule = |source, destination, verdict| Rule {
        marked: false,
        source,
        destination,
        verdict,
    };
    let masquerade = Verdict::Masquerade { random_fully };
    let (c, p) = (network, subnet);
    let from_outside = match system {
        System::Iptables => rule(outside(c), within(p), Verdict::Return),
        System::Nftables => rule(outside(p), within(c), Verdict::Return),
    };
    vec![
        Rule::MARKED,
        rule(within(p), within(c), Verdict::Return),
        rule(within(c), within(p), Verdict::Return),
        from_outside,
        rule(within(c), outside(MULTICAST), masquerade),
        rule(outside(c), within(c), masquerade),
    ]
}

fn forward_rules(network: Ipv4Net) -> Vec<Rule> {
    let accept = |source, destination| Rule {
        marked: false,
        source,
        destination,
        verdict: Verdict::Accept,
    };
    vec![accept(within(network), None), accept(None, within(network))]
}

/// How a chain is, and how it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Nothing has to be done.
    pub in_order: bool,
    /// Everything that the chain should hold; with nothing in it, it should not be there.
    pub wanted: Vec<Rule>,
}

/// Judges what was found in `chain`; `None` stands for a rule that no agent makes.
///
/// `forget` is a network of this agent's past: its rules are not taken for another agent's.
#[must_use]
pub fn judge(
    found: &[Option<Rule>],
    policy: &Policy,
    chain: Chain,
    system: System,
    forget: Option<Ipv4Net>,
) -> Judgement {
    let own = policy.rules(chain, system);
    let others = others(found, policy.network, chain, system, forget);
    let unknown = |rule: &Option<Rule>| rule.is_none_or(|rule| !others.contains(&rule));
    let rest: Vec<Option<Rule>> = found.iter().copied().filter(unknown).collect();

    let shared = (chain == Chain::Masquerade).then_some(Rule::MARKED);
    let mut wanted = Vec::new();
    if !(own.is_empty() && others.is_empty()) {
        wanted.extend(shared);
        wanted.extend(&others);
        wanted.extend(own.iter().filter(|rule| !rule.marked));
    }
    let expected = wanted.iter().filter(|rule| !others.contains(rule));
    let in_order = rest.iter().copied().eq(expected.copied().map(Some))
        && found.first().copied().flatten().filter(|rule| rule.marked)
            == shared.filter(|_| !wanted.is_empty());
    Judgement { in_order, wanted }
}

/// The rules of other agents on this host, each once and in their order.
fn others(
    found: &[Option<Rule>],
    network: Ipv4Net,
    chain: Chain,
    system: System,
    forget: Option<Ipv4Net>,
) -> Vec<Rule> {
    let apart =
        |net: &Ipv4Net| !net.contains(&network) && !network.contains(net) && Some(*net) != forget;
    let mut others = Vec::new();
    for candidate in found.iter().flatten() {
        let Some(theirs) = set_of(candidate, found, chain, system) else {
            continue;
        };
        let their_network = candidate.source.map(|side| side.net);
        let complete = theirs.iter().all(|rule| found.contains(&Some(*rule)));
        if complete && their_network.as_ref().is_some_and(apart) {
            others.extend(theirs.into_iter().filter(|rule| !rule.marked));
        }
    }
    let mut ordered: Vec<Rule> = Vec::new();
    for rule in found.iter().flatten() {
        if others.contains(rule) && !ordered.contains(rule) {
            ordered.push(*rule);
        }
    }
    ordered
}

/// The set that `rule` would be the key rule of: the one that masquerades, or accepts, all
/// that comes from the agent's network.
fn set_of(rule: &Rule, found: &[Option<Rule>], chain: Chain, system: System) -> Option<Vec<Rule>> {
    let network = rule.source.filter(|side| !side.negated)?.net;
    match (chain, rule.verdict) {
        (Chain::Masquerade, Verdict::Masquerade { random_fully })
            if rule.destination == outside(MULTICAST) =>
        {
            let subnet = found.iter().flatten().find_map(|rule| {
                let to = rule.destination.filter(|side| !side.negated)?.net;
                (rule.verdict == Verdict::Return && rule.source == within(network)).then_some(to)
            })?;
            Some(masquerade_rules(network, subnet, random_fully, system))
        }
        (Chain::Forward, Verdict::Accept) if rule.destination.is_none() => {
            Some(forward_rules(network))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    fn policy(network: &str, subnet: &str) -> Policy {
        Policy {
            network: network.parse().expect("a network"),
            subnet: subnet.parse().expect("a network"),
            masquerade: true,
            random_fully: true,
            forward: true,
        }
    }

    fn ours() -> Policy {
        policy("10.244.0.0/16", "10.244.1.0/24")
    }

    fn found(rules: &[Rule]) -> Vec<Option<Rule>> {
        rules.iter().copied().map(Some).collect()
    }

    const SYSTEMS: [System; 2] = [System::Iptables, System::Nftables];

    fn each() -> impl Iterator<Item = (Chain, System)> {
        Chain::ALL
            .into_iter()
            .flat_map(|chain| SYSTEMS.map(|system| (chain, system)))
    }

    fn verdict(found: &[Option<Rule>], chain: Chain, system: System) -> Judgement {
        judge(found, &ours(), chain, system, None)
    }

    #[test]
    fn what_we_install_is_in_order() {
        for (chain, system) in each() {
            let own = ours().rules(chain, system);
            let judgement = verdict(&found(&own), chain, system);
            assert!(judgement.in_order, "{chain:?} {system:?}");
            assert_eq!(judgement.wanted, own);
        }
    }

    #[test]
    fn every_flaw_is_noticed_and_repaired_to_the_same_rules() {
        for (chain, system) in each() {
            let own = ours().rules(chain, system);
            let right = found(&own);
            let mut flawed = vec![Vec::new()];
            for index in 0..right.len() {
                let mut missing = right.clone();
                missing.remove(index);
                flawed.push(missing);
                let mut twice = right.clone();
                twice.insert(index, right[index]);
                flawed.push(twice);
                let mut foreign = right.clone();
                foreign.insert(index, None);
                flawed.push(foreign);
                let mut swapped = right.clone();
                swapped.swap(index, (index + 1) % right.len());
                flawed.push(swapped);
            }
            for rules in flawed {
                let judgement = verdict(&rules, chain, system);
                assert!(!judgement.in_order, "{chain:?} {system:?} {rules:?}");
                assert_eq!(judgement.wanted, own);
            }
        }
    }

    #[test]
    fn the_set_of_another_agent_stays_and_neither_agent_disturbs_the_other() {
        let theirs = policy("10.50.0.0/16", "10.50.7.0/24");
        for (chain, system) in each() {
            let before = theirs.rules(chain, system);
            let judgement = verdict(&found(&before), chain, system);
            assert!(!judgement.in_order);
            let both = found(&judgement.wanted);
            assert!(before.iter().all(|rule| judgement.wanted.contains(rule)));
            assert!(verdict(&both, chain, system).in_order);
            assert!(judge(&both, &theirs, chain, system, None).in_order);
            let marks = judgement.wanted.iter().filter(|rule| rule.marked);
            assert_eq!(marks.count(), usize::from(chain == Chain::Masquerade));
        }
    }

    #[rstest]
    #[case::own_past("10.50.0.0/16", Some("10.50.0.0/16"))]
    #[case::same_network("10.244.0.0/16", None)]
    #[case::overlapping("10.0.0.0/8", None)]
    fn rules_of_the_past_go(#[case] network: &str, #[case] forget: Option<&str>) {
        let past = policy(network, "10.50.7.0/24");
        let forget = forget.map(|net| net.parse().expect("a network"));
        for (chain, system) in each() {
            let mut rules = found(&past.rules(chain, system));
            let own = ours().rules(chain, system);
            rules.extend(found(&own));
            let judgement = judge(&rules, &ours(), chain, system, forget);
            assert!(!judgement.in_order);
            assert_eq!(judgement.wanted, own);
        }
    }

    #[test]
    fn a_chain_that_is_not_wanted_ends_empty_unless_another_agent_uses_it() {
        let off = Policy {
            masquerade: false,
            forward: false,
            ..ours()
        };
        let theirs = policy("10.50.0.0/16", "10.50.7.0/24");
        for (chain, system) in each() {
            let own = ours().rules(chain, system);
            let judgement = judge(&found(&own), &off, chain, system, None);
            assert_eq!((judgement.in_order, judgement.wanted), (false, vec![]));
            assert!(judge(&[], &off, chain, system, None).in_order);
            let other = theirs.rules(chain, system);
            let judgement = judge(&found(&other), &off, chain, system, None);
            assert!(judgement.in_order);
            assert_eq!(judgement.wanted, other);
        }
    }

    #[test]
    fn a_part_of_a_set_belongs_to_nobody() {
        let theirs = policy("10.50.0.0/16", "10.50.7.0/24");
        for (chain, system) in each() {
            let own = ours().rules(chain, system);
            let mut rules = found(&own);
            rules.extend(theirs.rules(chain, system).last().copied().map(Some));
            let judgement = verdict(&rules, chain, system);
            assert_eq!((judgement.in_order, judgement.wanted), (false, own));
        }
    }

    proptest! {
        /// Whatever stands in a chain, one repair is enough.
        #[test]
        fn one_repair_is_enough(picks in prop::collection::vec(0usize..20, 0..20)) {
            for (chain, system) in each() {
                let mut pool = found(&ours().rules(chain, system));
                pool.extend(found(&policy("10.50.0.0/16", "10.50.7.0/24").rules(chain, system)));
                pool.push(None);
                let rules: Vec<_> = picks.iter().map(|pick| pool[pick % pool.len()]).collect();
                let judgement = verdict(&rules, chain, system);
                let repaired = found(&judgement.wanted);
                prop_assert!(verdict(&repaired, chain, system).in_order);
            }
        }
    }
}
