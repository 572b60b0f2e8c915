//! A driver for CUDA 11: what it lacks is done without, what its compiler does not take is refused
//! with both versions, and nothing is left.
//!
//! One table serves the process: that of CUDA 11.8.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::driver::api::Driver;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, Mode, SessionOptions};
use fake_driver::{Fake, Live};
use small_model::SmallModel;

/// On a device of this compute capability.
fn cuda_11_8(compute: (i32, i32)) -> Fake {
    let fake = Fake::over(Driver {
        // CUDA 12.0, 12.3 and 12.4.
        cuGraphKernelNodeGetParams_v2: None,
        cuGraphGetEdges_v2: None,
        cuFuncGetName: None,
        cuKernelGetName: None,
        cuFuncLoad: None,
        ..fake_driver::entries()
    });
    fake.set_version(11_080);
    fake.set_compute(compute);
    fake
}

fn small() -> Checkpoint {
    SmallModel::new("llama", QuantFormat::Q8_0).open(tempfile::tempdir().unwrap().path())
}

/// The backend, and the bits of the logits after each of a few tokens.
fn decoded(
    checkpoint: &Checkpoint,
    backend: BackendChoice,
    mode: Mode,
) -> Result<(&'static str, Vec<u32>)> {
    let kv = Some(KvType::F16);
    let options = SessionOptions { backend, mode, kv, capacity: 24, ..SessionOptions::default() };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {})?;
    let mut bits = Vec::new();
    for token in [5, 9, 2] {
        session.feed(token)?;
        bits.extend(session.logits()?.iter().map(|v| v.to_bits()));
    }
    Ok((session.backend(), bits))
}

#[test]
fn a_driver_for_cuda_11_computes_the_reference_where_it_compiles_the_kernels() {
    let fake = cuda_11_8((8, 0));
    let checkpoint = small();
    let (_, expected) = decoded(&checkpoint, BackendChoice::Cpu, Mode::Graph).unwrap();
    for mode in [Mode::Graph, Mode::Eager] {
        let (backend, found) = decoded(&checkpoint, BackendChoice::Cuda, mode).unwrap();
        assert_eq!(backend, "cuda");
        assert!(found == expected, "{mode:?}");
        assert_eq!(fake.live(), Live::default());
    }
    // What it does not tell of the graph is not claimed; what it tells is compared.
    let plan = record(&checkpoint, PlanOptions { capacity: 24, kv: KvType::F16 }).unwrap();
    let engine = CudaEngine::new(&checkpoint, &plan, CudaOptions::default(), &mut |_, _| {});
    let census = engine.unwrap().census().unwrap();
    let steps = plan.steps.len();
    assert_eq!((census.nodes, census.edges, census.named), (steps, steps - 1, 0));
    assert_eq!(census.programmatic, None);
}

#[test]
fn kernels_that_a_driver_does_not_compile_are_refused_with_both_versions() {
    let fake = cuda_11_8((9, 0));
    let checkpoint = small();
    for (version, said) in [(11_080, "CUDA 11.8"), (11_040, "CUDA 11.4")] {
        fake.set_version(version);
        let error = decoded(&checkpoint, BackendChoice::Cuda, Mode::Graph).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, Error::NoDevice(_)), "{text}");
        assert_eq!(error.exit_code(), 5);
        for part in [said, "(PTX ", "update the NVIDIA driver"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!((fake.live(), fake.is_capturing()), (Live::default(), false), "{text}");
        // Where any backend would do, it is the one that works.
        let (backend, _) = decoded(&checkpoint, BackendChoice::Auto, Mode::Graph).unwrap();
        assert_eq!((backend, fake.live()), ("cpu", Live::default()));
    }
    // After an update the same process goes on.
    fake.set_version(12_000);
    assert_eq!(decoded(&checkpoint, BackendChoice::Cuda, Mode::Graph).unwrap().0, "cuda");
}
