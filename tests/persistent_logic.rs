//! The persistent kernel without a GPU: its own code, compiled for the host, with all its blocks at the same
//! time. Every step is compared with the CPU reference, launched alone; then the whole token in one launch
//! must leave the same bits, where blocks are ahead of one another as far as their mail lets them.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod format_models;
mod host_shim;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::ops::KvType;
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{DebugLevel, Mode};
use fake_driver::Fake;
use host_shim::Kernels;
use small_model::{Key, SmallModel};
use std::cell::Cell;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

/// The kernel as it is.
static KERNELS: LazyLock<Arc<Kernels>> = LazyLock::new(|| compiled(Kernels::new(|_, text| text)));

fn compiled(kernels: Kernels) -> Arc<Kernels> {
    kernels.prepare(["decode_step"]);
    Arc::new(kernels)
}

/// A device that runs the persistent kernel in this many blocks, and no other.
fn device(kernels: &Arc<Kernels>, blocks: i32) -> Fake {
    let fake = Fake::new();
    fake.set_compute((9, 0));
    fake.set_multiprocessors(blocks);
    let kernels = kernels.clone();
    fake.run_kernels_by(Some(Arc::new(move |name, launch, slots| {
        if name == "decode_step" { kernels.run(name, launch, slots) } else { Some(-1) }
    })));
    fake
}

fn opened(model: &SmallModel) -> Checkpoint {
    Checkpoint::from_gguf("small.gguf".as_ref(), model.bytes()).unwrap()
}

/// Two layers of 256; `heads` query heads over half as many key/value heads.
fn model(arch: &str, format: QuantFormat, heads: u32) -> Checkpoint {
    opened(&SmallModel::new(arch, format).widen(heads))
}

/// As [`model`], with `group` query heads of 64 over each of `kv_heads`.
fn grouped(format: QuantFormat, kv_heads: u32, group: u32) -> Checkpoint {
    let mut model = SmallModel::new("llama", format).widen(4);
    let (rows, kv_rows) = (64 * u64::from(kv_heads * group), 64 * u64::from(kv_heads));
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        model.change(&name("attn_q"), |t| t.shape = vec![256, rows]);
        model.change(&name("attn_k"), |t| t.shape = vec![256, kv_rows]);
        model.change(&name("attn_v"), |t| t.shape = vec![256, kv_rows]);
        model.change(&name("attn_output"), |t| t.shape = vec![rows, 256]);
    }
    for (key, value) in [
        ("llama.attention.head_count", kv_heads * group),
        ("llama.attention.head_count_kv", kv_heads),
        ("llama.attention.key_length", 64),
        ("llama.attention.value_length", 64),
    ] {
        model.set(key, Key::U32(value));
    }
    opened(&model)
}

fn plan(checkpoint: &Checkpoint, capacity: u32) -> DecodePlan {
    fuse::fuse(&record(checkpoint, PlanOptions { capacity, kv: KvType::F16 }).unwrap())
}

fn engine(checkpoint: &Checkpoint, plan: &DecodePlan, mode: Mode, debug: DebugLevel) -> CudaEngine {
    let options = CudaOptions { mode, debug, persistent: true, ..CudaOptions::default() };
    let mut engine = CudaEngine::new(checkpoint, plan, options, &mut |_, _| {}).unwrap();
    engine.debug_to(Box::new(std::io::sink()));
    engine
}

/// What tokens leave behind, in bits.
#[derive(Debug, PartialEq)]
struct Left {
    tokens: Vec<u32>,
    logits: Vec<u32>,
    caches: Vec<u32>,
}

/// `steps` tokens from position `depth` on, the positions before being noise.
fn decode(
    engine: &mut CudaEngine,
    plan: &DecodePlan,
    depth: u32,
    steps: u32,
) -> decode_graph::error::Result<Left> {
    engine.seek(depth)?;
    engine.fill_cache(depth, 3)?;
    engine.force(depth, &[7])?;
    let mut tokens = Vec::new();
    engine.run(steps, &mut |chosen| {
        tokens.push(chosen.token);
        ControlFlow::Continue(())
    })?;
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits);
    let logits = bits(engine.logits()?).collect();
    let mut caches = Vec::new();
    for layer in 0..plan.cache.layers {
        let (keys, values) = engine.cache(layer)?;
        // Beyond the last position nobody has written.
        let head = (plan.cache.capacity * plan.cache.head_dim) as usize;
        let there = ((depth + steps) * plan.cache.head_dim) as usize;
        for half in [keys, values] {
            caches.extend(half.chunks_exact(head).flat_map(|h| bits(h[..there].to_vec())));
        }
    }
    Ok(Left { tokens, logits, caches })
}

/// Each step of tokens from each of `depths` on against its reference, and all of them in one launch a
/// token against the same launched one by one.
fn check(row: &str, checkpoint: &Checkpoint, plan: &DecodePlan, depths: &[u32], steps: u32) {
    let mut single = engine(checkpoint, plan, Mode::Eager, DebugLevel::Compare);
    let mut whole = engine(checkpoint, plan, Mode::Graph, DebugLevel::Off);
    assert_eq!(whole.census().unwrap().nodes, 1, "{row}: the plan has no program");
    for depth in depths {
        let row = format!("{row}, depth {depth}");
        let before = single.comparisons().len();
        let expected = decode(&mut single, plan, *depth, steps).expect(&row);
        let all = &single.comparisons()[before..];
        assert!(all.len() >= steps as usize * plan.steps.len(), "{row}: something of each step");
        // The bounds of the same comparison on a GPU.
        let bound = |what: &str| if matches!(what, "keys" | "values") { 1e-6 } else { 1e-7 };
        let wrong =
            all.iter().find(|c| c.what != "token" && (c.nmse.is_nan() || c.nmse > bound(&c.what)));
        assert!(wrong.is_none(), "{row}: {wrong:?}");
        let left = decode(&mut whole, plan, *depth, steps).expect(&row);
        assert_eq!(left.tokens, expected.tokens, "{row}: tokens");
        assert!(left.logits == expected.logits, "{row}: logits of a token in one launch");
        assert!(left.caches == expected.caches, "{row}: cache of a token in one launch");
    }
}

#[test]
fn every_format_and_mixture_computes_what_its_reference_computes_in_steps_and_in_one_launch() {
    let _device = device(&KERNELS, 4);
    for (format, values) in format_models::formats() {
        let checkpoint = opened(&format_models::model("llama", (format, values)));
        check(&format!("{format}, values {values}"), &checkpoint, &plan(&checkpoint, 8), &[0], 2);
    }
}

#[test]
fn attention_computes_what_its_reference_computes_on_both_sides_of_groups_and_splits() {
    let _device = device(&KERNELS, 8);
    let depths = [1, 15, 16, 17, 127, 128, 255, 256, 511];
    for (name, checkpoint) in [
        ("two heads of 64 a key/value head", model("llama", QuantFormat::Q8_0, 4)),
        ("two heads of 128", model("llama", QuantFormat::Q8_0, 2)),
    ] {
        check(name, &checkpoint, &plan(&checkpoint, 520), &depths, 1);
    }
    for group in [1, 3, 8] {
        let checkpoint = grouped(QuantFormat::Q8_0, 2, group);
        let plan = plan(&checkpoint, 520);
        check(&format!("{group} heads a key/value head"), &checkpoint, &plan, &[17, 511], 1);
    }
}

#[test]
fn both_pairings_and_biases_are_those_of_the_reference() {
    let _device = device(&KERNELS, 4);
    for arch in ["llama", "qwen2"] {
        let checkpoint = model(arch, QuantFormat::F16, 4);
        check(arch, &checkpoint, &plan(&checkpoint, 40), &[0, 31], 3);
    }
}

#[test]
fn few_blocks_with_many_tiles_and_many_without_any_compute_the_same() {
    for blocks in [2, 3, 24] {
        let _device = device(&KERNELS, blocks);
        let checkpoint = model("llama", QuantFormat::Q4K, 4);
        check(&format!("{blocks} blocks"), &checkpoint, &plan(&checkpoint, 40), &[0, 30], 2);
    }
}

#[test]
fn rows_of_more_units_than_warps_are_multiplied_as_their_units_arrive() {
    for (format, columns, blocks) in [
        (QuantFormat::F32, 1088, 8),
        (QuantFormat::F32, 2304, 24),
        (QuantFormat::Bf16, 2176, 8),
        (QuantFormat::Q4K, 4352, 8),
        (QuantFormat::Q6K, 4608, 16),
    ] {
        let _device = device(&KERNELS, blocks);
        let mut model = SmallModel::new("llama", format).widen(4);
        for layer in 0..2 {
            for (part, shape) in
                [("gate", [256, columns]), ("up", [256, columns]), ("down", [columns, 256])]
            {
                let name = format!("blk.{layer}.ffn_{part}.weight");
                model.change(&name, |t| t.shape = shape.to_vec());
            }
        }
        model.set("llama.feed_forward_length", Key::U32(u32::try_from(columns).unwrap()));
        let checkpoint = opened(&model);
        check(&format!("{format}, {columns}"), &checkpoint, &plan(&checkpoint, 8), &[0], 2);
    }
}

/// Launches tokens at the end of the cache, which compute nothing, until `launched` were.
fn let_pass(engine: &mut CudaEngine, capacity: u32, launched: u32) {
    engine.seek(capacity - 1).unwrap();
    engine.force(capacity - 1, &[7]).unwrap();
    assert_eq!(engine.run(1, &mut |_| ControlFlow::Continue(())).unwrap(), 1);
    for _ in 1..launched {
        assert_eq!(engine.run(1, &mut |_| ControlFlow::Continue(())).unwrap(), 0);
    }
}

#[test]
fn the_tags_of_words_begin_anew_and_no_word_is_taken_for_another() {
    let _device = device(&KERNELS, 2);
    let checkpoint = model("llama", QuantFormat::Q8_0, 4);
    let plan = plan(&checkpoint, 12);
    let mut fresh = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off);
    let expected = decode(&mut fresh, &plan, 0, 6).unwrap();
    // Of a vector that is published once, twice, … five times a token they begin anew at 2, 4, 4, 8, 8.
    let mut later = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off);
    let_pass(&mut later, 12, 253);
    assert!(decode(&mut later, &plan, 0, 6).unwrap() == expected);
}

#[test]
fn a_token_that_may_not_be_computed_leaves_everything_as_it_is() {
    let device = device(&KERNELS, 2);
    let checkpoint = model("llama", QuantFormat::Q8_0, 4);
    let plan = plan(&checkpoint, 4);
    let mut engine = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off);
    let last = decode(&mut engine, &plan, 3, 1).unwrap();
    let nothing = &mut |_| ControlFlow::Continue(());
    for _ in 0..2 {
        assert_eq!(engine.run(1, nothing).unwrap(), 0, "the cache is full");
    }
    let before = device.contents();
    // As many as there are tags: the host writes the same mail.
    for _ in 0..256 {
        assert_eq!(engine.run(1, nothing).unwrap(), 0);
    }
    let after = device.contents();
    let pairs = before.iter().zip(&after);
    let changed: usize =
        pairs.map(|(a, b)| a.1.iter().zip(&b.1).filter(|(x, y)| x != y).count()).sum();
    assert!(changed <= 2, "{changed} bytes besides the count of steps");
    let logits: Vec<u32> = engine.logits().unwrap().into_iter().map(f32::to_bits).collect();
    assert!(logits == last.logits);
    // Nor does one outside the vocabulary, and the next one is as if it had not been.
    engine.seek(3).unwrap();
    engine.force(3, &[plan.vocab]).unwrap();
    assert!(engine.run(1, nothing).is_err());
    assert!(decode(&mut engine, &plan, 3, 1).unwrap() == last);
}

// ------------------------------------------------------------------------------ planted defects

/// A defect: of `file`'s `what` the first becomes `with`, where PLANTED says whether it is built in.
struct Defect {
    file: &'static str,
    what: &'static str,
    with: &'static str,
}

const DEFECTS: [(&str, Defect); 9] = [
    (
        "a barrier between the parts of a product and their sum",
        Defect {
            file: "product.cuh",
            what: "sync_sums(half);\n        if (end == w.tiles) break;",
            with: "if (!PLANTED) sync_sums(half);\n        if (end == w.tiles) break;",
        },
    ),
    (
        "a barrier between queries and scores",
        Defect {
            file: "attention.cuh",
            what: "sync_workers();",
            with: "if (!PLANTED) sync_workers();",
        },
    ),
    (
        "values that are read after their release",
        Defect {
            file: "attention.cuh",
            what: "        run.take(score, values, pitch, count, lane);\n        if (!now) release",
            with: "if (PLANTED && !now) release_chunk(chunk, lane), release_chunk(chunk + 1, lane);\n\
                   run.take(score, values, pitch, count, lane);\n\
                   if (!PLANTED && !now) release",
        },
    ),
    (
        "a place that is filled again before it was released",
        Defect {
            file: "stream.cuh",
            what: "if (next >= CHUNKS) barrier_wait",
            with: "if (next >= CHUNKS && !PLANTED) barrier_wait",
        },
    ),
    (
        "tags of sums of squares that are not looked at",
        Defect {
            file: "finish.cuh",
            what: "while ((wrong & x_tag.mask) != 0);",
            with: "while (!PLANTED && (wrong & x_tag.mask) != 0);",
        },
    ),
    (
        "a chunk that is not waited for",
        Defect {
            file: "stream.cuh",
            what: "barrier_wait(gemv::shared_address(board().full + d)",
            with: "if (!PLANTED) barrier_wait(gemv::shared_address(board().full + d)",
        },
    ),
    (
        "a wrong lane in the largest score",
        Defect {
            file: "attention.cuh",
            what: "__shfl_xor_sync(~0u, top, 1)",
            with: "(PLANTED ? wrong_lane<float> : __shfl_xor_sync<float>)(~0u, top, 1)",
        },
    ),
    (
        "tags of another block's partial results that are not looked at",
        Defect {
            file: "attention.cuh",
            what: "} while (!all);",
            with: "} while (!PLANTED && !all);",
        },
    ),
    (
        "tags of several words that are not looked at",
        Defect {
            file: "program.cuh",
            what: "if (!__any_sync(~0u, missing != 0)) break;",
            with: "if (PLANTED || !__any_sync(~0u, missing != 0)) break;",
        },
    ),
];

/// The kernel with all of them.
static DEFECTIVE: LazyLock<Arc<Kernels>> = LazyLock::new(|| {
    let planted = Cell::new(0);
    let kernels = Kernels::new(|name, mut text| {
        for (number, (_, d)) in (1..).zip(&DEFECTS) {
            if d.file == name && text.contains(d.what) {
                let with = d.with.replace("PLANTED", &format!("(shim::plant == {number})"));
                text = text.replacen(d.what, &with, 1);
                planted.set(planted.get() + 1);
            }
        }
        text
    });
    assert_eq!(planted.get(), DEFECTS.len(), "what is planted is there, once");
    compiled(kernels)
});

/// What tokens leave where contexts are split and chunks fill the ring again and again; `None` where
/// they do not come to an end.
fn with_defect(defect: usize) -> Option<Left> {
    let _device = device(&DEFECTIVE, 4);
    let checkpoint = model("llama", QuantFormat::Q8_0, 4);
    let plan = plan(&checkpoint, 320);
    DEFECTIVE.plant(defect as u32);
    let mut engine = engine(&checkpoint, &plan, Mode::Graph, DebugLevel::Off);
    let left = decode(&mut engine, &plan, 300, 2).ok();
    DEFECTIVE.plant(0);
    left
}

#[test]
fn each_planted_defect_changes_what_tokens_leave() {
    let right = with_defect(0);
    assert!(right.is_some());
    let missed: Vec<_> = DEFECTS
        .iter()
        .enumerate()
        .filter(|(i, _)| with_defect(i + 1) == right)
        .map(|(_, (name, _))| name)
        .collect();
    assert!(missed.is_empty(), "not noticed: {missed:?}");
}
