//! Every weight format on a real device: its product and its embedding look-up at the row lengths of
//! real models and at odd ones, against decoding in Rust and the sum in f64; and every kernel that has
//! weights, in every format and mixture, op by op against the CPU reference and graph against eager.
//!
//! Prints `skipped: no CUDA device` and passes where none answers.

#![allow(clippy::unwrap_used)]

mod format_models;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::Error;
use decode_graph::ops::{Add, Argmax, Buf, Embed, KvType, MatVec, Matrix, Op, WeightId};
use decode_graph::plan::fuse::fuse;
use decode_graph::plan::{CacheSpec, DecodePlan, Placement, PlanBuilder};
use decode_graph::quant::{QuantFormat, RowOrder};
use decode_graph::reference;
use decode_graph::session::{DebugLevel, Mode};
use small_model::SmallModel;
use std::ops::ControlFlow;

/// Rows of every matrix: no whole number of tiles.
const ROWS: u32 = 77;

/// Rows looked up: the first, the last, and both halves of a tile between.
const TOKENS: [u32; 4] = [0, ROWS - 1, 21, 42];

/// Bound on `Σ (y − r)² / Σ r²` of a product.
const NMSE: f64 = 1e-6;

/// Row lengths of real models, the longest among them, and ones that end in every kind of tail.
fn widths(format: QuantFormat) -> Vec<u32> {
    const ALL: [u32; 20] = [
        4, 32, 96, 100, 256, 320, 576, 608, 768, 896, 1000, 1152, 1536, 2048, 2816, 4096, 4864,
        8960, 14336, 28672,
    ];
    let whole = |w: &u32| w.is_multiple_of(format.describe().block_elements() as u32);
    ALL.into_iter().filter(whole).collect()
}

fn table(width: u32) -> String {
    format!("table.{width}.weight")
}

fn weight(width: u32) -> String {
    format!("product.{width}.weight")
}

/// For each width the look-up of a row and a product with it, whose results still stand after the
/// last step; and the buffers (row, product).
fn plan(format: QuantFormat, widths: &[u32]) -> (DecodePlan, Vec<(Buf, Buf)>) {
    let cache = CacheSpec { layers: 1, kv_heads: 1, head_dim: 64, capacity: 64, kind: KvType::F16 };
    let mut plan = PlanBuilder::new("formats", cache, ROWS);
    let (kept, candidates) =
        (plan.buffer("kept", 4), plan.buffer("candidates", Argmax::CANDIDATES_LEN));
    // The choice of a token writes its candidates last, when the results have been used: their
    // memory is its own only because it is named before there are any.
    plan.record("keep", Op::Add(Add { out: kept, x: candidates, len: 4 }));
    let mut results = Vec::new();
    for &columns in widths {
        let natural = RowOrder::Natural;
        let shape = Matrix { id: WeightId(0), format, rows: ROWS, columns, order: natural };
        let table = plan.matrix(&table(columns), 0, shape);
        let row = plan.buffer("row", columns);
        plan.record(&format!("embed.{columns}"), Op::Embed(Embed { table, out: row, scale: 1.0 }));
        let weight = plan.matrix(&weight(columns), 0, shape);
        let out = plan.buffer("product", ROWS);
        let op = Op::MatVec(MatVec { x: row, weight, bias: None, out });
        plan.record(&format!("matvec.{columns}"), op);
        results.push((row, out));
    }
    // Reading a little of every result keeps its memory from being given to another.
    for (row, out) in &results {
        plan.record("keep", Op::Add(Add { out: kept, x: *row, len: 4 }));
        plan.record("keep", Op::Add(Add { out: kept, x: *out, len: 4 }));
    }
    let logits = results[0].1;
    plan.set_logits(logits);
    plan.record("argmax", Op::Argmax(Argmax { logits, vocab: ROWS, candidates }));
    let plan = plan.finish();
    for (row, out) in &results {
        assert!(alone(&plan, *row) && alone(&plan, *out), "a result is overwritten in its step");
    }
    (plan, results)
}

/// Whether no other buffer of `plan` lies where `buf` does.
fn alone(plan: &DecodePlan, buf: Buf) -> bool {
    let layout = plan.workspace();
    let own = &layout.placements()[buf.0 as usize];
    let apart = |(i, other): (usize, &Placement)| {
        let before = other.offset + other.bytes <= own.offset;
        i == buf.0 as usize || before || own.offset + own.bytes <= other.offset
    };
    layout.placements().iter().enumerate().all(apart)
}

/// `[ROWS][width]`.
type Rows = Vec<Vec<f32>>;

fn decoded(checkpoint: &Checkpoint, name: &str) -> Rows {
    let tensor = checkpoint.tensor(name).unwrap();
    let (columns, bytes) = (tensor.columns() as usize, checkpoint.read_all(tensor).unwrap());
    let row_bytes = tensor.format.row_bytes(columns).unwrap();
    let row = |bytes: &[u8]| {
        let mut out = vec![0.0; columns];
        tensor.format.decode_row(bytes, &mut out);
        out
    };
    bytes.chunks_exact(row_bytes).map(row).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// `Σ (y − W x)² / Σ (W x)²`, sums in f64.
fn nmse(y: &[f32], w: &[Vec<f32>], x: &[f32]) -> f64 {
    let (mut noise, mut signal) = (0.0, 0.0);
    for (y, row) in y.iter().zip(w) {
        let r: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
        noise += (f64::from(*y) - r).powi(2);
        signal += r * r;
    }
    noise / signal
}

/// A model of nothing but the tables and weights of one format, and the plan over them.
struct Case {
    format: QuantFormat,
    widths: Vec<u32>,
    checkpoint: Checkpoint,
    plan: DecodePlan,
    results: Vec<(Buf, Buf)>,
    /// `(table, weight)`, decoded.
    tensors: Vec<(Rows, Rows)>,
}

impl Case {
    fn new(format: QuantFormat) -> Self {
        let widths = widths(format);
        let mut model = SmallModel::new("llama", format);
        model.tensors.clear();
        for &width in &widths {
            for name in [table(width), weight(width)] {
                model.tensor(&name, &[u64::from(width), u64::from(ROWS)], format);
            }
        }
        let checkpoint = model.open(tempfile::tempdir().unwrap().path());
        let (plan, results) = plan(format, &widths);
        let both = |w: &u32| (decoded(&checkpoint, &table(*w)), decoded(&checkpoint, &weight(*w)));
        let tensors = widths.iter().map(both).collect();
        Self { format, widths, checkpoint, plan, results, tensors }
    }

    /// Checks every result of the step of `token`, prints the largest error and where it is, and
    /// gives what is wrong.
    fn check(&self, token: u32, mut read: impl FnMut(Buf) -> Vec<f32>) -> Vec<String> {
        let (format, mut worst, mut wrong) = (self.format, (0.0, 0), Vec::new());
        let all = self.results.iter().zip(&self.tensors).zip(&self.widths);
        for (((row, out), (table, weight)), width) in all {
            let (x, right) = (read(*row), &table[token as usize]);
            let other = bits(&x).iter().zip(bits(right)).filter(|(a, b)| **a != *b).count();
            if other > 0 {
                wrong.push(format!("{format}: row {token}: {other} of {width} columns are others"));
            }
            let error = nmse(&read(*out), weight, &x);
            if error.is_nan() || error > NMSE {
                wrong.push(format!("{format}: row {token}: product of {width} columns: {error:e}"));
            }
            if error > worst.0 {
                worst = (error, *width);
            }
        }
        eprintln!("{format} row {token}: NMSE at most {:e}, at {} columns", worst.0, worst.1);
        wrong
    }
}

#[test]
fn every_format_looks_up_and_multiplies_rows_of_every_length() {
    let mut wrong = Vec::new();
    for format in QuantFormat::ALL {
        let case = Case::new(format);
        // A kernel a step: those of the format's own modules.
        // Between red zones: no kernel may write outside its buffers.
        let (mode, red_zones, persistent) = (Mode::Graph, true, false);
        let options = CudaOptions { mode, red_zones, persistent, ..CudaOptions::default() };
        let mut engine =
            match CudaEngine::new(&case.checkpoint, &case.plan, options, &mut |_, _| {}) {
                Ok(engine) => engine,
                Err(Error::NoDevice(why)) => {
                    eprintln!("skipped: no CUDA device ({why})");
                    return;
                }
                Err(other) => panic!("{format}: {other}"),
            };
        engine.seek(0).unwrap();
        engine.force(0, &TOKENS).unwrap();
        for token in TOKENS {
            engine.run(1, &mut |_| ControlFlow::Continue(())).unwrap();
            wrong.extend(case.check(token, |buf| engine.buffer(buf).unwrap()));
        }
        engine.check_red_zones().unwrap();
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_cpu_reference_does_too() {
    let mut wrong = Vec::new();
    for format in QuantFormat::ALL {
        let case = Case::new(format);
        let mut memory = reference::load(&case.checkpoint, &case.plan, &mut |_, _| {}).unwrap();
        for (position, token) in (0..).zip(TOKENS) {
            (memory.state.token, memory.state.position) = (token, position);
            reference::interpret(&case.plan, &mut memory).unwrap();
            wrong.extend(case.check(token, |buf| memory.buf(buf).to_vec()));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// What `plan` computes in 20 tokens: the tokens, the last logits and the caches, as bits.
fn decode(engine: &mut CudaEngine) -> (Vec<u32>, Vec<u32>, Vec<Vec<u32>>) {
    engine.seek(0).unwrap();
    engine.force(0, &[1, 2, 3]).unwrap();
    let mut tokens = Vec::new();
    let mut sink = |c: decode_graph::session::Chosen| {
        tokens.push(c.token);
        ControlFlow::Continue(())
    };
    engine.run(20, &mut sink).unwrap();
    let layers = 0..engine.bound().plan().cache.layers;
    let caches = layers.flat_map(|l| <[_; 2]>::from(engine.cache(l).unwrap())).map(|c| bits(&c));
    let caches = caches.collect();
    (tokens, bits(&engine.logits().unwrap()), caches)
}

#[test]
fn every_kernel_with_weights_agrees_with_the_reference_and_replays_as_eager_in_every_format() {
    let mut wrong = Vec::new();
    for (arch, formats, checkpoint) in format_models::all() {
        let plain = record(&checkpoint, PlanOptions { capacity: 64, kv: KvType::F16 }).unwrap();
        let plan = fuse(&plain);
        let mut seen = Vec::new();
        for (mode, debug) in [
            (Mode::Graph, DebugLevel::Off),
            (Mode::Eager, DebugLevel::Off),
            (Mode::Eager, DebugLevel::Compare),
        ] {
            let options = CudaOptions { mode, debug, persistent: false, ..CudaOptions::default() };
            let mut engine = match CudaEngine::new(&checkpoint, &plan, options, &mut |_, _| {}) {
                Ok(engine) => engine,
                Err(Error::NoDevice(why)) => {
                    eprintln!("skipped: no CUDA device ({why})");
                    return;
                }
                Err(other) => panic!("{arch} {formats}: {other}"),
            };
            seen.push(decode(&mut engine));
            for c in engine.comparisons().iter().filter(|c| c.what != "token") {
                let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
                if c.nmse.is_nan() || c.nmse > bound {
                    wrong.push(format!("{arch} {formats}: {c:?}"));
                }
            }
        }
        let same = seen[0] == seen[1] && seen[1] == seen[2];
        eprintln!("{arch} {formats}: graph and eager equal: {same}");
        if !same {
            wrong.push(format!("{arch} {formats}: graph is not eager"));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}
