//! Few tokens of small models, for tools that make every access to memory a hundred times slower:
//! one format (and one of the values, where a kernel serves the two), in every way to run it.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(dead_code, reason = "each test binary uses a part")]

use crate::format_models::{self, Formats};
use crate::small_model::SmallModel;
use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::kernels::{self, PROGRAMMATIC_COMPUTE};
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::ops::{KvType, Sampling};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{DebugLevel, Mode};
use std::ops::ControlFlow;
use std::path::Path;

/// Positions of the cache, all of which are filled.
const CAPACITY: u32 = 4;

/// Where the splits of attention are several, and the last of them is not whole.
const DEPTH: u32 = 1500;

/// As a graph, and launch by launch with a look at each (`GPU_DEBUG=1`).
const BOTH: [(Mode, DebugLevel); 2] =
    [(Mode::Graph, DebugLevel::Off), (Mode::Eager, DebugLevel::Print)];
const GRAPH: [(Mode, DebugLevel); 1] = [BOTH[0]];

fn model(arch: &str, formats: Formats) -> Checkpoint {
    Checkpoint::from_gguf("small.gguf".as_ref(), format_models::model(arch, formats).bytes())
        .unwrap()
}

fn plain(checkpoint: &Checkpoint, capacity: u32, kv: KvType) -> DecodePlan {
    record(checkpoint, PlanOptions { capacity, kv }).unwrap()
}

/// The kernels of the folder KERNELS instead of those of the crate, as far as it has them: of scripts/sanitize.sh.
fn kernel(module: &str, compute: (u32, u32)) -> Option<&'static str> {
    let own = std::env::var_os("KERNELS")
        .map(|folder| Path::new(&folder).join(format!("{module}.sm90.ptx")))
        .filter(|file| compute >= PROGRAMMATIC_COMPUTE && file.exists());
    match own {
        Some(file) => Some(Box::leak(std::fs::read_to_string(file).unwrap().into_boxed_str())),
        None => kernels::ptx(module, compute),
    }
}

/// A token for each position from `from` on, in each of `ways`: they must be the same.
fn decode(
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    from: u32,
    ways: &[(Mode, DebugLevel)],
    persistent: bool,
) {
    let mut seen = Vec::new();
    for &(mode, debug) in ways {
        let options = CudaOptions { mode, debug, persistent, ..CudaOptions::default() };
        let mut engine =
            CudaEngine::with_kernels(checkpoint, plan, options, &kernel, &mut |_, _| {}).unwrap();
        engine.debug_to(Box::new(std::io::sink()));
        if mode == Mode::Graph {
            // What has no program runs as the chain does, and would show nothing here.
            assert_eq!(engine.census().unwrap().nodes == 1, persistent, "{persistent}");
        }
        engine.seek(from).unwrap();
        if from > 0 {
            engine.fill_cache(from, 7).unwrap();
        }
        engine.force(from, &[1, 2]).unwrap();
        let mut tokens = Vec::new();
        engine
            .run(plan.cache.capacity - from, &mut |c| {
                tokens.push(c.token);
                ControlFlow::Continue(())
            })
            .unwrap();
        assert_eq!(tokens.len(), (plan.cache.capacity - from) as usize, "{mode:?}");
        seen.push(tokens);
    }
    assert!(seen.iter().all(|tokens| *tokens == seen[0]), "{seen:?}");
    println!("few tokens | {} | {} ways, persistent {persistent}", plan.model, ways.len());
}

/// A kernel a step: the fused plan, and of one format the plain one.
pub(crate) fn chain(formats: Formats) {
    let checkpoint = model("llama", formats);
    let plain = plain(&checkpoint, CAPACITY, KvType::F16);
    decode(&checkpoint, &fuse::fuse(&plain), 0, &BOTH, false);
    if formats.0 == formats.1 {
        decode(&checkpoint, &plain, 0, &GRAPH, false);
    }
}

/// Experts; norms of heads and of a block's output, GELU.
pub(crate) fn experts_and_norms(formats: Formats) {
    for arch in ["qwen3moe", "gemma3"] {
        let checkpoint = model(arch, formats);
        let plan = fuse::fuse(&plain(&checkpoint, CAPACITY, KvType::F16));
        decode(&checkpoint, &plan, 0, &GRAPH, false);
    }
}

/// The persistent kernel.
pub(crate) fn persistent(formats: Formats) {
    decode(&model("llama", formats), &fused_plan(formats), 0, &BOTH, true);
}

/// The plan of [`persistent`].
pub(crate) fn fused_plan(formats: Formats) -> DecodePlan {
    fuse::fuse(&plain(&model("llama", formats), CAPACITY, KvType::F16))
}

/// Attention in several splits over a cache that a kernel filled, heads of 32 to 128.
pub(crate) fn at_depth(is_persistent: bool) {
    for (heads, kv) in
        [(8, KvType::F16), (4, KvType::F16), (2, KvType::F16), (4, KvType::F32), (2, KvType::F32)]
    {
        // The persistent kernel has heads of 64 and 128, in f16.
        if is_persistent && (heads == 8 || kv == KvType::F32) {
            continue;
        }
        let small = SmallModel::new("llama", QuantFormat::Q8_0).widen(heads);
        let checkpoint = Checkpoint::from_gguf("small.gguf".as_ref(), small.bytes()).unwrap();
        let plan = fuse::fuse(&plain(&checkpoint, DEPTH + 2, kv));
        decode(&checkpoint, &plan, DEPTH, &GRAPH, is_persistent);
    }
}

/// Tokens drawn.
pub(crate) fn drawn() {
    let checkpoint = model("llama", (QuantFormat::Q8_0, QuantFormat::Q8_0));
    let sampling = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, min_p: 0.05, seed: 7 };
    let plan = fuse::fuse(&plain(&checkpoint, CAPACITY, KvType::F16).sampled(sampling));
    decode(&checkpoint, &plan, 0, &BOTH, false);
}
