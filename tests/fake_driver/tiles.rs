//! Weights in the device layout, taken back to the bytes of the file.
//!
//! Packing moves bits and changes none. Which bit goes where is found out by packing matrices whose
//! bits are known: bit `i` of matrix `k` is bit `k` of the number `i`. So a new format needs nothing
//! here.

use decode_graph::quant::{QuantFormat, RowOrder, TileLayout, tile};
use std::collections::HashMap;
use std::sync::Arc;

/// A bit of a tile that is padding.
const PADDING: u32 = u32::MAX;

/// For each bit of a tile, the bit of 16 rows of the file.
#[derive(Default)]
pub(super) struct Tiles {
    known: HashMap<(QuantFormat, usize), Arc<[u32]>>,
}

fn bit(bytes: &[u8], i: usize) -> bool {
    bytes[i / 8] >> (i % 8) & 1 == 1
}

impl Tiles {
    fn sources(&mut self, format: QuantFormat, columns: usize) -> Arc<[u32]> {
        let found = self.known.entry((format, columns));
        found.or_insert_with(|| sources(format, columns)).clone()
    }

    /// The file's bytes, `[rows, row_bytes]`, of a packed matrix.
    pub(super) fn unpack(
        &mut self,
        layout: &TileLayout,
        order: RowOrder,
        packed: &[u8],
    ) -> Vec<u8> {
        let sources = self.sources(layout.format, layout.columns);
        let row_bytes = layout.format.row_bytes(layout.columns).expect("whole blocks");
        let mut file = vec![0u8; layout.rows * row_bytes];
        let mut rows = vec![0u8; tile::ROWS * row_bytes];
        for (t, tile) in packed.chunks_exact(layout.tile_bytes()).enumerate() {
            rows.fill(0);
            for (to, from) in sources.iter().enumerate().filter(|(_, from)| **from != PADDING) {
                if bit(tile, to) {
                    rows[*from as usize / 8] |= 1 << (from % 8);
                }
            }
            for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
                let r = t * tile::ROWS + r;
                if r < layout.rows {
                    let at = order.source(r) * row_bytes;
                    file[at..at + row_bytes].copy_from_slice(row);
                }
            }
        }
        file
    }
}

fn sources(format: QuantFormat, columns: usize) -> Arc<[u32]> {
    let layout = TileLayout { format, rows: tile::ROWS, columns };
    let bytes = tile::ROWS * format.row_bytes(columns).expect("whole blocks");
    let packed = |value: &dyn Fn(usize) -> bool| {
        let byte = |at: usize| (0..8).fold(0u8, |b, i| b | u8::from(value(8 * at + i)) << i);
        let file: Vec<u8> = (0..bytes).map(byte).collect();
        let mut out = vec![0; layout.bytes()];
        layout.pack(&file, RowOrder::Natural, 0, &mut out).expect("sizes fit");
        out
    };
    let used = packed(&|_| true);
    let start = |i| if bit(&used, i) { 0 } else { PADDING };
    let mut sources: Vec<u32> = (0..8 * used.len()).map(start).collect();
    for k in 0..(8 * bytes).next_power_of_two().trailing_zeros() {
        let layer = packed(&|i| i >> k & 1 == 1);
        for (i, source) in sources.iter_mut().enumerate().filter(|(_, s)| **s != PADDING) {
            *source |= u32::from(bit(&layer, i)) << k;
        }
    }
    let mut all: Vec<u32> = sources.iter().copied().filter(|s| *s != PADDING).collect();
    all.sort_unstable();
    let every = all.iter().zip(0..).all(|(s, i)| *s == i) && all.len() == 8 * bytes;
    assert!(every, "{format}: packing does more than move bits");
    sources.into()
}
