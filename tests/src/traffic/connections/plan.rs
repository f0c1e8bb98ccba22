//! How a connection is to go, and as its first bytes tell the server.

use std::io;

use super::corrupt;

/// Who ends a connection, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Ending {
    /// The client's FIN comes first.
    ClientFin,
    /// The server's FIN comes first.
    ServerFin,
    /// The client closes with RST (`SO_LINGER` 0).
    ClientRst,
    /// The server does.
    ServerRst,
    /// The client's FIN, then data from the server, then its FIN.
    HalfClose,
    /// Both FINs at the same moment.
    Simultaneous,
    /// The client says nothing more and keeps the connection until told.
    Silent,
}

impl Ending {
    /// All whose client ends the connection by itself.
    pub const ORDERLY: [Self; 6] = [
        Self::ClientFin,
        Self::ServerFin,
        Self::ClientRst,
        Self::ServerRst,
        Self::HalfClose,
        Self::Simultaneous,
    ];

    /// The word on the command line.
    #[must_use]
    pub fn name(self) -> String {
        let value = clap::ValueEnum::to_possible_value(&self);
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ORDERLY
            .into_iter()
            .chain([Self::Silent])
            .find(|ending| *ending as u8 == byte)
    }
}

/// What a client wants of the server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    pub(super) ending: Ending,
    pub(super) exchanges: u32,
    pub(super) size: u32,
    pub(super) response: u32,
    pub(super) seed: u64,
}

impl Plan {
    pub(super) const LENGTH: usize = 21;

    pub(super) fn encode(self) -> [u8; Self::LENGTH] {
        let mut bytes = [0; Self::LENGTH];
        bytes[0] = self.ending as u8;
        bytes[1..5].copy_from_slice(&self.exchanges.to_le_bytes());
        bytes[5..9].copy_from_slice(&self.size.to_le_bytes());
        bytes[9..13].copy_from_slice(&self.response.to_le_bytes());
        bytes[13..].copy_from_slice(&self.seed.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: [u8; Self::LENGTH]) -> io::Result<Self> {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four"));
        Ok(Self {
            ending: Ending::from_byte(bytes[0]).ok_or_else(|| corrupt("an unknown ending"))?,
            exchanges: word(1),
            size: word(5),
            response: word(9),
            seed: u64::from_le_bytes(bytes[13..].try_into().expect("eight")),
        })
    }

    /// The data of exchange `number`, seen from the client.
    pub(super) fn seed_up(self, number: u32) -> u64 {
        self.seed.wrapping_add(u64::from(number) << 32)
    }

    pub(super) fn seed_down(self, number: u32) -> u64 {
        !self.seed_up(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_the_wire() {
        for ending in Ending::ORDERLY {
            let plan = Plan {
                ending,
                exchanges: 7,
                size: 70_000,
                response: 3,
                seed: 1 << 60,
            };
            let read = Plan::decode(plan.encode()).expect("a plan");
            assert_eq!(read.ending, ending);
            assert_eq!((read.exchanges, read.size), (7, 70_000));
            assert_eq!((read.response, read.seed), (3, 1 << 60));
        }
        assert!(Plan::decode([99; Plan::LENGTH]).is_err());
    }
}
