//! Weights of real models' shapes from a seed: benchmarks and tests without a download.
//!
//! ```text
//! tensor key   k = mix(seed, tensor name)
//! group g      consecutive blocks of at least 256 elements; its random words are
//!              splitmix64 from the state mix(k + mix(g))
//! ```
//!
//! So any range of a tensor can be made alone, on any thread, and is always the same bytes.

mod mix;
mod shapes;

use super::{Metadata, TensorInfo};
use crate::error::{Error, Result};
use crate::quant::QuantFormat;
use mix::Mix;
use rayon::prelude::*;
use shapes::{Content, Shape};
use std::fmt;
use std::path::Path;

/// Elements of a group at the least: spreads the cost of seeding over single-element formats.
const GROUP_ELEMENTS: usize = 256;
/// Bytes of a group at the most (256 f32).
const GROUP_BYTES: usize = 1024;
/// Bytes below which a range is made on the calling thread.
const PARALLEL_BYTES: usize = 1 << 20;

/// Which shape, in which mixture of weight formats, from which seed.
#[derive(Clone, Copy, Debug)]
pub struct SyntheticSpec {
    shape: &'static Shape,
    mix: Mix,
    /// Two checkpoints of one shape and mixture with different seeds share no weights.
    pub seed: u64,
}

impl SyntheticSpec {
    /// The seed that `parse` gives.
    pub const DEFAULT_SEED: u64 = 0x00C0_FFEE;

    /// Reads `SHAPE[:QUANT]`, for example `llama-3.2-1b:q8_0`; QUANT is `q4_k_m` by default.
    ///
    /// # Errors
    /// [`Error::Usage`] listing the names that exist.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, quant) = text.split_once(':').unwrap_or((text, "q4_k_m"));
        let unknown = |what: &str, found: &str, valid: Vec<&str>| {
            Error::Usage(format!("unknown {what} \"{found}\"; one of: {}", valid.join(" ")))
        };
        let shape = Shape::ALL
            .iter()
            .find(|s| s.name == name)
            .ok_or_else(|| unknown("synthetic shape", name, Self::shapes().collect()))?;
        let mix = Mix::ALL
            .into_iter()
            .find(|m| m.name() == quant)
            .ok_or_else(|| unknown("quantisation", quant, Self::quants().collect()))?;
        Ok(Self { shape, mix, seed: Self::DEFAULT_SEED })
    }

    /// The same shape and mixture from another seed.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Names of all shapes.
    pub fn shapes() -> impl Iterator<Item = &'static str> {
        Shape::ALL.iter().map(|s| s.name)
    }

    /// Names of all mixtures.
    pub fn quants() -> impl Iterator<Item = &'static str> {
        Mix::ALL.into_iter().map(Mix::name)
    }
}

/// `SHAPE:QUANT`.
impl fmt::Display for SyntheticSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.shape.name, self.mix.name())
    }
}

/// What a checkpoint is assembled from.
pub(super) struct Made {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    pub(super) weights: Weights,
}

/// The rule for one tensor's bytes.
#[derive(Debug)]
struct Rule {
    format: QuantFormat,
    content: Content,
    key: u64,
    group_bytes: usize,
}

/// The rules for all tensors, by their index.
#[derive(Debug)]
pub(super) struct Weights(Vec<Rule>);

/// Lists the tensors and metadata of `spec`, whose errors name `path`.
pub(super) fn build(spec: &SyntheticSpec, path: &Path) -> Result<Made> {
    let mut tensors = Vec::new();
    let mut rules = Vec::new();
    let seed = mix64(spec.seed);
    for t in spec.shape.tensors() {
        let format = spec.mix.format(spec.shape, &t);
        let f = format.describe();
        let columns = usize::try_from(t.shape[0]).ok();
        let rows: u64 = t.shape[1..].iter().product();
        let bytes = columns
            .and_then(|columns| format.row_bytes(columns))
            .and_then(|row| rows.checked_mul(row as u64))
            .ok_or_else(|| Error::Internal(format!("{spec}: {} as {format}", t.name)))?;
        let blocks = GROUP_ELEMENTS.div_ceil(f.block_elements());
        let group_bytes = blocks * f.block_bytes();
        if group_bytes > GROUP_BYTES {
            return Err(Error::Internal(format!("{format}: a group is {group_bytes} bytes")));
        }
        let key = t.name.bytes().fold(seed, |k, b| mix64(k ^ u64::from(b)));
        rules.push(Rule { format, content: t.content, key, group_bytes });
        tensors.push(TensorInfo {
            index: tensors.len(),
            name: t.name,
            format,
            shape: t.shape,
            bytes,
        });
    }
    let metadata = shapes::metadata(spec.shape, spec.mix, path);
    Ok(Made { metadata, tensors, weights: Weights(rules) })
}

impl Weights {
    /// Writes bytes `[offset, offset + out.len())` of tensor `index`; the caller has checked the
    /// range.
    pub(super) fn fill(&self, index: usize, offset: u64, out: &mut [u8]) {
        let rule = &self.0[index];
        let group_bytes = rule.group_bytes;
        let mut group = offset / group_bytes as u64;
        let skip = (offset % group_bytes as u64) as usize;
        let mut rest = out;
        if skip > 0 {
            let head;
            let bytes = (group_bytes - skip).min(rest.len());
            (head, rest) = rest.split_at_mut(bytes);
            let mut scratch = [0; GROUP_BYTES];
            rule.group(group, &mut scratch[..group_bytes]);
            head.copy_from_slice(&scratch[skip..skip + bytes]);
            group += 1;
        }
        if rest.len() < PARALLEL_BYTES {
            rule.groups(group, rest);
            return;
        }
        let span = PARALLEL_BYTES / 4 / group_bytes;
        rest.par_chunks_mut(span * group_bytes)
            .enumerate()
            .for_each(|(i, part)| rule.groups(group + (i * span) as u64, part));
    }
}

impl Rule {
    /// Writes groups from `first` on; the last one may be cut.
    fn groups(&self, first: u64, out: &mut [u8]) {
        for (i, part) in out.chunks_mut(self.group_bytes).enumerate() {
            let group = first + i as u64;
            if part.len() == self.group_bytes {
                self.group(group, part);
            } else {
                let mut scratch = [0; GROUP_BYTES];
                let whole = &mut scratch[..self.group_bytes];
                self.group(group, whole);
                part.copy_from_slice(&whole[..part.len()]);
            }
        }
    }

    /// Writes one whole group.
    fn group(&self, group: u64, out: &mut [u8]) {
        let mut words = Words::new(mix64(self.key.wrapping_add(mix64(group))));
        let floats = |out: &mut [u8], mut value: Box<dyn FnMut(usize) -> f32 + '_>| {
            for (i, bytes) in out.chunks_exact_mut(4).enumerate() {
                bytes.copy_from_slice(&value(i).to_le_bytes());
            }
        };
        match &self.content {
            Content::Matrix { sigma } => {
                self.format.describe().synthesize(*sigma, &mut || words.next(), out);
            }
            Content::Vector { mean, sigma } => {
                floats(out, Box::new(|_| mean + sigma * words.uniform()));
            }
            Content::Table(table) => {
                let first = usize::try_from(group).unwrap_or(usize::MAX);
                let first = first.saturating_mul(GROUP_ELEMENTS);
                let at = |i| table.get(first.saturating_add(i)).copied().unwrap_or(0.0);
                floats(out, Box::new(at));
            }
        }
    }
}

/// Increment of splitmix64: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of splitmix64 after one increment (Steele, Lea, Flood, "Fast splittable
/// pseudorandom number generators", 2014): a bijection whose output bits all depend on all input
/// bits.
fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(GOLDEN);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Uniform 32-bit words of one group.
struct Words {
    state: u64,
    spare: Option<u32>,
}

impl Words {
    fn new(state: u64) -> Self {
        Self { state, spare: None }
    }

    #[inline]
    fn next(&mut self) -> u32 {
        if let Some(word) = self.spare.take() {
            return word;
        }
        let word = mix64(self.state);
        self.state = self.state.wrapping_add(GOLDEN);
        self.spare = Some((word >> 32) as u32);
        word as u32
    }

    /// Uniform with mean 0 and variance 1: within ±√3.
    fn uniform(&mut self) -> f32 {
        (self.next() as f32 / 2f32.powi(32) - 0.5) * 12f32.sqrt()
    }
}
