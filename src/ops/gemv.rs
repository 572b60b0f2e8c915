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
/// Bytes of the ring of a block that geometry aims at: two blocks share a multiprocessor, and a
/// ring beyond what memory delivers while a block waits only delays the activations.
pub const RING_BYTES: u32 = 80 * 1024;

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
        let fixed = WARPS * MAX_SLOTS * 8 + stage + 2 * FLUSH * WARPS * tile::ROWS as u32 * 4 + 64;
        // Two blocks and their reserved kilobyte each must fit a multiprocessor, unless one alone
        // already takes more than half of it.
        let half = (gpu.shared_per_block / 2).saturating_sub(1024);
        let budget = if half > fixed + WARPS * unit * 2 { half } else { gpu.shared_per_block };
        let room = budget.saturating_sub(fixed).min(RING_BYTES) / (WARPS * unit);
        let slots = room.min(per_warp).clamp(1, MAX_SLOTS);
        Self { grid, slots, shared_bytes: fixed + WARPS * slots * unit }
    }
}

/// Tiles of a matrix of `rows` rows.
pub fn tiles(rows: u32) -> u32 {
    rows.div_ceil(tile::ROWS as u32)
}

/// A pointer argument, or null.
pub(super) fn optional(v: Option<super::Vector>) -> Arg {
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
    args.push(Arg::U32(geometry.slots));
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
