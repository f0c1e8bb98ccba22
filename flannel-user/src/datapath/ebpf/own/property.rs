//! Random packets and looks of the agent, against a second opinion of what the connection is:
//! programs and agent agree in the end, whatever the order.

use std::{cmp::Ordering, time::Duration};

use flannel_ebpf::{
    layout::OwnFlow,
    own::{self, Meeting, Segment, Stage},
    sighting::Way,
};
use proptest::prelude::*;

use super::handover::{Due, Extent, LINGER, Moment, due};
use crate::datapath::ebpf::epoch::Clock;

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

/// Something that happens.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// A SYN; whether its connection may open.
    Syn(Way, bool),
    /// Any other packet: flags, small sequence and acknowledgement numbers.
    Packet(Way, u8, u8, u8),
    /// So many milliseconds pass.
    Wait(u16),
    /// The agent reads the table: what it decides it does later.
    Look(bool),
    /// The agent does what it decided.
    Act,
}

fn way() -> impl Strategy<Value = Way> {
    prop_oneof![Just(Way::Out), Just(Way::In)]
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![
        4 => Just(ACK),
        2 => Just(SYN | ACK),
        2 => Just(FIN | ACK),
        1 => Just(RST),
        1 => Just(RST | ACK),
        1 => any::<u8>().prop_filter("a SYN has a step of its own", |flags| !own::is_opening(*flags)),
    ];
    prop_oneof![
        2 => (way(), any::<bool>()).prop_map(|(way, may)| Step::Syn(way, may)),
        8 => (way(), flags, 0u8..4, 0u8..4).prop_map(|(way, flags, seq, ack)| Step::Packet(way, flags, seq, ack)),
        3 => (0u16..1200).prop_map(Step::Wait),
        2 => any::<bool>().prop_map(Step::Look),
        2 => Just(Step::Act),
    ]
}

/// What conntrack would hold of the packets that a connection has had, told from all of them.
#[derive(Debug, Clone, Default)]
struct History {
    client: Option<Way>,
    packets: Vec<(Way, Segment)>,
}

impl History {
    /// A second opinion, in other words than the entry's bits.
    fn stage(&self) -> Stage {
        let client = self.client.expect("a connection has a client");
        let mut stage = Stage::Opening;
        let (mut fins, mut acked) = ([false; 2], [None::<[u8; 4]>; 2]);
        for (way, segment) in &self.packets {
            let (this, other) = (*way as usize, 1 - *way as usize);
            let has = |flag| segment.flags & flag != 0;
            if has(RST) {
                // At what the other end has acknowledged, if anything; or ahead of that, with what
                // its own end acknowledged last.
                let is_own = has(ACK) && acked[this] == Some(segment.ack);
                if acked[other].is_none_or(|acked| match segment.seq.cmp(&acked) {
                    Ordering::Less => false,
                    Ordering::Equal => true,
                    Ordering::Greater => is_own,
                }) {
                    return Stage::Reset;
                }
                continue;
            }
            if has(ACK) {
                // The highest: an older one may come last (conntrack's `td_maxack`).
                acked[this] = acked[this].max(Some(segment.ack));
            }
            stage = match stage {
                Stage::Opening if *way != client && has(SYN) && has(ACK) => Stage::Answered,
                Stage::Answered if *way == client && has(ACK) && !has(SYN) => Stage::Established,
                stage => stage,
            };
            fins[this] |= has(FIN);
            if fins == [true; 2] {
                // A reset after both FINs is one all the same.
                stage = Stage::Closed;
            } else if fins != [false; 2] {
                stage = stage.max(Stage::HalfClosed);
            }
        }
        stage
    }
}

/// The table with one tuple, and its agent.
struct World {
    now: u32,
    /// What the agent has told programs to leave to it.
    expired: u32,
    flow: Option<OwnFlow>,
    history: History,
    /// How many connections have opened: tells two of one tuple apart.
    number: u32,
    /// What the agent decided, about which connection.
    decided: Option<(Due, u32)>,
}

impl World {
    fn ticks(duration: Duration) -> u32 {
        Clock::new(0).ticks(duration)
    }

    fn begin(&mut self, way: Way) {
        self.flow = Some(own::opened(way, self.now));
        self.history = History {
            client: Some(way),
            packets: Vec::new(),
        };
        self.number += 1;
    }

    fn syn(&mut self, way: Way, may: bool) {
        let Some(flow) = &mut self.flow else {
            if may {
                self.begin(way);
            }
            return;
        };
        if own::crosses(flow, way) {
            return;
        }
        if !may {
            return own::leave_to_kernel(flow);
        }
        match own::meets(flow, self.expired) {
            Meeting::Reopens => self.begin(way),
            Meeting::Passes => {}
            Meeting::Refused => own::leave_to_kernel(flow),
        }
    }

    fn packet(&mut self, way: Way, segment: Segment) {
        let Some(flow) = &mut self.flow else { return };
        let was_reset = own::stage(flow) == Stage::Reset;
        if own::advance(flow, way, segment, self.now) && !was_reset {
            self.history.packets.push((way, segment));
        }
    }

    fn look(&mut self, live: bool) {
        let clock = Clock::new(self.now);
        if !live {
            self.expired = self.now.wrapping_sub(Self::ticks(LINGER));
        }
        let moment = Moment {
            clock: &clock,
            expired: self.expired,
        };
        self.decided = self.flow.as_ref().map(|flow| {
            let extent = if live {
                Extent::Live(moment)
            } else {
                Extent::Due(moment)
            };
            (due(flow, extent), self.number)
        });
    }

    fn act(&mut self) -> Result<(), TestCaseError> {
        match self.decided.take() {
            Some((Due::Delete, number)) => {
                let flow = self.flow.take();
                prop_assert_eq!(number, self.number, "another connection was deleted");
                let flow = flow.expect("only the agent deletes");
                prop_assert!(flow.taken != 0 || own::is_over(&flow), "{:?}", flow);
            }
            // Whatever became of it meanwhile: the entry that is taken out says so.
            Some((Due::HandOver, _)) => self.flow = None,
            _ => {}
        }
        Ok(())
    }
}

fn explore(steps: &[Step]) -> Result<(), TestCaseError> {
    let mut world = World {
        now: u32::MAX - 300, // across the wrap
        expired: u32::MAX - 300_000,
        flow: None,
        history: History::default(),
        number: 0,
        decided: None,
    };
    for step in steps {
        match *step {
            Step::Syn(way, may) => world.syn(way, may),
            Step::Packet(way, flags, seq, ack) => {
                // Zero is none.
                let number = |low| [0, 0, 0, low + 1];
                world.packet(
                    way,
                    Segment {
                        flags,
                        seq: number(seq),
                        ack: number(ack),
                    },
                );
            }
            Step::Wait(milliseconds) => {
                let ticks = World::ticks(Duration::from_millis(u64::from(milliseconds)));
                world.now = world.now.wrapping_add(ticks);
            }
            Step::Look(live) => world.look(live),
            Step::Act => world.act()?,
        }
        if let Some(flow) = &world.flow {
            prop_assert_eq!(
                own::stage(flow),
                world.history.stage(),
                "{:?}",
                world.history
            );
        }
    }
    // Left alone, the agent empties the table: it looks every 250 ms at the latest.
    world.decided = None;
    for _ in 0..10 {
        world.now = world
            .now
            .wrapping_add(World::ticks(Duration::from_millis(250)));
        world.look(false);
        world.act()?;
    }
    prop_assert!(world.flow.is_none(), "for ever: {:?}", world.flow);
    Ok(())
}

/// As many sequences as the whole test run asks for.
fn cases() -> u32 {
    if std::env::var_os("FLANNEL_TEST_FULL").is_some() {
        1_000_000
    } else {
        2_000
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    #[test]
    fn programs_and_agent_agree(steps in proptest::collection::vec(step(), 1..40)) {
        explore(&steps)?;
    }
}
