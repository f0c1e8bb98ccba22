//! One rule of nftables, followed expression by expression. Pure.
//!
//! Expressions load fields into registers and compare them. What a register holds
//! is remembered, so that a comparison that rules out TCP between pods ends the rule
//! there, and a field that a class does not hold is seen when it is loaded.

use std::collections::BTreeMap;

use super::{
    attribute::{attribute, attributes, number, number_of, text},
    held::{self, Part},
    ipset::Sets,
    judge::Rule,
    nft_field::{self, varies},
    nft_set::{Set, Word},
    pods::Pods,
    xt::{self, Meaning, UNICAST},
};

/// The protocol number of TCP.
pub(super) const TCP: u8 = 6;
const IPV4: u8 = 2;
const ETHERTYPE_IPV4: [u8; 2] = [8, 0];

const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;

/// What the rules of one family and its tables refer to.
pub(super) struct Context<'a> {
    pub(super) pods: Pods,
    /// Sets of nftables, by table and name.
    pub(super) sets: &'a BTreeMap<(String, String), Set>,
    pub(super) ipsets: &'a Sets,
}

/// What matters of the rule in this message, which belongs to `table`.
pub(super) fn read(message: &[u8], table: &str, context: &Context<'_>) -> Rule {
    let mut walk = Walk {
        context,
        table,
        registers: [Register::OTHER; 16],
        parts: Vec::new(),
        jumps: Vec::new(),
    };
    let mut excluded = false;
    if let Some(expressions) = attribute(message, RULE_EXPRESSIONS) {
        for (_, expression) in attributes(expressions) {
            let name = attribute(expression, EXPRESSION_NAME).map_or("", text);
            let data = attribute(expression, EXPRESSION_DATA).unwrap_or(&[]);
            match walk.step(name, data) {
                Meaning::Held => {}
                Meaning::Depends(part, what) => walk.parts.push((part, what)),
                Meaning::Excluded => {
                    excluded = true;
                    break;
                }
            }
        }
    }
    let mut rule = Rule {
        reasons: walk
            .parts
            .into_iter()
            .filter(|(part, _)| !excluded || *part == Part::Counts)
            .map(|(_, what)| what)
            .collect(),
        // None that stands behind the condition that excludes.
        jumps: walk.jumps,
        ..Rule::default()
    };
    rule.reasons.dedup();
    if !rule.reasons.is_empty() {
        let handle = attribute(message, RULE_HANDLE)
            .and_then(|value| Some(u64::from_be_bytes(*value.first_chunk()?)));
        rule.name = handle.map_or_else(|| "a rule".to_owned(), |handle| format!("handle {handle}"));
    }
    rule
}

/// What four bytes of a register hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Source,
    Destination,
    /// Above IP.
    Protocol,
    /// Of the address: IPv4, IPv6.
    Family,
    EtherType,
    /// Type of the destination address: unicast, local.
    DestinationType,
    State,
    Other,
}

#[derive(Debug, Clone, Copy)]
struct Register {
    field: Field,
    /// Bits of it that are there.
    mask: u32,
}

impl Register {
    const OTHER: Self = Self::whole(Field::Other);

    const fn whole(field: Field) -> Self {
        Self {
            field,
            mask: u32::MAX,
        }
    }

    /// A whole one.
    fn is_address(self) -> bool {
        matches!(self.field, Field::Source | Field::Destination) && self.mask == u32::MAX
    }
}

struct Walk<'a> {
    context: &'a Context<'a>,
    table: &'a str,
    registers: [Register; 16],
    parts: Vec<(Part, String)>,
    jumps: Vec<String>,
}

/// Position of a register among the words: 1 to 4 are sixteen bytes, those from 8 on four.
fn position(register: u32) -> Option<usize> {
    let position = match register {
        1..=4 => (register - 1) * 4,
        8..=23 => register - 8,
        _ => return None,
    };
    Some(position as usize)
}

impl Walk<'_> {
    fn step(&mut self, name: &str, data: &[u8]) -> Meaning {
        match name {
            "payload" => self.payload(data),
            "meta" => self.meta(data),
            "ct" => self.ct(data),
            "fib" => self.fib(data),
            "exthdr" => exthdr(data),
            "bitwise" => self.bitwise(data),
            "cmp" => self.compare(data),
            "range" => self.range(data),
            "lookup" => self.lookup(data),
            "immediate" => self.immediate(data),
            "byteorder" => self.load_other(number_of(data, 2)),
            "hash" => self.hash(data),
            "objref" => self.object(data),
            "match" => {
                let (name, info) = named(data);
                xt::of_match(name, info, self.context.ipsets)
            }
            "target" => {
                let (name, info) = named(data);
                xt::of_target(name, info)
            }
            "dynset" => Meaning::Depends(Part::Counts, "set that packets change".to_owned()),
            "numgen" => {
                self.load_other(number_of(data, 1));
                Meaning::Depends(Part::Counts, "numgen".to_owned())
            }
            _ => Meaning::of(held::of_expression(name), || name.to_owned()),
        }
    }

    fn load(&mut self, register: Option<u32>, field: Field) -> Meaning {
        if let Some(position) = register.and_then(position) {
            // Values are up to sixteen bytes long; fields are loaded in ascending order.
            let end = (position + 4).min(self.registers.len());
            self.registers[position..end].fill(Register::OTHER);
            self.registers[position].field = field;
        }
        Meaning::Held
    }

    fn load_other(&mut self, register: Option<u32>) -> Meaning {
        self.load(register, Field::Other)
    }

    fn payload(&mut self, data: &[u8]) -> Meaning {
        const LINK: u32 = 0;
        const NETWORK: u32 = 1;
        const TRANSPORT: u32 = 2;
        let Some(register) = number_of(data, 1) else {
            // Written, not read: what the stack changes is never bypassed.
            return Meaning::Held;
        };
        let read = |kind| number_of(data, kind);
        let (Some(base), Some(offset), Some(length)) = (read(2), read(3), read(4)) else {
            return varies("payload of unknown form");
        };
        let mut bytes = offset..offset.saturating_add(length);
        self.load_other(Some(register));
        match base {
            LINK if bytes == (12..14) => self.load(Some(register), Field::EtherType),
            NETWORK => {
                if let Some(start) = position(register) {
                    self.load_network(start, offset, length);
                }
                bytes
                    .find_map(nft_field::unheld_of_ip)
                    .map_or(Meaning::Held, varies)
            }
            TRANSPORT => bytes
                .find_map(nft_field::unheld_of_tcp)
                .map_or(Meaning::Held, varies),
            LINK => varies("link layer header"),
            _ => varies("content of packets"),
        }
    }

    /// Notes which words of the IP header went where.
    fn load_network(&mut self, start: usize, offset: u32, length: u32) {
        for (index, first) in (offset..offset.saturating_add(length))
            .step_by(4)
            .enumerate()
        {
            let left = offset + length - first;
            let Some(register) = self.registers.get_mut(start + index) else {
                return;
            };
            *register = match (first, left) {
                (9, 1) => Register::whole(Field::Protocol),
                (12 | 16, 1..) => Register {
                    field: if first == 12 {
                        Field::Source
                    } else {
                        Field::Destination
                    },
                    mask: u32::MAX << (32 - 8 * left.min(4)),
                },
                _ => Register::OTHER,
            };
        }
    }

    fn meta(&mut self, data: &[u8]) -> Meaning {
        let (Some(register), Some(key)) = (number_of(data, 1), number_of(data, 2)) else {
            // Written.
            return Meaning::Held;
        };
        let field = match key {
            1 => Field::EtherType,
            15 => Field::Family,
            16 => Field::Protocol,
            _ => Field::Other,
        };
        self.load(Some(register), field);
        nft_field::of_meta(key)
    }

    fn ct(&mut self, data: &[u8]) -> Meaning {
        let (Some(register), Some(key)) = (number_of(data, 1), number_of(data, 2)) else {
            return Meaning::Held;
        };
        let direction = attribute(data, 3).and_then(|value| value.first().copied());
        let field = if key == 0 { Field::State } else { Field::Other };
        self.load(Some(register), field);
        nft_field::of_ct(key, direction)
    }

    fn fib(&mut self, data: &[u8]) -> Meaning {
        const ADDRESS_TYPE: u32 = 3;
        const OF_DESTINATION: u32 = 2;
        let is_type = number_of(data, 2) == Some(ADDRESS_TYPE);
        let of_destination = number_of(data, 3).is_some_and(|flags| flags & OF_DESTINATION != 0);
        let field = if is_type && of_destination {
            Field::DestinationType
        } else {
            Field::Other
        };
        self.load(number_of(data, 1), field)
    }

    fn bitwise(&mut self, data: &[u8]) -> Meaning {
        let target = number_of(data, 2).and_then(position);
        let source = number_of(data, 1).and_then(position);
        let is_mask = number_of(data, 6).unwrap_or(0) == 0;
        let value = |kind| attribute(attribute(data, kind)?, DATA_VALUE);
        let words = value(4).map_or(1, |mask| mask.len().div_ceil(4));
        for index in 0..words {
            let masked = source.and_then(|source| {
                let register = self.registers.get(source + index)?;
                let mask = word(value(4)?, index);
                (is_mask && word(value(5)?, index) == 0).then_some(Register {
                    field: register.field,
                    mask: register.mask & mask,
                })
            });
            if let Some(register) = target.and_then(|target| self.registers.get_mut(target + index))
            {
                *register = masked.unwrap_or(Register::OTHER);
            }
        }
        Meaning::Held
    }

    fn compare(&self, data: &[u8]) -> Meaning {
        const EQUAL: u32 = 0;
        const UNEQUAL: u32 = 1;
        let value = attribute(data, 3).and_then(|data| attribute(data, DATA_VALUE));
        let (Some(start), Some(value)) = (number_of(data, 1).and_then(position), value) else {
            return Meaning::Held;
        };
        let excluded = match number_of(data, 2) {
            Some(EQUAL) => (0..value.len().div_ceil(4)).any(|index| {
                let register = self.registers.get(start + index);
                register.is_some_and(|register| !self.may_be(*register, value, index, true))
            }),
            Some(UNEQUAL) if value.len() <= 4 => {
                !self.may_be(self.registers[start], value, 0, false)
            }
            Some(order) => !self.may_be_beyond(self.registers[start], word(value, 0), order),
            None => false,
        };
        if excluded {
            Meaning::Excluded
        } else {
            Meaning::Held
        }
    }

    /// May an address of a pod stand in this order to `value`? A range is two of them.
    fn may_be_beyond(&self, register: Register, value: u32, order: u32) -> bool {
        if !register.is_address() {
            return true;
        }
        let range = match order {
            2 => value.checked_sub(1).map(|last| (0, last)),
            3 => Some((0, value)),
            4 => value.checked_add(1).map(|first| (first, u32::MAX)),
            5 => Some((value, u32::MAX)),
            _ => return true,
        };
        range.is_some_and(|(from, to)| self.context.pods.some_between(from, to))
    }

    /// May the word `index` of `value` be, or not be, what TCP between pods has there?
    fn may_be(&self, register: Register, value: &[u8], index: usize, equal: bool) -> bool {
        let pods = self.context.pods;
        let rest = value.get(index * 4..).unwrap_or(&[]);
        let is = |known: bool| known == equal;
        match (register.field, rest) {
            (Field::Source | Field::Destination, _) => {
                let value = word(value, index);
                if equal {
                    pods.some_is(value, register.mask)
                } else {
                    !pods.each_is(value, register.mask)
                }
            }
            (Field::Protocol, [protocol, ..]) => is(*protocol == TCP),
            (Field::Family, [family, ..]) => is(*family == IPV4),
            (Field::EtherType, [high, low, ..]) => is([*high, *low] == ETHERTYPE_IPV4),
            (Field::DestinationType, [a, b, c, d, ..]) => {
                is(u32::from_ne_bytes([*a, *b, *c, *d]) == u32::from(UNICAST))
            }
            // `ct state invalid`: INVALID is bit 0, masked, and not zero.
            (Field::State, [a, b, c, d, ..]) => {
                let invalid_alone = register.mask == u32::from_be_bytes(1_u32.to_ne_bytes());
                equal || !invalid_alone || [a, b, c, d].into_iter().any(|byte| *byte != 0)
            }
            _ => true,
        }
    }

    fn range(&self, data: &[u8]) -> Meaning {
        const WITHIN: u32 = 0;
        let register = number_of(data, 1)
            .and_then(position)
            .map(|start| self.registers[start]);
        let value = |kind| attribute(attribute(data, kind)?, DATA_VALUE);
        let (Some(register), Some(from), Some(to)) = (register, value(3), value(4)) else {
            return Meaning::Held;
        };
        if !register.is_address() {
            return Meaning::Held;
        }
        let (from, to) = (word(from, 0), word(to, 0));
        let pods = self.context.pods;
        let may = if number_of(data, 2) == Some(WITHIN) {
            pods.some_between(from, to)
        } else {
            !pods.each_between(from, to)
        };
        if may {
            Meaning::Held
        } else {
            Meaning::Excluded
        }
    }

    fn lookup(&mut self, data: &[u8]) -> Meaning {
        let name = attribute(data, 1).map_or("", text);
        let key = (self.table.to_owned(), name.to_owned());
        let Some(set) = self.context.sets.get(&key) else {
            return varies("set that is gone again");
        };
        if set.is_dynamic {
            return Meaning::Depends(Part::Counts, "set that packets change".to_owned());
        }
        if set.has_verdicts {
            let start = number_of(data, 2).and_then(position).unwrap_or(0);
            let words: Vec<Word> = self.registers[start..]
                .iter()
                .map(|register| match register.field {
                    _ if register.is_address() => Word::Address,
                    Field::Protocol => Word::Protocol,
                    _ => Word::Other,
                })
                .collect();
            self.jumps
                .extend(set.chains(&words, self.context.pods).map(str::to_owned));
            return Meaning::Held;
        }
        self.load_other(number_of(data, 3))
    }

    fn immediate(&mut self, data: &[u8]) -> Meaning {
        let value = attribute(data, 2).unwrap_or(&[]);
        let verdict = attribute(value, DATA_VERDICT);
        if let Some(chain) = verdict.and_then(|verdict| attribute(verdict, VERDICT_CHAIN)) {
            self.jumps.push(text(chain).to_owned());
        }
        self.load_other(number_of(data, 1))
    }

    fn hash(&mut self, data: &[u8]) -> Meaning {
        const SYMMETRIC: u32 = 1;
        self.load_other(number_of(data, 2));
        // The other kind works on registers, whose fields were judged when they were loaded.
        match number_of(data, 7) {
            Some(SYMMETRIC) => varies("hash over ports"),
            _ => Meaning::Held,
        }
    }

    fn object(&self, data: &[u8]) -> Meaning {
        let name = attribute(data, 4).map_or("", text);
        let key = (self.table.to_owned(), name.to_owned());
        let kind =
            number_of(data, 1).or_else(|| self.context.sets.get(&key).and_then(|set| set.objects));
        match kind {
            // Counter, timeouts, security mark.
            Some(1 | 7 | 8) => Meaning::Held,
            Some(2) => Meaning::Depends(Part::Counts, "quota".to_owned()),
            Some(3) => xt::helper(),
            Some(4) => Meaning::Depends(Part::Counts, "limit".to_owned()),
            Some(5) => Meaning::Depends(Part::Counts, "connlimit".to_owned()),
            _ => Meaning::Depends(Part::Counts, "object of unknown kind".to_owned()),
        }
    }
}

/// Word `index` in network byte order, padded with zeros.
fn word(value: &[u8], index: usize) -> u32 {
    let mut bytes = [0; 4];
    for (byte, value) in bytes.iter_mut().zip(value.iter().skip(index * 4)) {
        *byte = *value;
    }
    u32::from_be_bytes(bytes)
}

/// Name and data of a match or target of iptables.
fn named(data: &[u8]) -> (&str, &[u8]) {
    (
        attribute(data, 1).map_or("", text),
        attribute(data, 3).unwrap_or(&[]),
    )
}

fn exthdr(data: &[u8]) -> Meaning {
    // Without a register to load into it is written, and what is changed is never bypassed.
    match number(attribute(data, 1).unwrap_or(&[])) {
        Some(_) => varies("TCP or IP option"),
        None => Meaning::Held,
    }
}

#[cfg(test)]
mod tests;
