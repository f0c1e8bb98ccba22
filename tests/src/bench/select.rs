//! What `--only` chooses.

use anyhow::{Result, bail};

use super::{
    measure::PROBES,
    side::{NETLINK, Side},
};

/// A part of the benchmark that is no probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// What the programs cost.
    Program,
    /// What grows with the cluster: the agent's time and memory.
    GrowthOfAgent,
    /// What a packet costs among many subnets.
    GrowthOfSubnets,
    /// What a packet costs among many flows.
    GrowthOfFlows,
}

impl Part {
    const ALL: [Self; 4] = [
        Self::Program,
        Self::GrowthOfAgent,
        Self::GrowthOfSubnets,
        Self::GrowthOfFlows,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Program => "program",
            Self::GrowthOfAgent => "growth-agent",
            Self::GrowthOfSubnets => "growth-subnets",
            Self::GrowthOfFlows => "growth-flows",
        }
    }
}

/// All parts that begin so.
const GROWTH: &str = "growth";

/// Which sides, probes and parts run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    words: Vec<String>,
    sides: bool,
    measures: bool,
}

impl Selection {
    /// Of the words after `--only`; none is everything.
    ///
    /// # Errors
    /// When a word is neither a side, nor a probe, nor a part.
    pub fn of(words: &[String], sides: &[Side]) -> Result<Self> {
        let mut selection = Self {
            words: words.to_vec(),
            sides: false,
            measures: false,
        };
        for word in words {
            if sides.iter().any(|side| side.name == *word) {
                selection.sides = true;
            } else if PROBES.iter().any(|probe| probe.name == word)
                || Part::ALL.iter().any(|part| part.name() == word)
                || word == GROWTH
            {
                selection.measures = true;
            } else {
                let known: Vec<&str> = sides
                    .iter()
                    .map(|side| side.name.as_str())
                    .chain(PROBES.iter().map(|probe| probe.name))
                    .chain(Part::ALL.iter().map(|part| part.name()))
                    .chain([GROWTH])
                    .collect();
                bail!("--only {word}: choose of {}", known.join(", "));
            }
        }
        Ok(selection)
    }

    /// Whether a word was named itself.
    #[must_use]
    pub fn names(&self, name: &str) -> bool {
        self.words.iter().any(|word| word == name)
    }

    /// Whether a side runs; the one that ratios are taken to always does.
    #[must_use]
    pub fn side(&self, name: &str) -> bool {
        !self.sides || name == NETLINK || self.names(name)
    }

    /// Whether a probe runs.
    #[must_use]
    pub fn probe(&self, name: &str) -> bool {
        !self.measures || self.names(name)
    }

    /// Whether a part runs.
    #[must_use]
    pub fn part(&self, part: Part) -> bool {
        let name = part.name();
        !self.measures || self.names(name) || (name.starts_with(GROWTH) && self.names(GROWTH))
    }

    /// Whether any part of growth runs.
    #[must_use]
    pub fn growth(&self) -> bool {
        Part::ALL
            .iter()
            .any(|part| part.name().starts_with(GROWTH) && self.part(*part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::side;

    fn select(words: &[&str]) -> Result<Selection> {
        let words: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        Selection::of(&words, &side::all())
    }

    #[test]
    fn nothing_named_is_everything() {
        let all = select(&[]).expect("a selection");
        assert!(all.side("direct") && all.probe("udp_64") && all.part(Part::GrowthOfFlows));
    }

    #[test]
    fn sides_and_measures_are_chosen_apart() {
        let some = select(&["direct", "tcp_rr"]).expect("a selection");
        assert!(some.side("direct") && some.side("netlink") && !some.side("host"));
        assert!(some.probe("tcp_rr") && !some.probe("udp_rr") && !some.part(Part::Program));
        let program = select(&["program"]).expect("a selection");
        assert!(program.side("host") && program.part(Part::Program) && !program.probe("tcp_rr"));
    }

    #[test]
    fn growth_is_all_of_its_parts() {
        let all = select(&["growth"]).expect("a selection");
        assert!(all.part(Part::GrowthOfAgent) && all.part(Part::GrowthOfFlows) && all.growth());
        let one = select(&["growth-flows"]).expect("a selection");
        assert!(one.part(Part::GrowthOfFlows) && !one.part(Part::GrowthOfAgent) && one.growth());
        assert!(!select(&["tcp_rr"]).expect("a selection").growth());
    }

    #[test]
    fn an_unknown_word_is_refused() {
        let error = select(&["tcp_rrr"]).expect_err("no such measure");
        assert!(error.to_string().contains("tcp_crr"), "{error}");
    }
}
