//! Red zones: bytes around every workspace buffer and around every layer's keys and values that no
//! kernel may touch, for a run that is to prove it.
//!
//! ```text
//! memory   zone | buffer | zone | buffer | zone      no two buffers share memory
//! zone     A5 FF A5 FF …                             NaN, read as f32 or as f16
//! ```
//!
//! A kernel that writes outside its buffer changes a zone, which [`RedZones::check`] finds; one that
//! reads outside gets NaN, which reaches the logits. Launches and code are those of any other run;
//! only addresses differ.

use super::driver::{DeviceMemory, Stream};
use crate::error::{Error, Result};
use std::ops::Range;

/// Bytes of a zone, at least: more than a block of threads writes at a time.
pub(super) const ZONE: u64 = 4096;
/// What a zone holds, repeated.
const PATTERN: [u8; 2] = [0xA5, 0xFF];

/// The zones of one allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct RedZones {
    /// What lies before the zone, and the zone's bytes of the allocation.
    zones: Vec<(String, Range<u64>)>,
}

impl RedZones {
    /// Everything of an allocation of `bytes` bytes that none of `used` covers.
    pub(super) fn around(mut used: Vec<(String, Range<u64>)>, bytes: u64) -> Self {
        used.sort_by_key(|(_, range)| range.start);
        let (mut zones, mut end, mut before) = (Vec::new(), 0, "the start".to_owned());
        for (name, range) in used {
            if end < range.start {
                zones.push((before, end..range.start));
            }
            (before, end) = (name, range.end.max(end));
        }
        if end < bytes {
            zones.push((before, end..bytes));
        }
        Self { zones }
    }

    /// Writes the pattern.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`].
    pub(super) fn write(&self, stream: &Stream, memory: &DeviceMemory) -> Result<()> {
        for (_, range) in &self.zones {
            let pattern: Vec<u8> = range.clone().map(expected).collect();
            memory.upload(stream, range.start, &pattern)?;
        }
        Ok(())
    }

    /// Looks whether the pattern stands, after the work queued on `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`] naming the buffer before the first byte that was changed;
    /// [`Error::Driver`].
    pub(super) fn check(&self, stream: &Stream, memory: &DeviceMemory) -> Result<()> {
        for (before, range) in &self.zones {
            let mut found = vec![0u8; (range.end - range.start) as usize];
            memory.download(stream, range.start, &mut found)?;
            let wrong = range.clone().zip(&found).find(|(at, byte)| **byte != expected(*at));
            if let Some((at, byte)) = wrong {
                let (what, after) = (memory.what(), at - range.start);
                return Err(Error::Verification(format!(
                    "red zone of the {what}: byte {after} behind {before} became {byte:#04x}: \
                     a kernel writes outside its buffer"
                )));
            }
        }
        Ok(())
    }
}

/// What stands at byte `at` of an allocation where a zone is.
fn expected(at: u64) -> u8 {
    PATTERN[(at % 2) as usize]
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    fn used(ranges: &[Range<u64>]) -> Vec<(String, Range<u64>)> {
        ranges.iter().zip(["a", "b", "c"]).map(|(r, n)| (n.to_owned(), r.clone())).collect()
    }

    #[test]
    fn zones_are_all_that_no_buffer_covers() {
        let zones = RedZones::around(used(&[20..30, 4..10, 24..28]), 40).zones;
        let zones: Vec<_> = zones.iter().map(|(n, r)| (n.as_str(), r.clone())).collect();
        // The last one that begins is named; it ends within its neighbour.
        assert_eq!(zones, [("the start", 0..4), ("b", 10..20), ("c", 30..40)]);
        assert_eq!(RedZones::around(used(&[0..8, 8..16]), 16), RedZones::default());
    }

    #[test]
    fn the_pattern_is_not_a_number_however_it_is_read() {
        let word: Vec<u8> = (0..4).map(expected).collect();
        assert!(f32::from_le_bytes([word[0], word[1], word[2], word[3]]).is_nan());
        assert!(f16::from_le_bytes([word[0], word[1]]).is_nan());
    }
}
