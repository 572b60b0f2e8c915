//! The host's view of what a graph leaves behind: the step state on the device and the ring of
//! chosen tokens in mapped memory. The layouts are those of `ptx/common.cuh`.
//!
//! ```text
//! ring slot  s % RING_SLOTS   after step s (counted from 0 since the host last set `steps`)
//! word 0     sequence << 32 | entry     sequence = s + 1; written last
//! word 1     device time, nanoseconds
//! entry      token, or RING_STATUS | status bits: then the step computed nothing
//! ```

use super::driver::MappedMemory;
use crate::error::{Error, Result};
use bytemuck::{Pod, Zeroable};

/// Slots of the ring.
pub const RING_SLOTS: u32 = 1024;
/// Bytes of the ring.
pub const RING_BYTES: u64 = RING_SLOTS as u64 * 16;
/// Forced token that stands for "take the chosen one".
pub const NOT_FORCED: u32 = u32::MAX;
/// In a ring entry: the low bits are a status, not a token.
const RING_STATUS: u32 = 0x8000_0000;

/// What changes from token to token, on the device.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct StepState {
    /// Token that is computed next.
    pub token: u32,
    /// Its position.
    pub position: u32,
    /// [`Status`] bits; not 0: every kernel leaves everything as it is.
    pub status: u32,
    /// Positions of the cache.
    pub capacity: u32,
    /// Steps completed since the host set this.
    pub steps: u32,
    /// Token ids are below it.
    pub vocab: u32,
    /// Zero.
    pub pad: [u32; 2],
}

const _: () = {
    assert!(size_of::<StepState>() == 32 && align_of::<StepState>() == 16);
    assert!(core::mem::offset_of!(StepState, token) == 0);
    assert!(core::mem::offset_of!(StepState, position) == 4);
    assert!(core::mem::offset_of!(StepState, status) == 8);
    assert!(core::mem::offset_of!(StepState, capacity) == 12);
    assert!(core::mem::offset_of!(StepState, steps) == 16);
    assert!(core::mem::offset_of!(StepState, vocab) == 20);
};

/// Why a step computed nothing: bits, several may be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    /// The position is at the capacity.
    pub const CAPACITY: u32 = 1;
    /// The token is outside the vocabulary.
    pub const TOKEN: u32 = 2;
    /// A logit was not finite.
    pub const NON_FINITE: u32 = 4;

    /// Whether the cache is full and nothing else is wrong.
    pub fn is_capacity_only(self) -> bool {
        self.0 == Self::CAPACITY
    }

    /// Whether all was computed, but a logit is not finite.
    pub fn is_only_non_finite(self) -> bool {
        self.0 == Self::NON_FINITE
    }

    /// The error for the step at `position`.
    pub fn error(self, position: u32, vocab: u32) -> Error {
        let mut causes = Vec::new();
        if self.0 & Self::CAPACITY != 0 {
            causes.push("the cache is full".to_owned());
        }
        if self.0 & Self::TOKEN != 0 {
            causes.push(format!("the token is outside the vocabulary of {vocab}"));
        }
        if self.0 & Self::NON_FINITE != 0 {
            causes.push("a logit is not finite: GPU_DEBUG=1 names the step".to_owned());
        }
        let known = Self::CAPACITY | Self::TOKEN | Self::NON_FINITE;
        if self.0 & !known != 0 || self.0 == 0 {
            causes.push(format!("the device reported status {:#x}", self.0));
        }
        Error::Decode { position, what: causes.join("; ") }
    }
}

/// What one step left in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The chosen token and the device's clock, nanoseconds.
    Chosen {
        /// Token.
        token: u32,
        /// Nanoseconds.
        device_ns: u64,
    },
    /// Nothing was computed.
    Refused(Status),
}

/// Memory that the device writes, word by word.
pub trait Words {
    /// The 64-bit word at byte `offset`; what was written before it is visible after.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] out of bounds.
    fn word(&self, offset: u64) -> Result<u64>;
}

impl Words for MappedMemory {
    fn word(&self, offset: u64) -> Result<u64> {
        self.read_u64(offset)
    }
}

/// Reads the ring in order of the steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingReader {
    /// Steps whose entries were read, or passed over.
    steps: u32,
}

impl RingReader {
    /// The step whose entry comes next.
    pub fn steps(&self) -> u32 {
        self.steps
    }

    /// Goes to step `steps`: the device's step state must be set to it, and no step of that number
    /// or a later one may have been launched before.
    pub fn go_to(&mut self, steps: u32) {
        self.steps = steps;
    }

    /// The entry of the next step, once it is there. A refused step keeps its number, so the
    /// reader stays.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when the memory is no ring.
    pub fn poll(&mut self, ring: &impl Words) -> Result<Option<Entry>> {
        let slot = u64::from(self.steps % RING_SLOTS) * 16;
        let head = ring.word(slot)?;
        let after = self.steps.wrapping_add(1);
        if (head >> 32) as u32 != after {
            return Ok(None);
        }
        let entry = head as u32;
        if entry & RING_STATUS != 0 {
            return Ok(Some(Entry::Refused(Status(entry & !RING_STATUS))));
        }
        let device_ns = ring.word(slot + 8)?;
        self.steps = after;
        Ok(Some(Entry::Chosen { token: entry, device_ns }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    struct Fake(RefCell<Vec<u64>>);

    impl Fake {
        fn new() -> Self {
            Self(RefCell::new(vec![0; 2 * RING_SLOTS as usize]))
        }

        /// What `advance` of the kernels writes.
        fn write(&self, steps: u32, entry: u32, ns: u64) {
            let slot = 2 * (steps % RING_SLOTS) as usize;
            let mut words = self.0.borrow_mut();
            words[slot + 1] = ns;
            words[slot] = u64::from(steps.wrapping_add(1)) << 32 | u64::from(entry);
        }
    }

    impl Words for Fake {
        fn word(&self, offset: u64) -> Result<u64> {
            Ok(self.0.borrow()[offset as usize / 8])
        }
    }

    #[test]
    fn entries_come_in_order_and_only_when_written_over_several_laps() {
        let (ring, mut reader) = (Fake::new(), RingReader::default());
        for step in 0..3 * RING_SLOTS + 5 {
            assert_eq!(reader.poll(&ring).unwrap(), None, "step {step} is not there yet");
            ring.write(step, step * 7, u64::from(step) + 100);
            let chosen = Entry::Chosen { token: step * 7, device_ns: u64::from(step) + 100 };
            assert_eq!(reader.poll(&ring).unwrap(), Some(chosen));
        }
    }

    #[test]
    fn a_refused_step_is_told_until_the_host_goes_on() {
        let (ring, mut reader) = (Fake::new(), RingReader::default());
        ring.write(0, RING_STATUS | Status::CAPACITY, 1);
        let refused = Some(Entry::Refused(Status(Status::CAPACITY)));
        assert_eq!(reader.poll(&ring).unwrap(), refused);
        assert_eq!(reader.poll(&ring).unwrap(), refused);
        reader.go_to(1);
        assert_eq!(reader.poll(&ring).unwrap(), None, "the refusal is behind");
        ring.write(1, 9, 2);
        assert!(matches!(reader.poll(&ring).unwrap(), Some(Entry::Chosen { token: 9, .. })));
    }

    #[test]
    fn the_sequence_wraps_with_the_counter() {
        let (ring, mut reader) = (Fake::new(), RingReader::default());
        // The lap before has filled every slot.
        ring.write(u32::MAX - RING_SLOTS, 1, 1);
        reader.go_to(u32::MAX);
        assert_eq!(reader.poll(&ring).unwrap(), None);
        ring.write(u32::MAX, 3, 1);
        assert!(matches!(reader.poll(&ring).unwrap(), Some(Entry::Chosen { token: 3, .. })));
        assert_eq!(reader.steps(), 0);
    }

    #[test]
    fn every_status_bit_has_its_own_words_and_only_capacity_alone_is_no_fault() {
        let text = |bits| Status(bits).error(12, 100).to_string();
        assert!(text(1).contains("position 12: the cache is full"), "{}", text(1));
        assert!(text(2).contains("outside the vocabulary of 100"));
        assert!(text(4).contains("not finite"));
        assert!(text(3).contains("full") && text(3).contains("vocabulary"));
        assert!(text(64).contains("0x40"));
        assert!(Status(1).is_capacity_only() && !Status(5).is_capacity_only());
    }
}
