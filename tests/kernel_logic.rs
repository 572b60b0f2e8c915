//! Whole plans computed by the kernels' own code without a GPU: a session over the fake driver, whose
//! kernels are the sources compiled for the host, each step compared with the CPU reference.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod host_shim;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::eager::Comparison;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::ops::{Gpu, KvType};
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{DebugLevel, Mode};
use fake_driver::Fake;
use host_shim::Kernels;
use small_model::SmallModel;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

/// The kernels as they are.
static KERNELS: LazyLock<Arc<Kernels>> = LazyLock::new(|| Arc::new(Kernels::new(|_, text| text)));

/// A driver of a device of compute capability 8.0 that has `kernels`.
fn device(kernels: &Arc<Kernels>) -> Fake {
    let fake = Fake::new();
    fake.set_compute((8, 0));
    let kernels = kernels.clone();
    fake.run_kernels_by(Some(Arc::new(move |name, launch, slots| {
        kernels.run(name, launch, slots)
    })));
    fake
}

/// Two layers of 256, so that every format has whole blocks; `heads` query heads over half as many.
fn model(format: QuantFormat, heads: u32) -> Checkpoint {
    let bytes = SmallModel::new("llama", format).widen(heads).bytes();
    Checkpoint::from_gguf("small.gguf".as_ref(), bytes).unwrap()
}

fn plan(checkpoint: &Checkpoint, capacity: u32, kv: KvType, fused: bool) -> DecodePlan {
    let plain = record(checkpoint, PlanOptions { capacity, kv }).unwrap();
    if fused { fuse::fuse(&plain) } else { plain }
}

/// How far each step is from the reference, over `steps` tokens from position `depth` on.
fn compared(checkpoint: &Checkpoint, plan: &DecodePlan, depth: u32, steps: u32) -> Vec<Comparison> {
    let options =
        CudaOptions { mode: Mode::Eager, debug: DebugLevel::Compare, ..CudaOptions::default() };
    let mut engine = CudaEngine::new(checkpoint, plan, options, &mut |_, _| {}).unwrap();
    engine.debug_to(Box::new(std::io::sink()));
    engine.seek(depth).unwrap();
    engine.fill_cache(depth, 3).unwrap();
    engine.force(depth, &[7]).unwrap();
    // A step that reports itself ends the run; what was compared before it counts.
    let _ = engine.run(steps, &mut |_| ControlFlow::Continue(()));
    engine.comparisons().to_vec()
}

/// The bounds of the same comparison on a GPU.
fn is_wrong(c: &Comparison) -> bool {
    let bound = if matches!(c.what.as_str(), "keys" | "values") { 1e-6 } else { 1e-7 };
    c.what != "token" && (c.nmse.is_nan() || c.nmse > bound)
}

/// Checks every step of a plan; the kernels that ran are added to `seen`.
fn check(
    row: &str,
    checkpoint: &Checkpoint,
    plan: &DecodePlan,
    (depth, steps): (u32, u32),
    seen: &mut BTreeSet<String>,
) {
    let gpu = Gpu { sms: 4, compute: (8, 0), ..Gpu::H200 };
    let kernels: BTreeSet<String> =
        plan.steps.iter().map(|s| s.op.describe().launch(&gpu).kernel).collect();
    KERNELS.prepare(kernels.iter().map(String::as_str));
    let all = compared(checkpoint, plan, depth, steps);
    assert!(all.len() >= steps as usize * plan.steps.len(), "{row}: something of each step");
    let wrong = all.iter().find(|c| is_wrong(c));
    assert!(wrong.is_none(), "{row}: {wrong:?}");
    seen.extend(kernels);
}

#[test]
fn the_kernels_of_every_format_compute_what_their_references_compute() {
    let _device = device(&KERNELS);
    let mut seen = BTreeSet::new();
    for format in QuantFormat::ALL {
        let checkpoint = model(format, 4);
        for fused in [true, false] {
            let plan = plan(&checkpoint, 8, KvType::F16, fused);
            check(&format!("{format}, fused {fused}"), &checkpoint, &plan, (0, 2), &mut seen);
        }
    }
    println!("{} kernels: {seen:?}", seen.len());
}
