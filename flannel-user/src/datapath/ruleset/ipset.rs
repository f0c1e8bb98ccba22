//! The types of ipsets: whether an element holds a port is not in the rule that asks.

use std::{collections::BTreeMap, io};

use super::{
    attribute::{append, attribute, text},
    nft::Netfilter,
};

const SUBSYSTEM: u8 = 6;
const COMMAND_LIST: u8 = 7;
const PROTOCOL: u16 = 1;
const PROTOCOL_VERSION: u8 = 7;
const NAME: u16 = 2;
const TYPE: u16 = 3;
const FLAGS: u16 = 6;
/// Without the elements.
const LIST_HEADERS: u32 = 1 << 2;
const INDEX: u16 = 11;

/// Sets by index and by name: what each dimension of an element is.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Sets {
    by_index: BTreeMap<u16, String>,
    by_name: BTreeMap<String, String>,
}

impl Sets {
    /// The sets of this network namespace; none without the kernel's part.
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn read(netfilter: &mut Netfilter) -> io::Result<Self> {
        let mut request = Vec::new();
        append(&mut request, PROTOCOL, &[PROTOCOL_VERSION]);
        append(&mut request, FLAGS, &LIST_HEADERS.to_be_bytes());
        let mut sets = Self::default();
        let outcome = netfilter.dump(SUBSYSTEM, COMMAND_LIST, 2, &request, |_, message| {
            sets.take(message);
        });
        match outcome {
            Err(error) if super::nft::is_absent(&error) => Ok(Self::default()),
            outcome => outcome.map(|_| sets),
        }
    }

    fn take(&mut self, message: &[u8]) {
        let (Some(name), Some(kind)) = (attribute(message, NAME), attribute(message, TYPE)) else {
            return;
        };
        let kind = text(kind).to_owned();
        if let Some(index) = attribute(message, INDEX).and_then(|index| index.first_chunk()) {
            self.by_index
                .insert(u16::from_be_bytes(*index), kind.clone());
        }
        self.by_name.insert(text(name).to_owned(), kind);
    }

    /// Does a match with these directions ask for the client's port? What is not known does.
    pub(super) fn asks_for_source_port(&self, index: u16, sources: &[bool]) -> bool {
        asks(self.by_index.get(&index), sources)
    }

    /// The same for a set by its name, with directions as iptables writes them: `src,dst`.
    pub(super) fn named_asks_for_source_port(&self, name: &str, directions: &str) -> bool {
        let sources: Vec<bool> = directions.split(',').map(|one| one == "src").collect();
        asks(self.by_name.get(name), &sources)
    }
}

fn asks(kind: Option<&String>, sources: &[bool]) -> bool {
    let Some((_, dimensions)) = kind.and_then(|kind| kind.split_once(':')) else {
        return sources.contains(&true);
    };
    let mut dimensions = dimensions.split(',');
    sources.iter().any(|source| match dimensions.next() {
        Some(dimension) => *source && matches!(dimension, "port" | "set"),
        None => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets() -> Sets {
        let mut sets = Sets::default();
        for (index, name, kind) in [
            (1_u16, "nets", "hash:net"),
            (2, "ends", "hash:ip,port"),
            (3, "loop", "hash:ip,port,ip"),
            (4, "ports", "bitmap:port"),
            (5, "lists", "list:set"),
        ] {
            let mut message = Vec::new();
            append(&mut message, NAME, format!("{name}\0").as_bytes());
            append(&mut message, TYPE, format!("{kind}\0").as_bytes());
            append(&mut message, INDEX, &index.to_be_bytes());
            sets.take(&message);
        }
        sets
    }

    #[test]
    fn only_a_port_of_the_source_matters() {
        let sets = sets();
        for (name, directions, expected) in [
            ("nets", "src", false),
            ("ends", "src,dst", false),
            ("ends", "dst,dst", false),
            ("ends", "dst,src", true),
            ("loop", "dst,dst,src", false),
            ("loop", "dst,src,dst", true),
            ("ports", "src", true),
            ("ports", "dst", false),
            ("lists", "src", true),
            ("unknown", "src", true),
            ("unknown", "dst", false),
        ] {
            assert_eq!(
                sets.named_asks_for_source_port(name, directions),
                expected,
                "{name} {directions}"
            );
        }
        assert!(sets.asks_for_source_port(2, &[false, true]));
        assert!(!sets.asks_for_source_port(3, &[false, false, true]));
    }
}
