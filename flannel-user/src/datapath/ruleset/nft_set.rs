//! Sets and maps of nftables, as far as rules depend on them. Pure.

use super::{
    attribute::{attribute, attributes, number, number_of, text},
    pods::Pods,
};

const TABLE: u16 = 1;
const NAME: u16 = 2;
const FLAGS: u16 = 3;
const DATA_TYPE: u16 = 6;
const OBJECT_TYPE: u16 = 15;

const FLAG_INTERVAL: u32 = 0x04;
/// Packets add to it, or its elements keep state.
const FLAG_EVAL: u32 = 0x20;
const DATA_VERDICT: u32 = 0xffff_ff00;

const ELEMENTS: u16 = 3;
const KEY: u16 = 1;
const DATA: u16 = 2;
const ELEMENT_FLAGS: u16 = 3;
const KEY_END: u16 = 10;
const ELEMENT_CATCHALL: u32 = 2;
const VALUE: u16 = 1;
const VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;

/// A set or map of a table.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Set {
    /// Packets change it.
    pub(super) is_dynamic: bool,
    /// What it maps to is a verdict.
    pub(super) has_verdicts: bool,
    /// Kind of the objects that it maps to.
    pub(super) objects: Option<u32>,
    /// Keys may be ends of intervals.
    is_interval: bool,
    /// Where the verdicts of a map lead.
    jumps: Vec<Jump>,
}

/// An element of a verdict map that leads to a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Jump {
    /// `None` is every key without an element.
    key: Option<Vec<u8>>,
    /// The last key of an interval of concatenated fields.
    end: Option<Vec<u8>>,
    chain: String,
}

/// Table and name of the set in a message, and the set.
pub(super) fn read(message: &[u8]) -> Option<(String, String, Set)> {
    let flags = number_of(message, FLAGS).unwrap_or(0);
    let set = Set {
        is_dynamic: flags & FLAG_EVAL != 0,
        has_verdicts: number_of(message, DATA_TYPE) == Some(DATA_VERDICT),
        objects: number_of(message, OBJECT_TYPE),
        is_interval: flags & FLAG_INTERVAL != 0,
        jumps: Vec::new(),
    };
    Some((
        text(attribute(message, TABLE)?).to_owned(),
        text(attribute(message, NAME)?).to_owned(),
        set,
    ))
}

impl Set {
    /// Takes the elements of one message.
    pub(super) fn take(&mut self, message: &[u8]) {
        let Some(elements) = attribute(message, ELEMENTS) else {
            return;
        };
        for (_, element) in attributes(elements) {
            let verdict = attribute(element, DATA).and_then(|data| attribute(data, VERDICT));
            let chain = verdict.and_then(|verdict| attribute(verdict, VERDICT_CHAIN));
            let Some(chain) = chain else { continue };
            let is_catchall = attribute(element, ELEMENT_FLAGS)
                .and_then(number)
                .is_some_and(|flags| flags & ELEMENT_CATCHALL != 0);
            let bytes = |kind| {
                let value = attribute(attribute(element, kind)?, VALUE)?;
                Some(value.to_vec())
            };
            self.jumps.push(Jump {
                key: bytes(KEY).filter(|_| !is_catchall),
                end: bytes(KEY_END),
                chain: text(chain).to_owned(),
            });
        }
    }

    /// Chains that a key may lead to in which the words at `sources` and `destinations` are
    /// addresses of pods and the one at `protocols` is TCP.
    pub(super) fn chains<'a>(
        &'a self,
        words: &'a [Word],
        pods: Pods,
    ) -> impl Iterator<Item = &'a str> {
        self.jumps
            .iter()
            .filter(move |jump| self.may_be(jump, words, pods))
            .map(|jump| jump.chain.as_str())
    }

    fn may_be(&self, jump: &Jump, words: &[Word], pods: Pods) -> bool {
        let Some(key) = &jump.key else { return true };
        // One field with intervals comes as single ends: not worth pairing them.
        if self.is_interval && jump.end.is_none() {
            return true;
        }
        let end = jump.end.as_ref().unwrap_or(key);
        words.iter().enumerate().all(|(index, word)| {
            let at = |bytes: &[u8]| {
                let bytes = bytes.get(index * 4..)?;
                Some(u32::from_be_bytes(*bytes.first_chunk()?))
            };
            match word {
                Word::Address => match (at(key), at(end)) {
                    (Some(from), Some(to)) => pods.some_between(from, to),
                    _ => true,
                },
                Word::Protocol => match (key.get(index * 4), end.get(index * 4)) {
                    (Some(from), Some(to)) => (*from..=*to).contains(&super::nft_rule::TCP),
                    _ => true,
                },
                Word::Other => true,
            }
        })
    }
}

/// What four bytes of a key are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Word {
    /// An address, unmasked, of the source or the destination.
    Address,
    /// The protocol above IP.
    Protocol,
    /// Something else.
    Other,
}

#[cfg(test)]
mod tests {
    use super::{super::attribute::append, *};

    fn nested(kind: u16, parts: &[(u16, Vec<u8>)]) -> Vec<u8> {
        let mut inner = Vec::new();
        for (kind, value) in parts {
            append(&mut inner, *kind, value);
        }
        let mut bytes = Vec::new();
        append(&mut bytes, kind, &inner);
        bytes
    }

    /// A map by destination, protocol and port, as kube-proxy has one.
    fn services() -> Set {
        let element = |key: Option<[u8; 12]>, chain: &str| {
            let mut element = match key {
                Some(key) => nested(KEY, &[(VALUE, key.to_vec())]),
                None => {
                    let mut flags = Vec::new();
                    append(&mut flags, ELEMENT_FLAGS, &ELEMENT_CATCHALL.to_be_bytes());
                    flags
                }
            };
            let chain = (VERDICT_CHAIN, format!("{chain}\0").into_bytes());
            let verdict = nested(VERDICT, &[(1, (-3_i32).to_be_bytes().to_vec()), chain]);
            append(&mut element, DATA, &verdict);
            (1, element)
        };
        let list = nested(
            ELEMENTS,
            &[
                element(Some([10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0]), "service"),
                element(Some([10, 244, 1, 2, 6, 0, 0, 0, 0, 80, 0, 0]), "pod"),
                element(Some([10, 244, 1, 2, 17, 0, 0, 0, 0, 53, 0, 0]), "dns"),
                element(None, "rest"),
            ],
        );
        let mut set = Set {
            has_verdicts: true,
            ..Set::default()
        };
        set.take(&list);
        set
    }

    #[test]
    fn a_map_by_address_leads_pods_to_their_own_chains_only() {
        let pods = Pods("10.244.0.0/16".parse().expect("a network"));
        let set = services();
        let words = [Word::Address, Word::Protocol, Word::Other];
        assert_eq!(
            set.chains(&words, pods).collect::<Vec<_>>(),
            ["pod", "rest"]
        );
        let unknown = [Word::Other; 3];
        assert_eq!(set.chains(&unknown, pods).count(), 4);
    }

    #[test]
    fn the_set_itself_is_read() {
        let mut message = Vec::new();
        append(&mut message, TABLE, b"filter\0");
        append(&mut message, NAME, b"seen\0");
        append(&mut message, FLAGS, &FLAG_EVAL.to_be_bytes());
        let (table, name, set) = read(&message).expect("a set");
        assert_eq!((table.as_str(), name.as_str()), ("filter", "seen"));
        assert!(set.is_dynamic && !set.has_verdicts);
    }
}
