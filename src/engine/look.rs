//! What a step wrote, which steps are looked at, and where what they wrote is kept.

use crate::error::{Error, Result};
use crate::ops::{Buf, CacheRef, HostMemory, Op};
use crate::plan::{DecodePlan, Step};
use std::path::{Path, PathBuf};

/// Steps by label.
///
/// ```
/// use decode_graph::session::StepFilter;
///
/// let filter = StepFilter::parse("L03,*.down,lm_head");
/// assert!(filter.selects("L03.attn.norm") && filter.selects("L11.down"));
/// assert!(!filter.selects("L30.attn.norm") && !filter.selects("embed"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepFilter(Vec<String>);

impl StepFilter {
    /// Labels with commas between them: a label, the beginning of one up to a dot (`L03`), or
    /// either with `*` for any text. Every step where there is none.
    pub fn parse(text: &str) -> Self {
        let labels = text.split(',').map(str::trim).filter(|label| !label.is_empty());
        Self(labels.map(str::to_owned).collect())
    }

    /// Whether it asks for the step `label`.
    pub fn selects(&self, label: &str) -> bool {
        let begins = |wanted: &str| {
            let ends = label.match_indices('.').map(|(at, _)| at).chain([label.len()]);
            ends.into_iter().any(|end| matches(wanted, &label[..end]))
        };
        self.0.is_empty() || self.0.iter().any(|wanted| begins(wanted))
    }

    /// Whether it asks for every step.
    pub fn is_all(&self) -> bool {
        self.0.is_empty()
    }
}

/// Whether `text` is `pattern`, in which `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, tail)) = pattern.split_once('*') else { return pattern == text };
    let Some(rest) = text.strip_prefix(head) else { return false };
    let mut cuts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
    cuts.any(|cut| matches(tail, &rest[cut..]))
}

/// Which steps are told about, and where what they wrote is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The steps.
    pub steps: StepFilter,
    /// Folder to which everything that they write goes, a NumPy file a buffer:
    /// `00012-L03.down-hidden.npy` for position 12.
    pub dump: Option<PathBuf>,
}

impl Look {
    /// Keeps what the step `label` wrote at `position`, if that was asked for.
    pub(crate) fn keep(&self, position: u32, label: &str, written: &[Written]) -> Result<()> {
        let Some(folder) = &self.dump else { return Ok(()) };
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, "create", e))?;
        written.iter().try_for_each(|w| {
            let name = format!("{position:05}-{label}-{}.npy", w.name);
            w.write_npy(&folder.join(name.replace('/', "_")))
        })
    }
}

/// What a step wrote to one buffer, or to its row of the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Name of the buffer; `keys` or `values`.
    pub name: String,
    /// `[elements]`; of the cache `[kv_heads, head_dim]`.
    pub values: Vec<f32>,
}

impl Written {
    /// Writes the values as a NumPy file of one dimension, little-endian f32.
    ///
    /// Source: NumPy Enhancement Proposal 1, format version 1.0.
    ///
    /// # Errors
    ///
    /// [`Error::Io`].
    pub fn write_npy(&self, path: &Path) -> Result<()> {
        /// Magic, version and the length of the header.
        const BEFORE: usize = 10;
        let shape = self.values.len();
        let mut header =
            format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape},), }}");
        // Data begin at a multiple of 64 bytes, behind a line feed.
        let end = (BEFORE + header.len() + 1).next_multiple_of(64);
        header.push_str(&" ".repeat(end - BEFORE - header.len() - 1));
        header.push('\n');
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(self.values.iter().flat_map(|v| v.to_le_bytes()));
        std::fs::write(path, bytes).map_err(|e| Error::io(path, "write", e))
    }
}

/// Where what a step wrote is read from.
pub(crate) trait Outputs {
    /// Contents of a workspace buffer.
    fn buffer(&mut self, buf: Buf) -> Result<Vec<f32>>;
    /// Keys and values of a layer.
    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)>;

    /// The buffers that `step` wrote, without those of no meaning outside it.
    fn buffers(&mut self, plan: &DecodePlan, step: &Step) -> Result<Vec<Written>> {
        let writes = step.op.describe().writes().into_iter();
        let named = writes.filter(|buf| !is_scratch(&step.op, *buf)).map(|buf| {
            let name = plan.buffers.get(buf.0 as usize).map_or("", |b| &b.name);
            Ok(Written { name: name.to_owned(), values: self.buffer(buf)? })
        });
        named.collect()
    }

    /// The row of the cache that `step` wrote at `position`, if it did.
    fn row(&mut self, step: &Step, position: u32) -> Result<Vec<Written>> {
        let Some(cache) = written_cache(&step.op) else { return Ok(Vec::new()) };
        let (keys, values) = self.cache(cache.layer)?;
        let pick = |(name, all): (&str, Vec<f32>)| Written {
            name: name.to_owned(),
            values: row_at(&cache, position, &all),
        };
        Ok([("keys", keys), ("values", values)].map(pick).into())
    }

    /// Both.
    fn all(&mut self, plan: &DecodePlan, step: &Step, position: u32) -> Result<Vec<Written>> {
        let mut written = self.buffers(plan, step)?;
        written.extend(self.row(step, position)?);
        Ok(written)
    }
}

impl Outputs for &HostMemory {
    fn buffer(&mut self, buf: Buf) -> Result<Vec<f32>> {
        Ok(self.buf(buf).to_vec())
    }

    fn cache(&mut self, layer: u32) -> Result<(Vec<f32>, Vec<f32>)> {
        let (keys, values) = HostMemory::cache(self, layer);
        Ok((keys.to_vec(), values.to_vec()))
    }
}

/// Whether `buf` is memory in which the blocks of `op` meet, of no meaning outside it.
fn is_scratch(op: &Op, buf: Buf) -> bool {
    match op {
        Op::Attention(a) => buf == a.partial,
        Op::Argmax(a) => buf == a.candidates,
        Op::LmHead(h) => buf == h.argmax.candidates,
        Op::Embed(_)
        | Op::RmsNorm(_)
        | Op::MatVec(_)
        | Op::Rope(_)
        | Op::KvAppend(_)
        | Op::Add(_)
        | Op::Glu(_)
        | Op::Softcap(_)
        | Op::TopK(_)
        | Op::ExpertMatVec(_)
        | Op::ExpertSum(_)
        | Op::Sample(_)
        | Op::Qkv(_)
        | Op::ExpertGateUp(_)
        | Op::NormQkv(_)
        | Op::HeadRope(_)
        | Op::NormAdd(_)
        | Op::Project(_)
        | Op::GateUp(_) => false,
    }
}

/// The cache that `op` writes.
pub(crate) fn written_cache(op: &Op) -> Option<CacheRef> {
    match op {
        Op::KvAppend(a) => Some(a.cache),
        Op::Qkv(q) => Some(q.append.cache),
        Op::HeadRope(h) => Some(h.append.cache),
        Op::Attention(_)
        | Op::Embed(_)
        | Op::RmsNorm(_)
        | Op::MatVec(_)
        | Op::Rope(_)
        | Op::Add(_)
        | Op::Glu(_)
        | Op::Softcap(_)
        | Op::TopK(_)
        | Op::ExpertMatVec(_)
        | Op::ExpertSum(_)
        | Op::Argmax(_)
        | Op::ExpertGateUp(_)
        | Op::NormQkv(_)
        | Op::NormAdd(_)
        | Op::Sample(_)
        | Op::Project(_)
        | Op::GateUp(_)
        | Op::LmHead(_) => None,
    }
}

/// What stands at `position` in `all` of a cache's keys or values, `[kv_heads, head_dim]`.
pub(crate) fn row_at(cache: &CacheRef, position: u32, all: &[f32]) -> Vec<f32> {
    let (dim, capacity) = (cache.head_dim as usize, cache.capacity as usize);
    let starts = (0..cache.kv_heads as usize).map(|h| (h * capacity + position as usize) * dim);
    starts.filter_map(|at| all.get(at..at + dim)).flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::KvType;

    #[test]
    fn rows_of_a_position_are_one_run_a_head() {
        let kind = KvType::F16;
        let cache = CacheRef { layer: 0, kv_heads: 2, head_dim: 4, capacity: 8, kind };
        let all: Vec<f32> = (0u8..64).map(f32::from).collect();
        assert_eq!(row_at(&cache, 3, &all), [12.0, 13.0, 14.0, 15.0, 44.0, 45.0, 46.0, 47.0]);
    }

    #[test]
    fn a_label_is_selected_by_its_whole_its_beginning_up_to_a_dot_or_a_pattern() {
        let f = StepFilter::parse(" L01.attn , L1*.down,head ");
        for label in ["L01.attn", "L01.attn.norm", "L1.down", "L10.down", "head"] {
            assert!(f.selects(label), "{label}");
        }
        for label in ["L01", "L01.attention", "L02.attn", "L10.downwards", "lm_head", "heads"] {
            assert!(!f.selects(label), "{label}");
        }
        assert!(StepFilter::parse("").is_all() && StepFilter::parse(" , ").selects("anything"));
        assert!(StepFilter::parse("*").selects("anything"));
    }

    #[test]
    fn a_numpy_file_is_header_then_values_at_a_multiple_of_64_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let look = Look { steps: StepFilter::default(), dump: Some(folder.path().join("new")) };
        let w = Written { name: "hidden".to_owned(), values: vec![1.5, -2.0, f32::NAN] };
        look.keep(7, "L00.down", &[w]).unwrap();
        let bytes = std::fs::read(folder.path().join("new/00007-L00.down-hidden.npy")).unwrap();
        assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00");
        let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        assert!((10 + header).is_multiple_of(64));
        let text = std::str::from_utf8(&bytes[10..10 + header]).unwrap();
        assert!(text.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }"));
        assert!(text.ends_with('\n'));
        let data: Vec<u8> = [1.5f32, -2.0, f32::NAN].iter().flat_map(|v| v.to_le_bytes()).collect();
        assert_eq!(&bytes[10 + header..], data);
    }
}
