//! Classes of connections in the flows document, and as text.

use std::{
    collections::BTreeSet,
    fmt::{self, Write as _},
    net::Ipv4Addr,
};

use flannel_ebpf::reason::Reason;
use serde::{Deserialize, Serialize};

use super::flows::Filter;

/// Who opens the connections of a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    /// The pod of this node.
    Pod,
    /// The peer.
    Peer,
}

/// Connections that are alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClassRow {
    /// The pod of this node.
    pub pod: Ipv4Addr,
    /// The pod of another node.
    pub peer: Ipv4Addr,
    /// Port of whoever is the server.
    pub port: u16,
    /// Who is the client.
    pub client: Client,
    /// Connections that have opened without asking.
    pub opened: u64,
    /// Seconds since the class was made.
    pub age_seconds: f64,
    /// Seconds since one of its SYNs last passed the stack.
    pub asked_seconds: f64,
    /// Why its next SYN takes the stack: label of an outcome.
    pub closed: Option<String>,
}

impl ClassRow {
    /// Is it asked for?
    #[must_use]
    pub fn is_taken(&self, filter: &Filter) -> bool {
        filter.pod.is_none_or(|pod| pod == self.pod)
            && filter.peer.is_none_or(|peer| peer == self.peer)
            && filter.port.is_none_or(|port| port == self.port)
    }
}

/// The table of classes, and what its words mean.
///
/// # Errors
/// Only what the writer itself fails with.
pub(super) fn render(out: &mut String, classes: &[ClassRow]) -> fmt::Result {
    if classes.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "\n{:<15}  {:<15}  {:>5}  {:<6}  {:>10}  {:>8}  {:>8}  NEXT SYN",
        "CLASS OF POD", "PEER", "PORT", "CLIENT", "OPENED", "AGE", "ASKED"
    )?;
    for class in classes {
        let client = match class.client {
            Client::Pod => "pod",
            Client::Peer => "peer",
        };
        let next = class
            .closed
            .as_deref()
            .map_or_else(|| "fast".to_owned(), |reason| format!("kernel:{reason}"));
        writeln!(
            out,
            "{:<15}  {:<15}  {:>5}  {client:<6}  {:>10}  {:>7.1}s  {:>7.1}s  {next}",
            class.pod.to_string(),
            class.peer.to_string(),
            class.port,
            class.opened,
            class.age_seconds,
            class.asked_seconds
        )?;
    }
    let words: BTreeSet<&str> = classes
        .iter()
        .filter_map(|class| class.closed.as_deref())
        .collect();
    if !words.is_empty() {
        out.push('\n');
    }
    for word in words {
        let known = Reason::ALL.iter().find(|reason| reason.label() == word);
        writeln!(
            out,
            "kernel:{word}  {}",
            known.map_or("", |reason| reason.text())
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(closed: Option<&str>) -> ClassRow {
        ClassRow {
            pod: Ipv4Addr::new(10, 1, 1, 2),
            peer: Ipv4Addr::new(10, 1, 2, 2),
            port: 80,
            client: Client::Pod,
            opened: 7,
            age_seconds: 12.0,
            asked_seconds: 0.5,
            closed: closed.map(str::to_owned),
        }
    }

    #[test]
    fn the_table_says_why_a_class_is_closed() {
        let mut text = String::new();
        render(&mut text, &[row(None), row(Some("own_changed"))]).expect("text");
        assert!(text.contains("  fast\n"), "{text}");
        assert!(
            text.contains("kernel:own_changed  a SYN took the stack"),
            "{text}"
        );
        let mut text = String::new();
        render(&mut text, &[]).expect("text");
        assert!(text.is_empty());
    }

    #[test]
    fn filters_take_classes_by_their_ends() {
        let filter = |port| Filter {
            port: Some(port),
            ..Filter::default()
        };
        assert!(row(None).is_taken(&Filter::default()));
        assert!(row(None).is_taken(&filter(80)));
        assert!(!row(None).is_taken(&filter(81)));
    }
}
