//! The device layout of a matrix: tiles of 16 rows, each a run of *units* of up to 256 columns.
//!
//! ```text
//! matrix [rows, columns]  =  tile 0 | tile 1 | …            a tile is 16 rows
//! tile                    =  unit 0 | unit 1 | … | tail     a unit is unit_columns columns
//! unit                    =  planes: quants, high bits, scales; contiguous, a multiple of 16 B
//! ```
//!
//! One warp multiplies one unit. Within a unit, lane `4g + t` (g = 0..8, t = 0..4) finds its
//! fragment of `mma.m16n8k32` in its own 16-byte words: rows `g` and `g + 8`, columns `4t..4t+4`
//! and `16 + 4t..16 + 4t + 4` of each 32-column step. A unit holds exactly the file's bytes
//! (columns padded to a multiple of [`COLUMN_STEP`], rows to a multiple of [`ROWS`]).

use super::QuantFormat;
use crate::error::{Error, Result};
use rayon::prelude::*;

/// Rows of a tile.
pub const ROWS: usize = 16;

/// Granularity of the columns of a unit.
pub const COLUMN_STEP: usize = 64;

/// The order in which a matrix's rows are laid into tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// Row `r` of the tiles is row `r` of the matrix.
    Natural,
    /// Within each head of `head_dim` rows the two partners of a NEOX rotation are neighbours:
    /// rows `2i` and `2i + 1` of the tiles are rows `i` and `i + rotary / 2` of the head for
    /// `i < rotary / 2`; rows from `rotary` on stay.
    PairHalves {
        /// Rows of a head.
        head_dim: usize,
        /// Rows of a head that are rotated; even.
        rotary: usize,
    },
}

impl RowOrder {
    /// Whether every one of `rows` matrix rows stands at exactly one tile row below `rows`.
    pub fn permutes(self, rows: usize) -> bool {
        match self {
            Self::Natural => true,
            Self::PairHalves { head_dim, rotary } => {
                head_dim > 0
                    && rows.is_multiple_of(head_dim)
                    && rotary <= head_dim
                    && rotary.is_multiple_of(2)
            }
        }
    }

    /// The matrix row that stands at tile row `r`, for an order that [permutes](Self::permutes).
    pub fn source(self, r: usize) -> usize {
        match self {
            Self::Natural => r,
            Self::PairHalves { head_dim, rotary } => {
                let (head, i) = (r / head_dim, r % head_dim);
                let i = if i < rotary { i / 2 + (i % 2) * (rotary / 2) } else { i };
                head * head_dim + i
            }
        }
    }
}

/// Where everything of one matrix is on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileLayout {
    /// Weight format.
    pub format: QuantFormat,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
}

impl TileLayout {
    /// Tiles of 16 rows, the last one padded with zeros.
    pub fn tiles(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Units of a tile, the tail included.
    pub fn units(&self) -> usize {
        self.columns.div_ceil(self.format.describe().unit_columns())
    }

    /// Columns of the last unit of a tile, a multiple of [`COLUMN_STEP`].
    pub fn tail_columns(&self) -> usize {
        let full = self.format.describe().unit_columns();
        let before = self.units().saturating_sub(1) * full;
        (self.columns - before).next_multiple_of(COLUMN_STEP).min(full)
    }

    /// Bytes of a full unit.
    pub fn unit_bytes(&self) -> usize {
        let f = self.format.describe();
        f.unit_bytes(f.unit_columns())
    }

    /// Bytes of the last unit of a tile.
    pub fn tail_bytes(&self) -> usize {
        self.format.describe().unit_bytes(self.tail_columns())
    }

    /// Bytes of a tile.
    pub fn tile_bytes(&self) -> usize {
        self.units().saturating_sub(1) * self.unit_bytes() + self.tail_bytes()
    }

    /// Bytes of the matrix on the device.
    pub fn bytes(&self) -> usize {
        self.tiles() * self.tile_bytes()
    }

    /// Packs tiles `first..` of the matrix into `out`, whose length is a whole number of tiles,
    /// in parallel. `file` is the whole matrix as in the file, `[rows, row_bytes]`.
    ///
    /// # Errors
    /// [`Error::Internal`] when the sizes do not fit one another or `order` is no permutation of
    /// the rows; nothing is written then.
    pub fn pack(&self, file: &[u8], order: RowOrder, first: usize, out: &mut [u8]) -> Result<()> {
        let row_bytes = self.check(file, order, first, out)?;
        if out.is_empty() {
            return Ok(());
        }
        let f = self.format.describe();
        let unit_row = f.unit_columns() / f.block_elements() * f.block_bytes();
        let (units, unit_bytes, tail_columns) =
            (self.units(), self.unit_bytes(), self.tail_columns());
        out.par_chunks_exact_mut(self.tile_bytes()).enumerate().for_each(|(i, tile)| {
            let mut rows: [&[u8]; ROWS] = [&[]; ROWS];
            for (r, row) in rows.iter_mut().enumerate() {
                let r = (first + i) * ROWS + r;
                if r < self.rows {
                    let r = order.source(r);
                    *row = &file[r * row_bytes..(r + 1) * row_bytes];
                }
            }
            for (u, unit) in tile.chunks_mut(unit_bytes).enumerate() {
                let part = rows.map(|row| {
                    let from = (u * unit_row).min(row.len());
                    &row[from..(from + unit_row).min(row.len())]
                });
                let columns = if u + 1 == units { tail_columns } else { f.unit_columns() };
                f.pack_unit(&part, columns, unit);
            }
        });
        Ok(())
    }

    /// Bytes of a row of the file, once everything that [`Self::pack`] slices by fits.
    fn check(&self, file: &[u8], order: RowOrder, first: usize, out: &[u8]) -> Result<usize> {
        let bug = |what: String| Err(Error::Internal(format!("packing {self:?}: {what}")));
        let Some(row_bytes) = self.format.row_bytes(self.columns) else {
            return bug("a row is no whole number of blocks".into());
        };
        if row_bytes.checked_mul(self.rows) != Some(file.len()) {
            return bug(format!("rows of {row_bytes} bytes, but {} bytes are given", file.len()));
        }
        if !order.permutes(self.rows) {
            return bug(format!("{order:?} is no permutation of the rows"));
        }
        let left = self.tiles().saturating_sub(first).saturating_mul(self.tile_bytes());
        let whole = out.is_empty() || out.len().checked_rem(self.tile_bytes()) == Some(0);
        if !whole || out.len() > left {
            let tile = self.tile_bytes();
            return bug(format!(
                "room for {} bytes, but tiles of {tile} bytes and {left} bytes are left from tile {first}",
                out.len()
            ));
        }
        Ok(row_bytes)
    }
}
