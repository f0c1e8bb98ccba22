//! Which of the two kernel interfaces iptables speaks here: legacy or nf_tables.
//!
//! Both exist side by side and both filter. flannel's image picks the one in which it finds the
//! kubelet's chains; so do we, and then by what else there is to go by.

use std::{cmp::Ordering, path::Path};

use tracing::{debug, info};

use crate::firewall::{
    command::{self, CommandError},
    kernel_chains,
};

/// Chains that the kubelet makes in the table `mangle`, for exactly this purpose.
const KUBELET_CHAINS: [&str; 2] = ["KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"];

/// Tables that are loaded in the legacy interface, one name a line.
/// By thread, because a test has a network namespace per thread.
const LEGACY_TABLES: &str = "/proc/thread-self/net/ip_tables_names";

const LEGACY_TABLES_V6: &str = "/proc/thread-self/net/ip6_tables_names";

/// The first iptables that can make source ports fully random, and wait for its lock in
/// `-restore`.
const MODERN: (u32, u32, u32) = (1, 6, 2);

/// A set of iptables programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// `iptables-nft`: rules live in nftables.
    Nft,
    /// `iptables-legacy`: rules live in ip_tables.
    Legacy,
    /// Just `iptables`: an installation from before there were two, or with one only.
    Plain {
        /// It is at least 1.6.2.
        modern: bool,
        /// It speaks nf_tables.
        nft: bool,
    },
}

impl Variant {
    /// Program name without `-save` or `-restore`, for IPv4.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
            Self::Plain { .. } => "iptables",
        }
    }

    /// It knows `MASQUERADE --random-fully`, and `-restore --wait`.
    pub(super) fn is_modern(self) -> bool {
        // The names with a suffix came with 1.8.
        !matches!(self, Self::Plain { modern: false, .. })
    }

    /// Its rules live in nftables, which tells about changes.
    pub(super) fn is_nft(self) -> bool {
        matches!(self, Self::Nft | Self::Plain { nft: true, .. })
    }

    /// `table` does not exist for this variant and IPv4: asking the tool would only load modules.
    pub(super) fn lacks(self, table: &str) -> bool {
        !self.is_nft() && !is_loaded(Path::new(LEGACY_TABLES), table)
    }

    /// The same for IPv6.
    pub(super) fn lacks_v6(self, table: &str) -> bool {
        !self.is_nft() && !is_loaded(Path::new(LEGACY_TABLES_V6), table)
    }
}

/// Without the file the kernel has no legacy interface loaded.
fn is_loaded(names: &Path, table: &str) -> bool {
    std::fs::read_to_string(names).is_ok_and(|text| text.lines().any(|line| line == table))
}

/// What is known about one variant: the rules it holds and whether the kubelet uses it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Holds {
    kubelet: bool,
    rules: usize,
}

/// Chooses the variant for this host.
///
/// # Errors
/// No iptables is installed, or it cannot be run.
pub(super) async fn choose() -> Result<Variant, CommandError> {
    let (nft, legacy) = tokio::join!(look(Variant::Nft), look(Variant::Legacy));
    let (nft, legacy) = (nft?, legacy?);
    let (chosen, because) = match preferred(nft, legacy) {
        Some(chosen) => chosen,
        None => (
            default(nft.is_some(), legacy.is_some()).await?,
            "it is this host's default",
        ),
    };
    info!(variant = ?chosen, because, "iptables");
    Ok(chosen)
}

/// What the rules on this host speak for; `None` on a draw.
fn preferred(nft: Option<Holds>, legacy: Option<Holds>) -> Option<(Variant, &'static str)> {
    const KUBELET: &str = "the kubelet's chains are in it";
    const RULES: &str = "most rules are in it";
    let (nft, legacy) = (nft.unwrap_or_default(), legacy.unwrap_or_default());
    if nft.kubelet || legacy.kubelet {
        let variant = if nft.kubelet {
            Variant::Nft
        } else {
            Variant::Legacy
        };
        return Some((variant, KUBELET));
    }
    match legacy.rules.cmp(&nft.rules) {
        Ordering::Greater => Some((Variant::Legacy, RULES)),
        Ordering::Less => Some((Variant::Nft, RULES)),
        Ordering::Equal => None,
    }
}

/// `None` if its programs are not installed. One run of a tool where that is enough.
async fn look(variant: Variant) -> Result<Option<Holds>, CommandError> {
    let program = format!("{}-save", variant.program());
    let kubelet = variant.is_nft() && kubelet_uses_nft();
    // `--version` asks the kernel for nothing, but tells that the program is there.
    let question: &[&str] = match (variant.is_nft(), variant.lacks("mangle")) {
        (true, _) if !kubelet => &[],
        (true, _) | (false, true) => &["--version"],
        (false, false) => &["-t", "mangle"],
    };
    let saved = match command::run(&program, question, "").await {
        Ok(saved) => saved,
        Err(error) if error.is_not_installed() => return Ok(None),
        Err(error) if error.is_refusal() => {
            debug!(%error, "iptables variant is not usable");
            String::new()
        }
        Err(error) => return Err(error),
    };
    let kubelet = kubelet || has_kubelet_chain(&saved);
    let whole = if kubelet || variant.is_nft() || !legacy_is_loaded() {
        saved
    } else {
        command::run(&program, &[], "").await.unwrap_or_default()
    };
    Ok(Some(Holds {
        kubelet,
        rules: whole.lines().filter(|line| line.starts_with("-A ")).count(),
    }))
}

fn legacy_is_loaded() -> bool {
    std::fs::read_to_string(LEGACY_TABLES).is_ok_and(|names| !names.trim().is_empty())
}

fn has_kubelet_chain(saved: &str) -> bool {
    let chains = saved.lines().filter_map(|line| line.strip_prefix(':'));
    chains
        .filter_map(|chain| chain.split(' ').next())
        .any(|name| KUBELET_CHAINS.contains(&name))
}

/// The same for nftables, of which the kernel itself can tell.
fn kubelet_uses_nft() -> bool {
    kernel_chains::chains().iter().any(|chain| {
        chain.family == kernel_chains::IP
            && chain.table == "mangle"
            && KUBELET_CHAINS.contains(&&chain.chain[..])
    })
}

/// Nothing to go by but what `iptables` means on this host.
async fn default(nft: bool, legacy: bool) -> Result<Variant, CommandError> {
    match command::run("iptables", &["--version"], "").await {
        Ok(text) if is_nft(&text) && nft => Ok(Variant::Nft),
        Ok(text) if !is_nft(&text) && legacy => Ok(Variant::Legacy),
        Ok(text) => Ok(Variant::Plain {
            modern: version(&text).is_none_or(|version| version >= MODERN),
            nft: is_nft(&text),
        }),
        Err(_) if nft => Ok(Variant::Nft),
        Err(_) if legacy => Ok(Variant::Legacy),
        Err(error) => Err(error),
    }
}

fn is_nft(version: &str) -> bool {
    version.contains("(nf_tables)")
}

/// `iptables v1.8.9 (nf_tables)` → 1, 8, 9.
fn version(text: &str) -> Option<(u32, u32, u32)> {
    let word = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix('v'))?;
    let mut parts = word.split('.').map(|part| part.parse().ok());
    Some((
        parts.next()??,
        parts.next()??,
        parts.next().flatten().unwrap_or(0),
    ))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("iptables v1.8.9 (nf_tables)\n", Some((1, 8, 9)), true)]
    #[case("iptables v1.8.4 (legacy)", Some((1, 8, 4)), false)]
    #[case("iptables v1.6.1", Some((1, 6, 1)), false)]
    #[case("iptables v1.4", Some((1, 4, 0)), false)]
    #[case("iptables", None, false)]
    fn versions_are_read(
        #[case] text: &str,
        #[case] expected: Option<(u32, u32, u32)>,
        #[case] nft: bool,
    ) {
        assert_eq!(version(text), expected);
        assert_eq!(is_nft(text), nft);
    }

    #[test]
    fn contract_14_1_random_ports_need_1_6_2() {
        assert!(version("iptables v1.6.2") >= Some(MODERN));
        assert!(version("iptables v1.6.1") < Some(MODERN));
        let old = Variant::Plain {
            modern: false,
            nft: false,
        };
        assert!(!old.is_modern() && Variant::Legacy.is_modern());
    }

    #[test]
    fn contract_14_the_kubelets_variant_wins_then_the_one_in_use() {
        let holds = |kubelet, rules| Some(Holds { kubelet, rules });
        let chosen = |nft, legacy| preferred(nft, legacy).map(|(variant, _)| variant);
        assert_eq!(chosen(holds(true, 0), holds(true, 9)), Some(Variant::Nft));
        assert_eq!(
            chosen(holds(false, 9), holds(true, 0)),
            Some(Variant::Legacy)
        );
        assert_eq!(
            chosen(holds(false, 1), holds(false, 2)),
            Some(Variant::Legacy)
        );
        assert_eq!(chosen(holds(false, 1), None), Some(Variant::Nft));
        assert_eq!(chosen(holds(false, 0), holds(false, 0)), None);
        assert_eq!(chosen(None, None), None);
    }

    #[test]
    fn the_kubelets_chains_are_known() {
        assert!(has_kubelet_chain("*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n"));
        assert!(has_kubelet_chain("*mangle\n:KUBE-IPTABLES-HINT - [0:0]\n"));
        assert!(!has_kubelet_chain("*mangle\n:KUBE-PROXY-CANARY - [0:0]\n"));
    }

    #[test]
    fn a_table_is_loaded_if_the_kernel_names_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let names = directory.path().join("names");
        assert!(!is_loaded(&names, "nat"));
        std::fs::write(&names, "mangle\nnat\n").expect("written");
        assert!(is_loaded(&names, "nat") && !is_loaded(&names, "filter"));
    }
}
