//! Firewall rules by nft (contract section 15).
//!
//! A change is one transaction: tables and chains are added, chains flushed and filled, or nothing
//! at all happens. An accept in our table does not override a drop in another table of the same
//! hook; that is how nftables works.

mod text;

use ipnet::Ipv4Net;
use serde_json::Value;
use tracing::{debug, info, warn};

use self::text::{TABLE_V4, TABLE_V6, add_tables, place};
use super::{
    FirewallError,
    command::{self, CommandError},
    kernel_chains,
    rules::{Chain, Policy, Rule, System, judge},
};

/// The rules of one agent, kept by nft.
#[derive(Debug)]
pub struct Nftables {
    policy: Policy,
    forget: Option<Ipv4Net>,
    /// This kernel and this nft keep comments on tables and chains.
    comments: bool,
    /// What is supported was found out.
    probed: bool,
}

/// What a look at the tables found.
#[derive(Debug, Default)]
struct State {
    tables: bool,
    chains: Vec<Value>,
    rules: Vec<(String, Option<Rule>)>,
}

impl Nftables {
    /// Rules for the network `forget`, from this agent's past, are removed by the first
    /// [`Self::apply`].
    #[must_use]
    pub fn new(policy: Policy, forget: Option<Ipv4Net>) -> Self {
        Self {
            policy,
            forget,
            comments: true,
            probed: false,
        }
    }

    /// Puts in order what is not, and names it. A second call right after changes nothing.
    ///
    /// # Errors
    /// nft failed; everything is as before.
    pub async fn apply(&mut self) -> Result<Vec<Chain>, FirewallError> {
        let state = observe().await?;
        let (script, mut changed) = self.plan(&state);
        if !script.is_empty()
            && let Err(error) = run_script(&script).await
        {
            // The kernel took nothing of it. What does it not support?
            if self.probed || !error.is_refusal() {
                return Err(with_advice(error));
            }
            self.probe().await;
            let script;
            (script, changed) = self.plan(&state);
            run_script(&script).await?;
        }
        self.forget = None;
        Ok(changed)
    }

    /// True if [`Self::apply`] would change nothing.
    ///
    /// # Errors
    /// nft failed.
    pub async fn is_in_order(&self) -> Result<bool, FirewallError> {
        Ok(self.plan(&observe().await?).0.is_empty())
    }

    /// Finds out by dry runs what a refused transaction could not have.
    async fn probe(&mut self) {
        self.probed = true;
        self.comments = is_accepted(&add_tables(true)).await;
        let chain = place(Chain::Masquerade);
        let tables = add_tables(false) + &chain.add(false);
        let rule = chain.name;
        self.policy.random_fully = self.policy.random_fully
            && is_accepted(&format!(
                "{tables}add rule ip {TABLE_V4} {rule} masquerade fully-random\n"
            ))
            .await;
        info!(
            comments = self.comments,
            fully_random = self.policy.random_fully,
            "what nft and the kernel support"
        );
    }

    /// The transaction that puts everything in order, and the chains it changes.
    fn plan(&self, state: &State) -> (String, Vec<Chain>) {
        let mut script = String::new();
        let mut changed = Vec::new();
        for chain in Chain::ALL {
            let place = place(chain);
            let present = state.chains.iter().find(|it| it["name"] == place.name);
            let rules = state.rules.iter().filter(|(name, _)| *name == place.name);
            let found: Vec<Option<Rule>> = rules.map(|(_, rule)| *rule).collect();
            let judgement = judge(&found, &self.policy, chain, System::Nftables, self.forget);
            let fits = present.is_some_and(|present| place.fits(present));
            let in_order = match present {
                Some(_) => !judgement.wanted.is_empty() && fits && judgement.in_order,
                None => judgement.wanted.is_empty(),
            };
            if in_order {
                continue;
            }
            changed.push(chain);
            if present.is_some() && (!fits || judgement.wanted.is_empty()) {
                script += &(place.flush() + &place.delete());
            }
            if !judgement.wanted.is_empty() {
                script += &(place.add(self.comments) + &place.flush());
                script.extend(judgement.wanted.iter().map(|rule| place.add_rule(rule)));
            }
        }
        if !script.is_empty() || !state.tables {
            script.insert_str(0, &add_tables(self.comments));
        }
        (script, changed)
    }
}

async fn nft(args: &[&str], input: &str) -> Result<String, CommandError> {
    command::run("nft", args, input).await
}

async fn run_script(script: &str) -> Result<(), CommandError> {
    debug!(script, "firewall change");
    nft(&["-f", "-"], script).await.map(drop)
}

async fn is_accepted(script: &str) -> bool {
    nft(&["--check", "-f", "-"], script).await.is_ok()
}

/// The objects under `kind` in what nft lists.
fn objects<'a>(listing: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    let all = listing["nftables"].as_array().into_iter().flatten();
    all.filter_map(move |object| object.get(kind))
}

fn with_advice(source: CommandError) -> FirewallError {
    match source {
        CommandError::NotInstalled { .. } => FirewallError::NoTool {
            advice: "install nftables, or remove EnableNFTables from the network config",
            source,
        },
        source => FirewallError::Command(source),
    }
}

async fn list(what: &[&str]) -> Result<Value, FirewallError> {
    let args = [&["-j", "list"], what].concat();
    let text = nft(&args, "").await.map_err(with_advice)?;
    serde_json::from_str(&text).map_err(|source| FirewallError::Unreadable {
        command: format!("nft {}", args.join(" ")),
        source,
    })
}

/// Families and names of the tables of ours that exist.
fn our_tables() -> Vec<(&'static str, &'static str)> {
    let present = kernel_chains::tables();
    let exists = |family, name: &str| {
        present
            .iter()
            .any(|table| table.family == family && table.table == name)
    };
    [
        (kernel_chains::IP, "ip", TABLE_V4),
        (kernel_chains::IP6, "ip6", TABLE_V6),
    ]
    .into_iter()
    .filter(|(family, _, name)| exists(*family, name))
    .map(|(_, family, name)| (family, name))
    .collect()
}

async fn observe() -> Result<State, FirewallError> {
    let tables = our_tables();
    let mut state = State {
        tables: tables.len() == 2,
        ..State::default()
    };
    if tables.contains(&("ip", TABLE_V4)) {
        let listing = list(&["table", "ip", TABLE_V4]).await?;
        state.chains = objects(&listing, "chain").cloned().collect();
        state.rules = objects(&listing, "rule")
            .map(|rule| {
                let chain = rule["chain"].as_str().unwrap_or_default();
                (chain.to_owned(), text::parse(&rule["expr"]))
            })
            .collect();
    }
    Ok(state)
}

/// Deletes both tables and returns how many there were.
///
/// # Errors
/// nft failed.
pub(super) async fn clean() -> Result<usize, FirewallError> {
    let tables = our_tables();
    let deletions = tables
        .iter()
        .map(|(family, name)| format!("delete table {family} {name}\n"));
    let script: String = deletions.collect();
    if !script.is_empty() {
        match run_script(&script).await {
            Err(error) if error.is_not_installed() => {
                warn!(%error, "so flannel's nftables tables of an earlier run cannot be removed");
                return Ok(0);
            }
            result => result?,
        }
        info!("removed flannel's nftables tables: iptables has the rules now");
    }
    Ok(tables.len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn kept() -> Nftables {
        let policy = Policy {
            network: "10.244.0.0/16".parse().expect("a network"),
            subnet: "10.244.1.0/24".parse().expect("a network"),
            masquerade: false,
            random_fully: true,
            forward: true,
        };
        Nftables::new(policy, None)
    }

    fn right() -> State {
        let rules = kept().policy.rules(Chain::Forward, System::Nftables);
        State {
            tables: true,
            chains: vec![
                json!({"name": "forward", "type": "filter", "hook": "forward", "prio": 0, "policy": "accept"}),
            ],
            rules: rules
                .into_iter()
                .map(|rule| ("forward".to_owned(), Some(rule)))
                .collect(),
        }
    }

    #[test]
    fn what_is_in_order_is_not_touched() {
        assert_eq!(kept().plan(&right()), (String::new(), vec![]));
    }

    #[test]
    fn one_transaction_makes_everything() {
        let (script, changed) = kept().plan(&State::default());
        assert_eq!(changed, [Chain::Forward]);
        let verbs: Vec<String> = script
            .lines()
            .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect();
        assert_eq!(
            verbs,
            [
                "add table",
                "add table",
                "add chain",
                "flush chain",
                "add rule",
                "add rule"
            ]
        );
    }

    #[test]
    fn missing_tables_are_made_even_if_no_chain_is_wanted() {
        let mut kept = kept();
        kept.policy.forward = false;
        let (script, changed) = kept.plan(&State::default());
        assert_eq!((script, changed), (add_tables(true), vec![]));
    }

    #[test]
    fn a_chain_on_the_wrong_hook_is_made_anew_and_one_not_wanted_goes() {
        let mut state = right();
        state.chains[0]["prio"] = json!(5);
        let (script, _) = kept().plan(&state);
        let gone = "flush chain ip flannel-ipv4 forward\ndelete chain ip flannel-ipv4 forward\n";
        assert!(script.contains(&format!("{gone}add chain")), "{script}");

        let mut kept = kept();
        kept.policy.forward = false;
        let (script, changed) = kept.plan(&right());
        assert!(script.ends_with(gone), "{script}");
        assert_eq!(changed, [Chain::Forward]);
    }
}
