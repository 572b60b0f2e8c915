//! `graph`: the plan that would be captured, without a GPU; with `--captured` what the driver holds
//! of it.

use crate::Outcome;
use crate::args::{GraphArgs, GraphFormat};
use crate::environment::Environment;
use crate::load;
use crate::output::print;
use crate::progress::Progress;
use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::{CapturedGraph, CudaEngine, CudaOptions};
use decode_graph::error::{Error, Result};
use decode_graph::ops::Gpu;
use decode_graph::plan::{DecodePlan, fuse::fuse};
use serde_json::{Value, json};
use std::path::Path;

pub(crate) fn run(args: &GraphArgs, environment: &Environment) -> Result<Outcome> {
    let model = load::required(&args.model)?;
    let options = PlanOptions { capacity: args.capacity, kv: args.cache_type_k.element() };
    let plain = arch::record(&model, options)?;
    let plan = if args.no_fuse { plain } else { fuse(&plain) };
    if args.captured {
        let captured = captured(&model, &plan, args, environment)?;
        return print(&captured).map(|()| Outcome::Done);
    }
    // Geometry depends on the GPU; golden listings are made for this one.
    let gpu = Gpu::H200;
    print(&match args.output {
        GraphFormat::Plan => plan.listing(&gpu),
        GraphFormat::Dot => plan.dot(&gpu),
        GraphFormat::Json => format!("{:#}\n", json(&plan, &gpu)),
    })?;
    Ok(Outcome::Done)
}

/// The plan captured on a device and held against what its driver tells of the graph.
fn captured(
    model: &Checkpoint,
    plan: &DecodePlan,
    args: &GraphArgs,
    environment: &Environment,
) -> Result<String> {
    let bar = Progress::bytes("loading", environment);
    let persistent = args.kernels.persistent();
    let options = CudaOptions { device: args.device, persistent, ..CudaOptions::default() };
    let engine = CudaEngine::new(model, plan, options, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    let no_graph = || Error::Internal("an engine in graph mode has no graph".to_owned());
    let captured = engine.captured()?.ok_or_else(no_graph)?;
    let device = decode_graph::cuda::driver::Device::get(args.device)?.info()?;
    Ok(match args.output {
        GraphFormat::Plan => format!("# {} on {}\n{captured}", plan.model, device.name),
        GraphFormat::Dot => dot(engine.graph().ok_or_else(no_graph)?)?,
        GraphFormat::Json => {
            let nodes = captured.nodes.iter().map(|n| {
                json!({
                    "label": n.label,
                    "kernel": n.kernel,
                    "grid": n.grid,
                    "block": n.block,
                    "shared_bytes": n.shared_bytes,
                    "programmatic": n.programmatic,
                })
            });
            let census = captured.census;
            format!(
                "{:#}\n",
                json!({
                    "model": plan.model,
                    "device": device.name,
                    "driver_version": device.driver_version,
                    "nodes": nodes.collect::<Vec<_>>(),
                    "edges": census.edges,
                    "programmatic_edges": census.programmatic,
                    "named_nodes": census.named,
                })
            )
        }
    })
}

/// The driver's own drawing, which it writes to a file only.
fn dot(graph: &CapturedGraph) -> Result<String> {
    let path = std::env::temp_dir().join(format!("decode-bench-{}.dot", std::process::id()));
    let read = |path: &Path| std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e));
    let text = graph.write_dot(&path).and_then(|()| read(&path));
    // What stays behind there does no harm.
    let _ = std::fs::remove_file(&path);
    text
}

fn json(plan: &DecodePlan, gpu: &Gpu) -> Value {
    let steps = plan.steps.iter().map(|step| {
        let op = step.op.describe();
        let (launch, traffic) = (op.launch(gpu), op.traffic(0));
        json!({
            "label": step.label,
            "layer": step.layer,
            "op": op.name(),
            "shape": op.shape(),
            "module": launch.module,
            "kernel": launch.kernel,
            "grid": launch.grid,
            "block": launch.block,
            "cluster": launch.cluster,
            "shared_bytes": launch.shared_bytes,
            "programmatic": launch.programmatic,
            "weight_bytes": traffic.weights,
            "kv_bytes": traffic.kv,
            "activation_bytes": traffic.activations,
        })
    });
    json!({
        "model": plan.model,
        "gpu": {"sms": gpu.sms, "compute": gpu.compute},
        "vocab": plan.vocab,
        "cache": {
            "layers": plan.cache.layers,
            "kv_heads": plan.cache.kv_heads,
            "head_dim": plan.cache.head_dim,
            "capacity": plan.cache.capacity,
            "type": plan.cache.kind.name(),
        },
        "workspace_bytes": plan.workspace().bytes(),
        "steps": steps.collect::<Vec<_>>(),
    })
}
