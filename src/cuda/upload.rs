//! Weights from the checkpoint to the device: read, packed and copied, all three at once.
//!
//! ```text
//! device   | weight 0 | weight 1 | …            one allocation, each weight at 256 bytes
//! pieces   |..|..|..|....|..|..|                runs of whole tiles, or one vector
//! window   |--------------|--------------|      what one staging buffer holds
//!
//! pool     read + pack window n+1 (pieces in parallel)   ─┐ two buffers go back and forth
//! copier   copy window n to the device                   ─┘
//! ```
//!
//! A piece is read into memory of its own that stays in a cache, and packed to its place in the
//! window: the file's bytes cross main memory once.

use crate::checkpoint::{Checkpoint, TensorInfo};
use crate::error::{Defect, Error, Result};
use crate::plan::{DecodePlan, WeightSpec};
use crate::quant::{RowOrder, TileLayout, tile};
use rayon::prelude::*;
use std::sync::mpsc;

/// Alignment of a weight on the device, bytes.
pub const ALIGNMENT: u64 = 256;
/// Bytes of a window.
const WINDOW_BYTES: u64 = 64 << 20;
/// Bytes of a piece that is read and packed by one thread.
const PIECE_BYTES: u64 = 1 << 20;

/// Where each weight of a plan stands in the one allocation of them all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightMap {
    /// Byte offset of each weight, in the order of the plan's table.
    pub offsets: Vec<u64>,
    /// Bytes of all.
    pub bytes: u64,
}

/// Bytes of a weight on the device.
fn device_bytes(spec: &WeightSpec) -> Result<u64> {
    let too_large = || Error::Internal(format!("weight {} has no size on the device", spec.name()));
    let bytes = match spec {
        WeightSpec::Matrix { format, rows, columns, .. } => {
            let layout = layout(*format, *rows, *columns);
            layout.tiles().checked_mul(layout.tile_bytes()).map(|b| b as u64)
        }
        WeightSpec::Vector { len, .. } => u64::from(*len).checked_mul(4),
        WeightSpec::Computed { values, .. } => (values.len() as u64).checked_mul(4),
    };
    bytes.filter(|b| *b > 0).ok_or_else(too_large)
}

fn layout(format: crate::quant::QuantFormat, rows: u32, columns: u32) -> TileLayout {
    TileLayout { format, rows: rows as usize, columns: columns as usize }
}

impl WeightMap {
    /// Places the weights of `plan` one after another.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] for a weight without elements.
    pub fn of(plan: &DecodePlan) -> Result<Self> {
        let mut bytes = 0u64;
        let mut offsets = Vec::with_capacity(plan.weights.len());
        for spec in &plan.weights {
            offsets.push(bytes);
            bytes = bytes
                .checked_add(device_bytes(spec)?)
                .and_then(|b| b.checked_next_multiple_of(ALIGNMENT))
                .ok_or_else(|| Error::Internal("the weights do not fit 64 bits".to_owned()))?;
        }
        Ok(Self { offsets, bytes })
    }
}

/// What one thread reads and packs.
struct Piece<'a> {
    /// Byte offset in the allocation.
    to: u64,
    /// Bytes there.
    bytes: u64,
    /// Bytes of the checkpoint, for progress.
    file_bytes: u64,
    what: What<'a>,
}

enum What<'a> {
    /// Rows of a matrix, whole tiles but at its end; `order` permutes within them.
    Rows {
        info: &'a TensorInfo,
        from: u64,
        layout: TileLayout,
        order: RowOrder,
    },
    Vector {
        info: &'a TensorInfo,
    },
    Computed {
        values: &'a [f32],
    },
}

impl Piece<'_> {
    /// The piece is filled soon.
    fn announce(&self, checkpoint: &Checkpoint) {
        match &self.what {
            What::Rows { info, from, .. } => checkpoint.will_read(info, *from, self.file_bytes),
            What::Vector { info } => checkpoint.will_read(info, 0, self.file_bytes),
            What::Computed { .. } => {}
        }
    }

    /// Fills `out` `[bytes]`; `file` is scratch memory.
    fn fill(&self, checkpoint: &Checkpoint, file: &mut Vec<u8>, out: &mut [u8]) -> Result<()> {
        match &self.what {
            What::Rows { info, from, layout, order } => {
                // Grows once; what was read before is overwritten.
                file.resize(self.file_bytes as usize, 0);
                checkpoint.read(info, *from, file)?;
                layout.pack(file, *order, 0, out)
            }
            What::Vector { info } => {
                file.resize(self.file_bytes as usize, 0);
                checkpoint.read(info, 0, file)?;
                let mut values = vec![0.0f32; out.len() / 4];
                info.format.decode_row(file, &mut values);
                out.copy_from_slice(bytemuck::cast_slice(&values));
                Ok(())
            }
            What::Computed { values } => {
                out.copy_from_slice(bytemuck::cast_slice(values));
                Ok(())
            }
        }
    }
}

/// Rows that any order within a head stays inside of, and that are whole tiles.
fn row_step(order: RowOrder) -> u64 {
    let rows = tile::ROWS as u64;
    match order {
        RowOrder::Natural => rows,
        RowOrder::PairHalves { head_dim, .. } => {
            let dim = (head_dim as u64).max(1);
            // The least common multiple of a power of two and `dim`.
            dim * (rows / (1 << dim.trailing_zeros().min(rows.trailing_zeros())))
        }
    }
}

fn tensor<'a>(checkpoint: &'a Checkpoint, name: &str) -> Result<&'a TensorInfo> {
    checkpoint.tensor(name).ok_or_else(|| {
        let why = "the plan names a tensor that is not there";
        Error::invalid(checkpoint.path(), name, None, Defect::MissingTensor, why)
    })
}

/// Cuts the weight `spec`, at byte `to`, into pieces.
fn cut<'a>(
    checkpoint: &'a Checkpoint,
    spec: &'a WeightSpec,
    to: u64,
    pieces: &mut Vec<Piece<'a>>,
) -> Result<()> {
    let mismatch = |info: &TensorInfo, wanted: String| {
        let found = format!("{} {:?}", info.format, info.shape);
        let why = format!("is {found}, the plan expects {wanted}");
        Err(Error::invalid(checkpoint.path(), &info.name, None, Defect::ShapeMismatch, why))
    };
    match spec {
        WeightSpec::Matrix { name, format, rows, columns, order } => {
            let info = tensor(checkpoint, name)?;
            let row_bytes = format.row_bytes(*columns as usize).unwrap_or(0) as u64;
            let fits = info.format == *format
                && info.columns() == u64::from(*columns)
                && info.rows() == u64::from(*rows)
                && row_bytes > 0
                && row_bytes.checked_mul(u64::from(*rows)) == Some(info.bytes)
                && order.permutes(*rows as usize);
            if !fits {
                return mismatch(info, format!("{format} [{columns}, {rows}] in order {order:?}"));
            }
            let tile_bytes = layout(*format, *rows, *columns).tile_bytes() as u64;
            let step = row_step(*order);
            let rows_each = (PIECE_BYTES / (step * row_bytes)).max(1) * step;
            let mut row = 0;
            while row < u64::from(*rows) {
                let count = rows_each.min(u64::from(*rows) - row);
                let layout = layout(*format, count as u32, *columns);
                pieces.push(Piece {
                    to: to + row / tile::ROWS as u64 * tile_bytes,
                    bytes: layout.bytes() as u64,
                    file_bytes: count * row_bytes,
                    what: What::Rows { info, from: row * row_bytes, layout, order: *order },
                });
                row += count;
            }
        }
        WeightSpec::Vector { name, len } => {
            let info = tensor(checkpoint, name)?;
            let elements = info.columns().checked_mul(info.rows());
            if elements != Some(u64::from(*len))
                || info.format.row_bytes(*len as usize).map(|b| b as u64) != Some(info.bytes)
            {
                return mismatch(info, format!("{len} elements"));
            }
            let (bytes, file_bytes) = (u64::from(*len) * 4, info.bytes);
            pieces.push(Piece { to, bytes, file_bytes, what: What::Vector { info } });
        }
        WeightSpec::Computed { values, .. } => {
            let bytes = values.len() as u64 * 4;
            pieces.push(Piece { to, bytes, file_bytes: 0, what: What::Computed { values } });
        }
    }
    Ok(())
}

/// Where the packed weights go.
pub trait Target: Send {
    /// A staging buffer.
    type Buffer: AsMut<[u8]> + Send;
    /// A buffer of `bytes` bytes.
    ///
    /// # Errors
    ///
    /// When there is no memory.
    fn buffer(&self, bytes: u64) -> Result<Self::Buffer>;
    /// Copies the first `bytes` bytes of `buffer` to byte `to` of the weights; returns when they
    /// are there.
    ///
    /// # Errors
    ///
    /// When the copy fails.
    fn copy(&self, buffer: &Self::Buffer, to: u64, bytes: u64) -> Result<()>;
}

/// Packs all weights of `plan` to `target`; `progress` is told (bytes of the checkpoint done, of
/// all).
///
/// # Errors
///
/// Those of [`Checkpoint::read`] and of `target`; [`Error::InvalidModel`] naming the tensor that
/// is not what the plan expects.
pub fn upload<T: Target>(
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    map: &WeightMap,
    target: T,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let mut pieces = Vec::new();
    for (spec, to) in plan.weights.iter().zip(&map.offsets) {
        cut(checkpoint, spec, *to, &mut pieces)?;
    }
    let total = pieces.iter().map(|p| p.file_bytes).sum();
    progress(0, total);
    let windows = windows(&pieces, WINDOW_BYTES);
    let room = windows.iter().map(|w| span(w).1).max().unwrap_or(0);
    let (full, filled) = mpsc::sync_channel::<(T::Buffer, u64, u64)>(1);
    let (empty, emptied) = mpsc::channel::<T::Buffer>();
    for _ in 0..windows.len().min(2) {
        // The receiver is alive.
        let _ = empty.send(target.buffer(room)?);
    }
    std::thread::scope(|scope| {
        let copier = scope.spawn(move || -> Result<()> {
            for (buffer, to, bytes) in filled {
                target.copy(&buffer, to, bytes)?;
                // After the last window nobody takes it any more.
                let _ = empty.send(buffer);
            }
            Ok(())
        });
        let mut done = 0;
        let mut packed = Ok(());
        for (n, window) in windows.iter().enumerate() {
            windows
                .iter()
                .skip(n + 1)
                .take(1)
                .flat_map(|w| w.iter())
                .for_each(|p| p.announce(checkpoint));
            // Without a buffer the copier has failed: its error is told below.
            let Ok(mut buffer) = emptied.recv() else { break };
            packed = pack(checkpoint, window, buffer.as_mut());
            let (to, bytes) = span(window);
            if packed.is_err() || full.send((buffer, to, bytes)).is_err() {
                break;
            }
            done += window.iter().map(|p| p.file_bytes).sum::<u64>();
            progress(done, total);
        }
        drop(full);
        let copied = copier
            .join()
            .unwrap_or_else(|_| Err(Error::Internal("the copy of the weights panicked".into())));
        packed.and(copied)
    })?;
    checkpoint.verify_unchanged()
}

/// First byte and length of a window.
fn span(window: &[Piece<'_>]) -> (u64, u64) {
    match (window.first(), window.last()) {
        (Some(first), Some(last)) => (first.to, last.to + last.bytes - first.to),
        _ => (0, 0),
    }
}

/// Cuts `pieces`, in order of their place, into runs of at most `limit` bytes, or one piece.
fn windows<'p, 'a>(pieces: &'p [Piece<'a>], limit: u64) -> Vec<&'p [Piece<'a>]> {
    let mut windows = Vec::new();
    let mut first = 0;
    for i in 0..=pieces.len() {
        let ends = i == pieces.len() || i > first && span(&pieces[first..=i]).1 > limit;
        if ends && i > first {
            windows.push(&pieces[first..i]);
            first = i;
        }
    }
    windows
}

/// Packs the pieces of a window into `out`, in parallel; what lies between them is not touched.
fn pack(checkpoint: &Checkpoint, window: &[Piece<'_>], out: &mut [u8]) -> Result<()> {
    let (start, _) = span(window);
    let mut rest = out;
    let mut at = start;
    let mut jobs = Vec::with_capacity(window.len());
    for piece in window {
        let bug = || Error::Internal("a piece of a weight is outside its window".to_owned());
        let gap = piece.to.checked_sub(at).ok_or_else(bug)? as usize;
        let (_, behind) = rest.split_at_mut_checked(gap).ok_or_else(bug)?;
        let (out, behind) = behind.split_at_mut_checked(piece.bytes as usize).ok_or_else(bug)?;
        jobs.push((piece, out));
        rest = behind;
        at = piece.to + piece.bytes;
    }
    jobs.into_par_iter()
        .with_max_len(1)
        .try_for_each_init(Vec::new, |file, (piece, out)| piece.fill(checkpoint, file, out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::SyntheticSpec;
    use crate::quant::QuantFormat;
    use parking_lot::Mutex;
    use std::sync::Arc;

    /// The device's memory, and how many buffers were asked for.
    #[derive(Clone)]
    struct Fake(Arc<Mutex<(Vec<u8>, usize)>>);

    impl Target for Fake {
        type Buffer = Vec<u8>;
        fn buffer(&self, bytes: u64) -> Result<Vec<u8>> {
            self.0.lock().1 += 1;
            Ok(vec![0xEE; bytes as usize])
        }
        fn copy(&self, buffer: &Vec<u8>, to: u64, bytes: u64) -> Result<()> {
            let (to, bytes) = (to as usize, bytes as usize);
            let memory = &mut self.0.lock().0;
            let place = memory.get_mut(to..to + bytes);
            let place = place.ok_or_else(|| Error::Internal("beyond the memory".into()))?;
            place.copy_from_slice(&buffer[..bytes]);
            Ok(())
        }
    }

    fn tiny() -> Checkpoint {
        Checkpoint::synthetic(&SyntheticSpec::parse("tiny:q8_0").unwrap()).unwrap()
    }

    fn plan(weights: Vec<WeightSpec>) -> DecodePlan {
        let kind = crate::ops::KvType::F16;
        let cache =
            crate::plan::CacheSpec { layers: 1, kv_heads: 1, head_dim: 16, capacity: 8, kind };
        let mut plan = crate::plan::PlanBuilder::new("test", cache, 8).finish();
        plan.weights = weights;
        plan
    }

    fn matrices(checkpoint: &Checkpoint, order: RowOrder) -> Vec<WeightSpec> {
        let of = |t: &TensorInfo| WeightSpec::Matrix {
            name: t.name.clone(),
            format: t.format,
            rows: t.rows() as u32,
            columns: t.columns() as u32,
            order: if t.name.contains("attn_q") { order } else { RowOrder::Natural },
        };
        checkpoint.tensors().iter().filter(|t| t.shape.len() == 2).map(of).collect()
    }

    #[test]
    fn pieces_in_windows_give_the_same_bytes_as_packing_each_matrix_whole() {
        let checkpoint = tiny();
        let order = RowOrder::PairHalves { head_dim: 16, rotary: 16 };
        let mut weights = matrices(&checkpoint, order);
        weights.push(WeightSpec::Computed { name: "freqs".into(), values: vec![1.5, -2.0, 3.0] });
        let vector = checkpoint.tensors().iter().find(|t| t.shape.len() == 1).unwrap();
        let len = vector.columns() as u32;
        weights.push(WeightSpec::Vector { name: vector.name.clone(), len });
        let plan = plan(weights);
        let map = WeightMap::of(&plan).unwrap();
        let fake = Fake(Arc::new(Mutex::new((vec![0; map.bytes as usize], 0))));
        let mut told = Vec::new();
        upload(&checkpoint, &plan, &map, fake.clone(), &mut |d, t| told.push((d, t))).unwrap();
        let (memory, _) = &*fake.0.lock();
        for (spec, offset) in plan.weights.iter().zip(&map.offsets) {
            assert!(offset.is_multiple_of(ALIGNMENT));
            let expected: Vec<u8> = match spec {
                WeightSpec::Matrix { name, format, rows, columns, order } => {
                    let layout = layout(*format, *rows, *columns);
                    let file = checkpoint.read_all(checkpoint.tensor(name).unwrap()).unwrap();
                    let mut out = vec![0; layout.bytes()];
                    layout.pack(&file, *order, 0, &mut out).unwrap();
                    out
                }
                WeightSpec::Vector { name, len } => {
                    let file = checkpoint.read_all(checkpoint.tensor(name).unwrap()).unwrap();
                    let mut out = vec![0.0f32; *len as usize];
                    vector.format.decode_row(&file, &mut out);
                    bytemuck::cast_slice(&out).to_vec()
                }
                WeightSpec::Computed { values, .. } => bytemuck::cast_slice(values).to_vec(),
            };
            let offset = *offset as usize;
            assert!(memory[offset..offset + expected.len()] == expected, "{}", spec.name());
        }
        assert_eq!(told[0].0, 0);
        let last = told.last().unwrap();
        assert_eq!(last.0, last.1, "progress ends at the total");
    }

    #[test]
    fn windows_hold_every_piece_once_in_order_and_none_is_above_the_limit() {
        let values = [0.0];
        let piece = |i: u64| Piece {
            to: i * 256,
            bytes: 200,
            file_bytes: 0,
            what: What::Computed { values: &values },
        };
        let pieces: Vec<_> = (0..17).map(piece).collect();
        for limit in [1, 256, 700, 1000, 1 << 20] {
            let windows = windows(&pieces, limit);
            let flat: Vec<u64> = windows.iter().flat_map(|w| w.iter().map(|p| p.to)).collect();
            assert_eq!(flat, (0..17).map(|i| i * 256).collect::<Vec<_>>(), "limit {limit}");
            assert!(windows.iter().all(|w| w.len() == 1 || span(w).1 <= limit));
        }
        assert!(windows(&[], 10).is_empty());
    }

    #[test]
    fn a_piece_of_a_permuted_matrix_is_whole_heads_and_whole_tiles() {
        assert_eq!(row_step(RowOrder::Natural), 16);
        for head_dim in [8, 16, 24, 64, 80, 96, 128] {
            let step = row_step(RowOrder::PairHalves { head_dim, rotary: 8 });
            assert!(step.is_multiple_of(16) && step.is_multiple_of(head_dim as u64), "{step}");
        }
    }

    #[test]
    fn a_tensor_of_another_shape_or_no_tensor_is_refused_by_name_before_anything_is_copied() {
        let checkpoint = tiny();
        let fake = Fake(Arc::new(Mutex::new((vec![], 0))));
        let mut weights = matrices(&checkpoint, RowOrder::Natural);
        if let WeightSpec::Matrix { rows, .. } = &mut weights[1] {
            *rows -= 16;
        }
        let name = weights[1].name().to_owned();
        let wrong = plan(weights);
        let map = WeightMap::of(&wrong).unwrap();
        let error = upload(&checkpoint, &wrong, &map, fake.clone(), &mut |_, _| {}).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(&name), "{error}");
        let absent = plan(vec![WeightSpec::Vector { name: "no.such".into(), len: 4 }]);
        let map = WeightMap::of(&absent).unwrap();
        let error = upload(&checkpoint, &absent, &map, fake.clone(), &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("no.such"), "{error}");
        assert_eq!(fake.0.lock().1, 0, "no buffer was asked for");
        let empty = plan(vec![WeightSpec::Computed { name: "none".into(), values: vec![] }]);
        assert!(WeightMap::of(&empty).unwrap_err().to_string().contains("none"));
        let _ = QuantFormat::ALL;
    }

    #[test]
    fn a_copy_that_fails_ends_the_upload_with_its_error() {
        let checkpoint = tiny();
        let plan = plan(matrices(&checkpoint, RowOrder::Natural));
        let map = WeightMap::of(&plan).unwrap();
        let fake = Fake(Arc::new(Mutex::new((vec![0; 16], 0))));
        let error = upload(&checkpoint, &plan, &map, fake, &mut |_, _| {}).unwrap_err();
        assert!(error.to_string().contains("beyond the memory"), "{error}");
    }
}
