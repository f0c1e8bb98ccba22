//! Data that both ends can compute, so that every byte is compared with what
//! belongs at its place.

/// The 64-bit word at position `index` of the data named `seed` (splitmix64).
#[must_use]
pub fn word(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Fills `buffer` with the data from byte `offset` on, which is a multiple of eight.
pub fn fill(buffer: &mut [u8], seed: u64, offset: u64) {
    let (words, tail) = buffer.as_chunks_mut::<8>();
    let first = offset / 8;
    let mut index = first;
    for bytes in words {
        *bytes = word(seed, index).to_le_bytes();
        index += 1;
    }
    let last = word(seed, index).to_le_bytes();
    let rest = tail.len();
    tail.copy_from_slice(&last[..rest]);
}

/// Makes a stream piece by piece.
#[derive(Debug, Clone)]
pub struct Producer {
    seed: u64,
    position: u64,
    checksum: u64,
}

impl Producer {
    /// The data named `seed` from its start.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            position: 0,
            checksum: FNV_OFFSET,
        }
    }

    /// Fills `buffer`, a multiple of eight bytes, with what comes next.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        debug_assert_eq!(buffer.len() % 8, 0);
        fill(buffer, self.seed, self.position);
        self.position += buffer.len() as u64;
        for bytes in buffer.as_chunks::<8>().0 {
            self.checksum = mix(self.checksum, u64::from_le_bytes(*bytes));
        }
    }

    /// Bytes made so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.position
    }

    /// The checksum that a [`Checker`] of the same bytes has.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.checksum
    }
}

/// Checks a stream as it arrives, in pieces of any length.
#[derive(Debug, Clone)]
pub struct Checker {
    seed: u64,
    position: u64,
    checksum: u64,
    word: [u8; 8],
    /// Position of the first wrong word, if any.
    pub first_error: Option<u64>,
}

impl Checker {
    /// Expects the data named `seed` from its start.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            position: 0,
            checksum: FNV_OFFSET,
            word: [0; 8],
            first_error: None,
        }
    }

    /// Takes the next piece.
    pub fn take(&mut self, mut piece: &[u8]) {
        let filled = |position: u64| (position % 8) as usize;
        while filled(self.position) != 0 && !piece.is_empty() {
            self.word[filled(self.position)] = piece[0];
            self.position += 1;
            piece = &piece[1..];
            if filled(self.position) == 0 {
                self.whole_word(self.word, self.position / 8 - 1);
            }
        }
        let (words, tail) = piece.as_chunks::<8>();
        for bytes in words {
            self.whole_word(*bytes, self.position / 8);
            self.position += 8;
        }
        for byte in tail {
            self.word[filled(self.position)] = *byte;
            self.position += 1;
        }
    }

    fn whole_word(&mut self, bytes: [u8; 8], index: u64) {
        let value = u64::from_le_bytes(bytes);
        if value != word(self.seed, index) && self.first_error.is_none() {
            self.first_error = Some(index * 8);
        }
        self.checksum = mix(self.checksum, value);
    }

    /// Bytes taken so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.position
    }

    /// A checksum of all whole words.
    #[must_use]
    pub fn checksum(&self) -> u64 {
        self.checksum
    }
}

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// FNV-1a over words instead of bytes.
fn mix(checksum: u64, value: u64) -> u64 {
    (checksum ^ value).wrapping_mul(FNV_PRIME)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        fill(&mut data, 7, 0);
        data
    }

    #[test]
    fn pieces_of_any_length_give_the_same_checksum() {
        let data = data(8 * 1000);
        let mut whole = Checker::new(7);
        whole.take(&data);
        for piece in [1, 3, 8, 13, 4096] {
            let mut checker = Checker::new(7);
            data.chunks(piece).for_each(|piece| checker.take(piece));
            assert_eq!(checker.first_error, None);
            assert_eq!(checker.checksum(), whole.checksum());
            assert_eq!(checker.bytes(), 8000);
        }
    }

    #[test]
    fn producer_and_checker_agree() {
        let mut buffer = vec![0; 800];
        let (mut producer, mut checker) = (Producer::new(7), Checker::new(7));
        for _ in 0..3 {
            producer.fill(&mut buffer);
            checker.take(&buffer);
        }
        assert_eq!(checker.first_error, None);
        assert_eq!(producer.checksum(), checker.checksum());
        assert_eq!(producer.bytes(), checker.bytes());
    }

    #[test]
    fn filling_may_start_anywhere() {
        let whole = data(64);
        let mut part = [0; 24];
        fill(&mut part, 7, 16);
        assert_eq!(part, whole[16..40]);
    }

    #[test]
    fn one_wrong_byte_is_found_at_its_place() {
        let mut data = data(8 * 100);
        data[333] ^= 1;
        let mut checker = Checker::new(7);
        data.chunks(11).for_each(|piece| checker.take(piece));
        assert_eq!(checker.first_error, Some(328));
    }
}
