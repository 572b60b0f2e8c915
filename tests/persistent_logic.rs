//! The persistent kernel without a GPU.
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod host_shim;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::eager::Comparison;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::ops::KvType;
use decode_graph::plan::{DecodePlan, fuse};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{DebugLevel, Mode};
use fake_driver::Fake;
use host_shim::Kernels;
use small_model::SmallModel;
use std::ops::ControlFlow;
use std::sync::{Arc, LazyLock};

static KERNELS: LazyLock<Arc<Kernels>> = LazyLock::new(|| Arc::new(Kernels::new(|_, text| text)));

fn device(kernels: &Arc<Kernels>, blocks: i32) -> Fake {
    let fake = Fake::new();
    fake.set_compute((9, 0));
    fake.set_multiprocessors(blocks);
    let kernels = kernels.clone();
    fake.run_kernels_by(Some(Arc::new(move |name, launch, slots| kernels.run(name, launch, slots))));
    fake
}

fn model(format: QuantFormat, heads: u32) -> Checkpoint {
    let bytes = SmallModel::new("llama", format).widen(heads).bytes();
    Checkpoint::from_gguf("small.gguf".as_ref(), bytes).unwrap()
}

fn plan(checkpoint: &Checkpoint, capacity: u32) -> DecodePlan {
    fuse::fuse(&record(checkpoint, PlanOptions { capacity, kv: KvType::F16 }).unwrap())
}

fn compared(checkpoint: &Checkpoint, plan: &DecodePlan, depth: u32, steps: u32) -> Vec<Comparison> {
    let options = CudaOptions {
        mode: Mode::Eager,
        debug: DebugLevel::Compare,
        persistent: true,
        ..CudaOptions::default()
    };
    let mut engine = CudaEngine::new(checkpoint, plan, options, &mut |_, _| {}).unwrap();
    engine.debug_to(Box::new(std::io::sink()));
    engine.seek(depth).unwrap();
    engine.fill_cache(depth, 3).unwrap();
    engine.force(depth, &[7]).unwrap();
    let t = std::time::Instant::now();
    let r = engine.run(steps, &mut |_| ControlFlow::Continue(()));
    println!("{r:?} {:?}", t.elapsed());
    engine.comparisons().to_vec()
}

#[test]
fn first() {
    let _device = device(&KERNELS, 4);
    let t = std::time::Instant::now();
    KERNELS.prepare(["decode_step"]);
    println!("compiled {:?}", t.elapsed());
    for format in [QuantFormat::Q8_0, QuantFormat::F16] {
        let checkpoint = model(format, 4);
        let plan = plan(&checkpoint, 8);
        for c in compared(&checkpoint, &plan, 0, 2) {
            println!("{c:?}");
        }
    }
}
