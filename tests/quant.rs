//! Weight formats: decoding against the GGUF reference, the device layout, synthetic weights.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

use decode_graph::error::Error;
use decode_graph::quant::{DotKind, QuantFormat, RowOrder, TileLayout};
use half::{bf16, f16};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Word `i` of the random stream `seed`; `tests/golden/make_quant_vectors.py` has the same.
fn word(seed: u32, i: u32) -> u32 {
    let mut x = i.wrapping_mul(0x9e37_79b9).wrapping_add(seed);
    x ^= x >> 16;
    x = x.wrapping_mul(0x85eb_ca6b);
    x ^= x >> 13;
    x = x.wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

/// Bytes `first..first + count` of the stream; `first` a multiple of 4.
fn stream(seed: u32, first: usize, count: usize) -> Vec<u8> {
    let words = (first / 4) as u32..(first + count).div_ceil(4) as u32;
    let words: Vec<u32> = words.map(|i| word(seed, i).to_le()).collect();
    let mut bytes = bytemuck::cast_slice(&words).to_vec();
    bytes.truncate(count);
    bytes
}

/// Bits of a value, every NaN alike.
fn bits(value: f32) -> u32 {
    if value.is_nan() { 0x7fc0_0000 } else { value.to_bits() }
}

fn decoded(format: QuantFormat, blocks: &[u8]) -> Vec<f32> {
    let f = format.describe();
    let mut out = vec![0.0; blocks.len() / f.block_bytes() * f.block_elements()];
    format.decode_row(blocks, &mut out);
    out
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn f16_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()).to_f32()
}

#[test]
fn decode_equals_the_gguf_reference_bit_for_bit_on_special_scales() {
    let mut golden = &include_bytes!("golden/quant_vectors.bin")[..];
    for format in QuantFormat::ALL {
        let f = format.describe();
        assert_eq!(u32_at(golden, 0), f.ggml_id());
        let count = u32_at(golden, 4) as usize;
        let (blocks, rest) = golden[8..].split_at(count * f.block_bytes());
        let (expected, rest) = rest.split_at(4 * count * f.block_elements());
        golden = rest;
        let values = decoded(format, blocks);
        let seen = |is: fn(f32) -> bool| values.iter().any(|v| is(*v));
        // Powers of two have neither; f16 scales give no subnormal f32.
        let power = format == QuantFormat::Mxfp4;
        assert!(power || seen(f32::is_nan) && seen(f32::is_infinite), "{format}: no edge");
        let wide = power || matches!(format, QuantFormat::F32 | QuantFormat::Bf16);
        assert!(seen(|v| v == 0.0) && (!wide || seen(f32::is_subnormal)), "{format}: no edge");
        for (i, value) in values.into_iter().enumerate() {
            let (block, element) = (i / f.block_elements(), i % f.block_elements());
            let (got, want) = (bits(value), u32_at(expected, 4 * i));
            assert_eq!(got, want, "{format} block {block} element {element}: {got:08x} {want:08x}");
        }
    }
    assert!(golden.is_empty());
}

#[test]
fn decode_equals_the_gguf_reference_bit_for_bit_on_a_million_blocks() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("golden/quant_digests.json")).unwrap();
    let size = |key: &str| golden[key].as_u64().unwrap() as usize;
    let (blocks, chunk) = (size("blocks"), size("chunk"));
    for format in QuantFormat::ALL {
        let (seed, bytes) = (format.describe().ggml_id(), chunk * format.describe().block_bytes());
        let digests: Vec<_> = (0..blocks / chunk)
            .into_par_iter()
            .map(|i| {
                let mut digest = Sha256::new();
                let values = decoded(format, &stream(seed, i * bytes, bytes));
                for values in values.chunks(1024) {
                    let values: Vec<u32> = values.iter().map(|v| bits(*v).to_le()).collect();
                    digest.update(bytemuck::cast_slice(&values));
                }
                digest.finalize()
            })
            .collect();
        let whole = Sha256::digest(digests.concat());
        let whole: String = whole.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(golden["types"][format.name()], whole, "{format}");
    }
}

/// Where one weight stands: unit, its columns, row and column in it.
struct Place<'a> {
    unit: &'a [u8],
    columns: usize,
    row: usize,
    column: usize,
}

fn place<'a>(layout: &TileLayout, packed: &'a [u8], row: usize, column: usize) -> Place<'a> {
    let full = layout.format.describe().unit_columns();
    let index = column / full;
    let from = row / 16 * layout.tile_bytes() + index * layout.unit_bytes();
    let (columns, bytes) = if index + 1 == layout.units() {
        (layout.tail_columns(), layout.tail_bytes())
    } else {
        (full, layout.unit_bytes())
    };
    Place { unit: &packed[from..from + bytes], columns, row: row % 16, column: column % full }
}

/// The weight as a kernel finds it, by the layout's definition.
fn unpacked(format: QuantFormat, at: &Place<'_>) -> f32 {
    use QuantFormat::*;
    let Place { unit, columns, row, column } = *at;
    let (g, hi, steps) = (row % 8, row / 8, columns / 32);
    let (s, half, t, b) = (column / 32, column / 16 % 2, column / 4 % 4, column % 4);
    let (lane, r) = (4 * g + t, 2 * half + hi);
    let quants = if format == Q8_0 { 512 } else { 256 } * steps;
    let nibble = || {
        let byte = unit[s / 2 * 512 + lane * 16 + 4 * (2 * (s % 2) + half) + b];
        i32::from((byte >> (4 * hi)) & 15)
    };
    let fifth = || {
        let word = u32_at(unit, quants + s / 2 * 128 + lane * 4);
        16 * ((word >> (8 * b + 4 * (s % 2) + r)) & 1) as i32
    };
    let bit_pair = |from: usize| {
        let word = u32_at(unit, from + s / 4 * 512 + lane * 16 + 4 * (s % 4));
        ((word >> (8 * b + 2 * r)) & 3) as i32
    };
    // Byte of a sub-block of 16.
    let sixteenth = |from: usize| {
        let sub = column / 16;
        unit[from + 8 * (4 * g + sub % 4) + 4 * hi + sub / 4]
    };
    // Field `i` of four 6-bit ones of lane 4g + t.
    let six_bits = |from: usize, t: usize, i: usize| {
        let lane = 4 * g + t;
        let byte = unit[from + 4 * lane + i];
        if hi == 0 {
            return f32::from(byte & 63);
        }
        let low = unit[from + 128 + 2 * lane + i % 2] >> (4 * (i / 2)) & 15;
        f32::from(low | (byte >> 6 << 4))
    };
    let code = || {
        let at = s * 256 + lane * 8 + 4 * half + 2 * hi + b / 2;
        usize::from((unit[at] >> (4 * (b % 2))) & 15)
    };
    let half_of = |from: usize| f16_at(unit, from + s * 32 + 4 * g + 2 * hi);
    let k_scaled = |from: usize, q: i32| {
        let field = |i: usize| six_bits(from, s % 4, i);
        let halves = from + 192 + 8 * g + 4 * hi;
        let (d, dmin) = (f16_at(unit, halves), f16_at(unit, halves + 2));
        d * field(s / 4 * 2) * q as f32 - dmin * field(s / 4 * 2 + 1)
    };
    match format {
        F32 => {
            let (i, t, b) = (column / 16, column / 4 % 4, column % 4);
            f32::from_bits(u32_at(unit, (2 * i + hi) * 512 + (4 * g + t) * 16 + 4 * b))
        }
        F16 | Bf16 => {
            let (k, t, b) = (column / 16, column / 4 % 4, column % 4);
            let word = u32_at(unit, k * 512 + (4 * g + t) * 16 + 4 * (b / 2 * 2 + hi));
            let bits = (word >> (16 * (b % 2))) as u16;
            if format == F16 {
                f16::from_bits(bits).to_f32()
            } else {
                bf16::from_bits(bits).to_f32()
            }
        }
        Q4_0 => half_of(quants) * (nibble() - 8) as f32,
        Q4_1 => half_of(quants) * nibble() as f32 + half_of(quants + steps * 32),
        Q5_0 => half_of(quants + steps * 64) * (nibble() + fifth() - 16) as f32,
        Q5_1 => {
            let d = quants + steps * 64;
            half_of(d) * (nibble() + fifth()) as f32 + half_of(d + steps * 32)
        }
        Q8_0 => half_of(quants) * f32::from(unit[s * 512 + lane * 16 + 4 * r + b] as i8),
        Q4K => k_scaled(quants, nibble()),
        Q5K => k_scaled(quants + 512, nibble() + fifth()),
        Q6K => {
            let q = nibble() + 16 * bit_pair(quants);
            let d = f16_at(unit, quants + 1024 + 256 + 4 * g + 2 * hi);
            d * f32::from(sixteenth(quants + 1024) as i8) * (q - 32) as f32
        }
        Q2K => {
            let field = sixteenth(1024);
            let halves = 1024 + 256 + 8 * g + 4 * hi;
            let (d, dmin) = (f16_at(unit, halves), f16_at(unit, halves + 2));
            d * f32::from(field & 15) * bit_pair(0) as f32 - dmin * f32::from(field >> 4)
        }
        Q3K => {
            let word = u32_at(unit, 1024 + s / 2 * 128 + lane * 4);
            let q = bit_pair(0) + 4 * ((word >> (8 * b + 4 * (s % 2) + r)) & 1) as i32;
            let scale = six_bits(1024 + 512, column / 16 % 4, column / 64) - 32.0;
            f16_at(unit, 1024 + 512 + 192 + 4 * g + 2 * hi) * scale * (q - 4) as f32
        }
        Iq4Nl => half_of(quants) * KV[code()],
        Mxfp4 => {
            let e = i32::from(unit[quants + s * 16 + 2 * g + hi]);
            (2f64.powi(e - 128) * f64::from(FP4[code()])) as f32
        }
        Iq4Xs => {
            let (lane, i) = (4 * g + s % 4, 2 * hi + s / 4);
            let low = unit[quants + 2 * lane + i / 2] >> (4 * (i % 2)) & 15;
            let high = (unit[quants + 64 + lane] >> (2 * i)) & 3;
            let scale = f32::from(low | (high << 4)) - 32.0;
            f16_at(unit, quants + 64 + 32 + 4 * g + 2 * hi) * scale * KV[code()]
        }
    }
}

const KV: [f32; 16] =
    [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
const FP4: [f32; 16] = [0., 1., 2., 3., 4., 6., 8., 12., 0., -1., -2., -3., -4., -6., -8., -12.];

fn check_lossless(format: QuantFormat, rows: usize, columns: usize, order: RowOrder) {
    let layout = TileLayout { format, rows, columns };
    let row_bytes = format.row_bytes(columns).unwrap();
    let file = stream(rows as u32, 0, rows * row_bytes);
    let mut packed = vec![0xa5; layout.bytes()];
    layout.pack(&file, order, 0, &mut packed).unwrap();

    let decoded: Vec<_> = file.chunks(row_bytes).map(|row| decoded(format, row)).collect();
    let units = layout.units();
    let padded = (units - 1) * format.describe().unit_columns() + layout.tail_columns();
    let want = |row: usize, column: usize| {
        (row < rows && column < columns).then(|| decoded[order.source(row)][column])
    };
    for row in 0..rows.next_multiple_of(16) {
        for column in 0..padded {
            let got = unpacked(format, &place(&layout, &packed, row, column));
            let right = want(row, column).map_or(got == 0.0, |want| bits(got) == bits(want));
            assert!(right, "{layout:?} {order:?}: row {row} column {column} is {got}");
        }
    }
}

#[test]
fn packing_loses_nothing_on_ragged_rows_and_columns() {
    for format in QuantFormat::ALL {
        let columns: &[usize] = match format.describe().block_elements() {
            1 => &[1, 33, 64, 100, 200, 576, 1536],
            32 => &[32, 64, 96, 224, 288, 320, 576, 1536, 4096],
            _ => &[256, 1536, 4096],
        };
        for &columns in columns {
            for rows in [1, 8, 16, 37] {
                check_lossless(format, rows, columns, RowOrder::Natural);
            }
        }
    }
}

#[test]
fn pair_order_puts_rotation_partners_side_by_side_and_loses_nothing() {
    let order = RowOrder::PairHalves { head_dim: 24, rotary: 16 };
    let head: Vec<_> = (24..48).map(|r| order.source(r)).collect();
    let (rotated, rest) = head.split_at(16);
    assert!(rotated.chunks(2).enumerate().all(|(i, p)| p == [24 + i, 24 + i + 8]), "{head:?}");
    assert!(rest.iter().copied().eq(40..48), "{head:?}");
    for format in QuantFormat::ALL {
        check_lossless(format, 72, 512, order);
    }
}

#[test]
fn a_part_of_the_tiles_packs_as_in_the_whole() {
    for format in [QuantFormat::Q5_1, QuantFormat::Q6K, QuantFormat::F32] {
        let layout = TileLayout { format, rows: 75, columns: 768 };
        let file = stream(1, 0, 75 * format.row_bytes(768).unwrap());
        let mut whole = vec![0; layout.bytes()];
        layout.pack(&file, RowOrder::Natural, 0, &mut whole).unwrap();
        let (from, to) = (2 * layout.tile_bytes(), 4 * layout.tile_bytes());
        let mut part = vec![0; to - from];
        layout.pack(&file, RowOrder::Natural, 2, &mut part).unwrap();
        assert!(part == whole[from..to], "{format}");
    }
}

#[test]
fn units_have_the_sizes_that_kernels_assume() {
    use QuantFormat::*;
    let per_step = [(Q4_0, 288), (Q4_1, 320), (Q5_0, 352), (Q5_1, 384), (Q8_0, 544)];
    for (format, bytes) in per_step.into_iter().chain([(Iq4Nl, 288), (Mxfp4, 272)]) {
        assert_eq!(format.describe().unit_bytes(256), 8 * bytes, "{format}");
        assert_eq!(format.describe().unit_bytes(64), 2 * bytes, "{format}");
    }
    for (format, bytes) in [
        (Q2K, 1344),
        (Q3K, 1760),
        (Q4K, 2304),
        (Q5K, 2816),
        (Q6K, 3360),
        (Iq4Xs, 2176),
        (F16, 4096),
    ]
    .into_iter()
    .chain([(Bf16, 4096), (F32, 4096)])
    {
        let f = format.describe();
        assert_eq!(f.unit_bytes(f.unit_columns()), bytes, "{format}");
    }
    for format in QuantFormat::ALL {
        let f = format.describe();
        let kind = match format {
            F32 => DotKind::Single,
            F16 | Bf16 => DotKind::Half,
            _ => DotKind::Integer,
        };
        assert_eq!(f.dot_kind(), kind, "{format}");
        assert_eq!(QuantFormat::from_ggml_id(f.ggml_id()), Some(format));
        let layout = TileLayout { format, rows: 17, columns: 3 * f.unit_columns() };
        let exact = 32 * format.row_bytes(layout.columns).unwrap();
        assert_eq!(layout.bytes(), exact, "{format}: a unit holds the file's bytes");
        assert!(layout.unit_bytes().is_multiple_of(16), "{format}: words of 16 bytes");
        assert_eq!(TileLayout { format, rows: 0, columns: 0 }.bytes(), 0, "{format}");
    }
}

#[test]
fn packing_refuses_sizes_that_do_not_fit() {
    let layout = TileLayout { format: QuantFormat::Q8_0, rows: 48, columns: 64 };
    let file = vec![0; 48 * 68];
    let refused = |layout: &TileLayout, file: &[u8], order, first, room: usize| {
        let mut out = vec![0xa5; room];
        let result = layout.pack(file, order, first, &mut out);
        assert!(matches!(result, Err(Error::Internal(_))), "{result:?}");
        assert!(out.iter().all(|b| *b == 0xa5), "nothing may be written");
    };
    let (tile, natural) = (layout.tile_bytes(), RowOrder::Natural);
    refused(&layout, &file[1..], natural, 0, tile);
    refused(&layout, &file, natural, 0, tile + 1);
    refused(&layout, &file, natural, 0, 4 * tile);
    refused(&layout, &file, natural, usize::MAX, tile);
    refused(&TileLayout { columns: 65, ..layout }, &file, natural, 0, tile);
    for (head_dim, rotary) in [(0, 0), (32, 32), (24, 26), (24, 3)] {
        refused(&layout, &file, RowOrder::PairHalves { head_dim, rotary }, 0, tile);
    }
    layout.pack(&file, natural, 0, &mut []).unwrap();
    layout.pack(&file, natural, 1, &mut vec![0; 2 * tile]).unwrap();
}

#[test]
fn synthetic_weights_have_zero_mean_and_the_wanted_deviation() {
    const WEIGHTS: usize = 1 << 18;
    for (seed, format) in QuantFormat::ALL.into_iter().enumerate() {
        for sigma in [0.02_f32, 1.0] {
            let mut next = 0;
            let mut source = || {
                next += 1;
                word(seed as u32, next)
            };
            let mut blocks = vec![0; format.row_bytes(WEIGHTS).unwrap()];
            format.describe().synthesize(sigma, &mut source, &mut blocks);
            let weights = decoded(format, &blocks);
            let n = weights.len() as f64;
            let mean = weights.iter().map(|w| f64::from(*w)).sum::<f64>() / n;
            let square = weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / n;
            let (mean, deviation) = (mean / f64::from(sigma), square.sqrt() / f64::from(sigma));
            assert!(mean.abs() < 0.02, "{format}: mean {mean} sigma");
            assert!((deviation - 1.0).abs() < 0.02, "{format}: deviation {deviation} sigma");
        }
    }
}
