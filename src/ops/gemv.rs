//! Geometry and argument lists of the matrix-vector kernels, shared by every op that has one.
//!
//! One block of eight warps per multiprocessor takes a contiguous run of tiles ([`tile`]); its
//! warps take the units of a tile in turn, each through a private ring of units in shared memory,
//! and the eight partial sums are added in a fixed order. Shared memory, in this order:
//!
//! ```text
//! barriers   WARPS × MAX_SLOTS × 8
//! ring       WARPS × slots × unit bytes
//! activations, staged for the format's dot kind, one record per unit
//! sums       2 × FLUSH tiles × WARPS × 16 rows × 4
//! ```
//!
//! The kernels (`ptx/gemv.cuh`) compute the same offsets from the same arguments.

use super::{Arg, Buf, Gpu, Launch, MatVec, RmsNorm};
use crate::quant::{DotKind, QuantFormat, TileLayout, tile};

/// Warps of a block.
pub const WARPS: u32 = 8;
/// Ring slots of a warp, at most.
pub const MAX_SLOTS: u32 = 16;
/// Tiles whose partial sums are held before they are added up.
pub const FLUSH: u32 = 8;
/// Bytes of a block's ring, at most. With [`SLOTS`] it leaves room for the next kernel's block on
/// the same multiprocessor; a larger ring only delays the activations (measured: PERF.md).
pub const RING_BYTES: u32 = 72 * 1024;
/// Ring slots of a warp that geometry aims at.
pub const SLOTS: u32 = 3;
/// Bytes of a block's ring that are asked for before the activations are staged.
pub const EARLY_BYTES: u32 = 40 * 1024;
/// Shared memory of a block, at least: more than a third of a multiprocessor's, so that exactly
/// two blocks (of two successive kernels) share it, never two of one kernel and one of the next.
pub const LEAST_SHARED_BYTES: u32 = 78 * 1024;

/// Bytes of the staged activations of one unit.
pub fn activation_bytes(format: QuantFormat) -> u32 {
    let columns = format.describe().unit_columns() as u32;
    match format.describe().dot_kind() {
        // High bytes, 16 bytes apart from the low ones so that they fall into other banks, sums
        // of 16 columns, scale.
        DotKind::Integer => 2 * columns + 16 + columns / 16 * 4 + 16,
        // Three 16-bit terms, each followed by 16 bytes for the banks, and a scale.
        DotKind::Half => 3 * (2 * columns + 16) + 16,
        DotKind::Single => 4 * columns,
    }
}

/// Geometry of a product whose matrices have `formats` (all of one dot kind) and `columns`
/// columns, and together `tiles` tiles of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks.
    pub grid: u32,
    /// Ring slots of a warp.
    pub slots: u32,
    /// Slots that are filled before the activations are staged.
    pub early: u32,
    /// Dynamic shared memory, bytes.
    pub shared_bytes: u32,
}

impl Geometry {
    /// The geometry for `tiles` single tiles.
    pub fn new(gpu: &Gpu, formats: &[QuantFormat], columns: u32, tiles: u32) -> Self {
        Self::of_items(gpu, formats, columns, tiles, 1)
    }

    /// The geometry for `items` pairs of tiles of one format.
    pub fn paired(gpu: &Gpu, format: QuantFormat, columns: u32, items: u32) -> Self {
        Self::of_items(gpu, &[format], columns, items, 2)
    }

    fn of_items(gpu: &Gpu, formats: &[QuantFormat], columns: u32, items: u32, each: u32) -> Self {
        let layout =
            |f: &QuantFormat| TileLayout { format: *f, rows: 16, columns: columns as usize };
        let unit = formats.iter().map(|f| layout(f).unit_bytes() as u32).max().unwrap_or(16);
        let units = formats.iter().map(|f| layout(f).units() as u32).max().unwrap_or(1);
        let stage = formats.iter().map(|f| activation_bytes(*f)).max().unwrap_or(0) * units;
        let grid = gpu.sms.min(items).max(1);
        let per_warp = (items.div_ceil(grid) * each * units).div_ceil(WARPS);
        let sums = (2 * FLUSH * WARPS * tile::ROWS as u32 + WARPS) * 4;
        let fixed = WARPS * MAX_SLOTS * 8 + stage + sums;
        // A block reserves a kilobyte beside what it asks for. Two blocks must fit, unless the
        // activations alone leave no room for two slots a warp.
        let half = (gpu.shared_per_block / 2).saturating_sub(1024);
        let budget = if half > fixed + WARPS * unit * 2 { half } else { gpu.shared_per_block };
        let room = budget.saturating_sub(fixed).min(RING_BYTES) / (WARPS * unit);
        let slots = room.min(per_warp).clamp(1, SLOTS);
        let early = (EARLY_BYTES / (WARPS * unit)).clamp(1, slots);
        let used = fixed + WARPS * slots * unit;
        let shared_bytes = used.max(LEAST_SHARED_BYTES.min(gpu.shared_per_block));
        Self { grid, slots, early, shared_bytes }
    }
}

/// Tiles of a matrix of `rows` rows.
pub fn tiles(rows: u32) -> u32 {
    rows.div_ceil(tile::ROWS as u32)
}

/// A pointer argument, or null.
pub fn optional(v: Option<super::Vector>) -> Arg {
    v.map_or(Arg::Null, |v| Arg::Weight(v.id))
}

/// Leading arguments of a kernel that normalises its input: gain and epsilon.
pub(super) fn norm_args(norm: &RmsNorm) -> [Arg; 2] {
    [Arg::Weight(norm.gain.id), Arg::F32(norm.eps)]
}

/// Launch of a kernel of the module `gemv_<format>`.
pub(super) fn launch_with(
    gpu: &Gpu,
    module: String,
    kernel: String,
    geometry: Geometry,
    mut args: Vec<Arg>,
) -> Launch {
    args.extend([Arg::U32(geometry.slots), Arg::U32(geometry.early)]);
    Launch {
        module,
        kernel,
        grid: geometry.grid,
        block: WARPS * 32,
        cluster: 1,
        shared_bytes: geometry.shared_bytes,
        programmatic: gpu.is_hopper_or_later(),
        args,
    }
}

/// Launch of `<name>_<format>` for one matrix without norm: `matvec`, `o_proj`, `down`.
pub(super) fn launch(
    gpu: &Gpu,
    name: &str,
    residual: Option<Buf>,
    mat: &MatVec,
    out: Buf,
) -> Launch {
    let w = &mat.weight;
    let f = w.format.suffix();
    let geometry = Geometry::new(gpu, &[w.format], w.columns, tiles(w.rows));
    let args = vec![
        Arg::Step,
        Arg::Buf(mat.x),
        Arg::Weight(w.id),
        optional(mat.bias),
        residual.map_or(Arg::Null, Arg::Buf),
        Arg::Buf(out),
        Arg::U32(w.rows),
        Arg::U32(w.columns),
    ];
    launch_with(gpu, format!("gemv_{f}"), format!("{name}_{f}"), geometry, args)
}
