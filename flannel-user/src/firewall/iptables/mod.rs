//! Firewall rules by the iptables tools (contract section 14).
//!
//! A change of a table is one run of `iptables-restore --noflush`, which the kernel takes
//! whole or not at all: a chain is emptied and filled in the same commit, so no packet meets it
//! empty. What is right already is not touched, the jump in the parent chain above all.

mod text;
mod variant;

use ipnet::Ipv4Net;
use tracing::{debug, info, warn};

use self::text::{Place, place};
pub use self::variant::Variant;
use super::{
    FirewallError,
    command::{self, CommandError},
    kernel_chains,
    rules::{Chain, Judgement, Policy, Rule, System, judge},
};

/// The rules of one agent, kept by one variant of iptables.
#[derive(Debug)]
pub struct Iptables {
    variant: Variant,
    policy: Policy,
    forget: Option<Ipv4Net>,
}

/// What a look at one chain found.
#[derive(Debug, Default, PartialEq, Eq)]
struct State {
    /// The chain's rules; `None` if there is no such chain.
    rules: Option<Vec<Option<Rule>>>,
    /// How often the parent chain jumps there.
    jumps: usize,
}

impl Iptables {
    /// Chooses the variant of this host. Rules for the network `forget`, from this agent's
    /// past, are removed by the first [`Self::apply`].
    ///
    /// # Errors
    /// No iptables is installed, or it cannot be run.
    pub async fn open(policy: Policy, forget: Option<Ipv4Net>) -> Result<Self, FirewallError> {
        let variant = variant::choose().await.map_err(|source| match source {
            CommandError::NotInstalled { .. } => FirewallError::NoTool {
                advice: "install iptables, or set \"EnableNFTables\":true in the network config",
                source,
            },
            source => FirewallError::Command(source),
        })?;
        Ok(Self::with(variant, policy, forget))
    }

    /// The same with a variant already chosen.
    #[must_use]
    pub fn with(variant: Variant, policy: Policy, forget: Option<Ipv4Net>) -> Self {
        if policy.masquerade && policy.random_fully && !variant.is_modern() {
            info!("iptables is older than 1.6.2: masquerading without --random-fully");
        }
        let policy = Policy {
            random_fully: policy.random_fully && variant.is_modern(),
            ..policy
        };
        Self {
            variant,
            policy,
            forget,
        }
    }

    /// The variant in use.
    #[must_use]
    pub fn variant(&self) -> Variant {
        self.variant
    }

    /// True if the kernel tells when rules of this variant change.
    #[must_use]
    pub fn has_events(&self) -> bool {
        self.variant.is_nft()
    }

    /// Puts in order what is not, and names it. A second call right after changes nothing.
    ///
    /// # Errors
    /// A tool failed; what it was to change is as before.
    pub async fn apply(&mut self) -> Result<Vec<Chain>, FirewallError> {
        let (masquerade, forward) = tokio::join!(
            self.apply_chain(Chain::Masquerade),
            self.apply_chain(Chain::Forward)
        );
        let changed = [(Chain::Masquerade, masquerade?), (Chain::Forward, forward?)];
        self.forget = None;
        Ok(changed
            .into_iter()
            .filter_map(|(chain, changed)| changed.then_some(chain))
            .collect())
    }

    /// True if [`Self::apply`] would change nothing.
    ///
    /// # Errors
    /// A tool failed.
    pub async fn is_in_order(&self) -> Result<bool, FirewallError> {
        for chain in Chain::ALL {
            if self.plan(chain).await?.is_some() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn apply_chain(&self, chain: Chain) -> Result<bool, FirewallError> {
        let Some(payload) = self.plan(chain).await? else {
            return Ok(false);
        };
        restore(self.variant, Family::V4, &payload).await?;
        Ok(true)
    }

    /// What must be fed to `-restore`; `None` if everything is in order.
    async fn plan(&self, chain: Chain) -> Result<Option<String>, CommandError> {
        let place = place(chain);
        let state = self.observe(&place).await?;
        let found = state.rules.as_deref().unwrap_or_default();
        let judgement = judge(found, &self.policy, chain, System::Iptables, self.forget);
        if judgement.wanted.is_empty() {
            if state == State::default() {
                return Ok(None);
            }
            let lines = list(self.variant, Family::V4, place.table, None).await?;
            return Ok(removal(place.table, &[place.name], &lines));
        }
        Ok(repair(&place, &state, &judgement))
    }

    async fn observe(&self, place: &Place) -> Result<State, CommandError> {
        if self.variant.lacks(place.table) {
            return Ok(State::default());
        }
        let listing = |chain| list(self.variant, Family::V4, place.table, Some(chain));
        let (parent, own) = tokio::join!(listing(place.parent), listing(place.name));
        let jump = place.jump();
        let jumps = parent?.iter().filter(|line| **line == jump).count();
        let own = match own {
            Ok(lines) => Some(lines),
            // The complaint about a missing chain differs from version to version, and some
            // call it "incompatible": the whole table has the answer.
            Err(error) if error.is_refusal() => {
                let all = list(self.variant, Family::V4, place.table, None).await?;
                if all.contains(&format!("-N {}", place.name)) {
                    return Err(error);
                }
                None
            }
            Err(error) => return Err(error),
        };
        let rules = own.map(|lines| {
            let rules = lines.iter().filter(|line| line.starts_with("-A "));
            rules.map(|line| place.parse(line)).collect()
        });
        Ok(State { rules, jumps })
    }
}

/// The commit that makes a chain what it should be.
fn repair(place: &Place, state: &State, judgement: &Judgement) -> Option<String> {
    let mut lines = Vec::new();
    if state.rules.is_none() || !judgement.in_order {
        // Makes the chain, or empties it.
        lines.push(format!(":{} - [0:0]", place.name));
        lines.extend(judgement.wanted.iter().map(|rule| place.line(rule)));
    }
    match state.jumps {
        0 => lines.push(place.jump()),
        // A deletion takes the first that fits: the last one stays where it is.
        jumps => {
            let superfluous = place.jump().replacen("-A", "-D", 1);
            lines.extend(std::iter::repeat_n(superfluous, jumps - 1));
        }
    }
    commit(place.table, &lines)
}

/// The commit that removes chains and every way there; `listed` is the whole table.
fn removal(table: &str, chains: &[&str], listed: &[String]) -> Option<String> {
    let present: Vec<Place> = Chain::ALL
        .map(place)
        .into_iter()
        .filter(|place| {
            chains.contains(&place.name) && listed.contains(&format!("-N {}", place.name))
        })
        .collect();
    let leads_there = |line: &&String| present.iter().any(|place| place.is_reference(line));
    let jumps = listed.iter().filter(leads_there);
    let mut lines: Vec<String> = jumps.map(|jump| jump.replacen("-A", "-D", 1)).collect();
    lines.extend(present.iter().map(|place| format!("-F {}", place.name)));
    lines.extend(present.iter().map(|place| format!("-X {}", place.name)));
    commit(table, &lines)
}

fn commit(table: &str, lines: &[String]) -> Option<String> {
    (!lines.is_empty()).then(|| format!("*{table}\n{}\nCOMMIT\n", lines.join("\n")))
}

/// Which addresses a tool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Self::V4 => kernel_chains::IP,
            Self::V6 => kernel_chains::IP6,
        }
    }
}

fn program(variant: Variant, family: Family, suffix: &str) -> String {
    let program = variant.program();
    match family {
        Family::V4 => format!("{program}{suffix}"),
        Family::V6 => format!("ip6{}{suffix}", program.trim_start_matches("ip")),
    }
}

/// The lines that `-S` prints, for one chain or a whole table.
async fn list(
    variant: Variant,
    family: Family,
    table: &str,
    chain: Option<&str>,
) -> Result<Vec<String>, CommandError> {
    let mut args = vec!["-w", "-t", table, "-S"];
    args.extend(chain);
    let text = command::run(&program(variant, family, ""), &args, "").await?;
    Ok(text
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect())
}

async fn restore(variant: Variant, family: Family, payload: &str) -> Result<(), CommandError> {
    let program = program(variant, family, "-restore");
    let args: &[&str] = if variant.is_modern() {
        &["--noflush", "--wait"]
    } else {
        &["--noflush"]
    };
    debug!(program, payload, "firewall change");
    command::run(&program, args, payload).await.map(drop)
}

/// Removes flannel's chains and the jumps to them from every variant but `except`, for both
/// families and in both tables (the original put `FLANNEL-FWD` into `nat` as well).
/// Returns how many tables were changed. A program that is not installed has left nothing.
///
/// # Errors
/// A tool failed; the other tables were cleaned all the same.
pub(super) async fn clean_except(except: Option<Variant>) -> Result<usize, FirewallError> {
    let mut cleaned = 0;
    let mut failure = None;
    let is_kept = |variant: Variant| except.is_some_and(|kept| kept.is_nft() == variant.is_nft());
    for variant in [Variant::Nft, Variant::Legacy] {
        if is_kept(variant) {
            continue;
        }
        for (family, table) in places_of(variant) {
            match clean_table(variant, family, table).await {
                Ok(changed) => cleaned += usize::from(changed),
                Err(error) if error.is_not_installed() => {
                    warn!(%error, table, "so rules of an earlier run cannot be looked for");
                }
                Err(error) => failure = Some(error),
            }
        }
    }
    failure.map_or(Ok(cleaned), |error| Err(error.into()))
}

/// The tables in which `variant` may have left chains of flannel's. The kernel tells at once,
/// while the tools would have to list every rule of every table.
fn places_of(variant: Variant) -> Vec<(Family, &'static str)> {
    let chains = if variant.is_nft() {
        kernel_chains::chains()
    } else {
        Vec::new()
    };
    let holds_ours = |family: Family, table: &str| match (variant.is_nft(), family) {
        (true, family) => chains.iter().any(|chain| {
            chain.family == family.number()
                && chain.table == table
                && Chain::ALL
                    .map(|ours| place(ours).name)
                    .contains(&&chain.chain[..])
        }),
        (false, Family::V4) => !variant.lacks(table),
        (false, Family::V6) => !variant.lacks_v6(table),
    };
    let tables = [Family::V4, Family::V6]
        .into_iter()
        .flat_map(|family| ["nat", "filter"].map(|table| (family, table)));
    tables
        .filter(|(family, table)| holds_ours(*family, table))
        .collect()
}

async fn clean_table(variant: Variant, family: Family, table: &str) -> Result<bool, CommandError> {
    let listed = list(variant, family, table, None).await?;
    let names = Chain::ALL.map(|chain| place(chain).name);
    let Some(payload) = removal(table, &names, &listed) else {
        return Ok(false);
    };
    restore(variant, family, &payload).await?;
    info!(
        ?variant,
        ?family,
        table,
        "removed flannel's rules: another packet filter has them now"
    );
    Ok(true)
}

#[cfg(test)]
mod tests;
