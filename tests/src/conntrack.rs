//! What connection tracking of a node and the sockets of a pod have left over.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use crate::namespace::Namespace;

/// How many there are of each kind.
pub type Census = BTreeMap<String, u64>;

/// Entries of connection tracking by protocol and state, e.g. `tcp TIME_WAIT`.
/// UDP has no states but whether it is `ASSURED`, `UNREPLIED` or neither.
///
/// # Errors
/// When the kernel shows no table.
pub fn census(namespace: &Namespace) -> Result<Census> {
    let mut census = Census::new();
    for line in entries(namespace)?.lines() {
        *census.entry(kind(line)).or_default() += 1;
    }
    Ok(census)
}

/// The TCP connections that it believes to be alive, by state.
///
/// # Errors
/// As [`census`].
pub fn alive(namespace: &Namespace) -> Result<Census> {
    let mut census = census(namespace)?;
    census.retain(|kind, _| is_alive(kind));
    Ok(census)
}

/// The same as the kernel shows them, without those of which both ends have sent their FIN.
///
/// # Errors
/// As [`census`].
pub fn open(namespace: &Namespace) -> Result<Vec<String>> {
    let text = entries(namespace)?;
    let open = text.lines().filter(|line| {
        let kind = kind(line);
        is_alive(&kind) && kind != "tcp LAST_ACK"
    });
    Ok(open.map(str::to_owned).collect())
}

fn is_alive(kind: &str) -> bool {
    kind.starts_with("tcp") && !["tcp TIME_WAIT", "tcp CLOSE"].contains(&kind)
}

/// The table as text, one entry a line.
///
/// # Errors
/// As [`census`].
pub fn entries(namespace: &Namespace) -> Result<String> {
    own_file(namespace, "nf_conntrack")
}

/// A file of `/proc/net`. That name shows the process' namespace, not the thread's.
fn own_file(namespace: &Namespace, name: &str) -> Result<String> {
    namespace.read(&format!("/proc/thread-self/net/{name}"))
}

/// `ipv4 2 tcp 6 119 TIME_WAIT src=…` or `ipv4 2 udp 17 29 src=… [UNREPLIED] …`.
fn kind(line: &str) -> String {
    let mut words = line.split_whitespace().skip(2);
    let protocol = words.next().unwrap_or("?");
    let state = match protocol {
        // Protocol number, timeout, state.
        "tcp" => words.nth(2).unwrap_or("?"),
        _ if line.contains("[UNREPLIED]") => "UNREPLIED",
        _ if line.contains("[ASSURED]") => "ASSURED",
        _ => "replied",
    };
    format!("{protocol} {state}")
}

/// What connection tracking refused, since the node began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Packets of no connection, or not of their connection's state.
    pub invalid: u64,
    /// Entries that could not be made.
    pub insert_failed: u64,
    /// Packets dropped because of that or for want of memory.
    pub dropped: u64,
}

impl Refusals {
    /// Reads the counters of all CPUs.
    ///
    /// # Errors
    /// When the kernel shows none.
    pub fn now(namespace: &Namespace) -> Result<Self> {
        Self::parse(&own_file(namespace, "stat/nf_conntrack")?)
    }

    /// What came since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            invalid: self.invalid - before.invalid,
            insert_failed: self.insert_failed - before.insert_failed,
            dropped: self.dropped - before.dropped,
        }
    }

    /// A line of names, then a line of hexadecimal numbers for each CPU.
    fn parse(text: &str) -> Result<Self> {
        let mut lines = text.lines();
        let names: Vec<&str> = lines
            .next()
            .context("no names")?
            .split_whitespace()
            .collect();
        let rows = lines
            .map(|line| {
                line.split_whitespace()
                    .map(|word| Ok(u64::from_str_radix(word, 16)?))
                    .collect::<Result<Vec<_>>>()
            })
            .collect::<Result<Vec<_>>>()?;
        let sum = |name: &str| {
            let place = names.iter().position(|known| *known == name);
            let place = place.with_context(|| format!("no column {name} in:\n{text}"))?;
            Ok::<_, anyhow::Error>(rows.iter().filter_map(|row| row.get(place)).sum())
        };
        Ok(Self {
            invalid: sum("invalid")?,
            insert_failed: sum("insert_failed")?,
            dropped: sum("drop")?,
        })
    }
}

/// TCP sockets by state, as `ss` names them.
///
/// # Errors
/// When the kernel's list cannot be read.
pub fn sockets(namespace: &Namespace) -> Result<Census> {
    let mut census = Census::new();
    for line in own_file(namespace, "tcp")?.lines().skip(1) {
        let code = line.split_whitespace().nth(3).context("a short line")?;
        *census.entry(state(code)?.to_owned()).or_default() += 1;
    }
    Ok(census)
}

fn state(code: &str) -> Result<&'static str> {
    const STATES: [&str; 12] = [
        "ESTABLISHED",
        "SYN_SENT",
        "SYN_RECV",
        "FIN_WAIT1",
        "FIN_WAIT2",
        "TIME_WAIT",
        "CLOSE",
        "CLOSE_WAIT",
        "LAST_ACK",
        "LISTEN",
        "CLOSING",
        "NEW_SYN_RECV",
    ];
    let number = usize::from_str_radix(code, 16)?;
    STATES
        .get(number.wrapping_sub(1))
        .copied()
        .with_context(|| format!("unknown socket state {code}"))
}

/// Demands that two censuses are alike: each kind differs by at most one in a
/// hundred of all, and by no more than `few` where there are few.
///
/// # Errors
/// Names the kind.
pub fn check_alike(what: &str, reference: &Census, found: &Census, few: u64) -> Result<()> {
    let all: u64 = reference.values().sum();
    let margin = few.max(all / 100);
    for kind in reference.keys().chain(found.keys()) {
        let count = |census: &Census| census.get(kind).copied().unwrap_or(0);
        let (one, other) = (count(reference), count(found));
        ensure!(
            one.abs_diff(other) <= margin,
            "{what}: {other} {kind} instead of {one} ± {margin}: {found:?} instead of {reference:?}"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_told_apart() {
        for (line, wanted) in [
            (
                "ipv4     2 tcp      6 117 TIME_WAIT src=10.244.1.2 dst=10.96.0.10 sport=1 dport=2 src=10.244.2.2 dst=10.244.1.2 sport=2 dport=1 [ASSURED] mark=0 zone=0 use=2",
                "tcp TIME_WAIT",
            ),
            (
                "ipv4     2 udp      17 29 src=1.1.1.1 dst=2.2.2.2 sport=1 dport=2 [UNREPLIED] src=2.2.2.2 dst=1.1.1.1 sport=2 dport=1 mark=0 zone=0 use=2",
                "udp UNREPLIED",
            ),
            (
                "ipv4     2 icmp     1 29 src=1.1.1.1 dst=2.2.2.2 type=8 code=0 id=1 src=2.2.2.2 dst=1.1.1.1 type=0 code=0 id=1 mark=0 zone=0 use=2",
                "icmp replied",
            ),
        ] {
            assert_eq!(kind(line), wanted);
        }
    }

    #[test]
    fn counters_of_all_cpus_are_added() {
        let text = "entries  searched found new invalid ignore delete delete_list insert insert_failed drop early_drop\n\
                    0000000a  00000000 0 0 00000010 0 0 0 0 00000001 00000000 0\n\
                    0000000a  00000000 0 0 00000001 0 0 0 0 00000000 00000002 0\n";
        let refusals = Refusals::parse(text).expect("a table");
        assert_eq!(
            (refusals.invalid, refusals.insert_failed, refusals.dropped),
            (17, 1, 2)
        );
    }

    #[test]
    fn one_in_a_hundred_is_alike() {
        let census = |waiting| Census::from([("tcp TIME_WAIT".to_owned(), waiting)]);
        assert!(check_alike("a", &census(1000), &census(990), 2).is_ok());
        assert!(check_alike("a", &census(1000), &census(989), 2).is_err());
        let mut other = census(1000);
        other.insert("tcp ESTABLISHED".to_owned(), 11);
        assert!(check_alike("a", &census(1000), &other, 2).is_err());
    }
}
