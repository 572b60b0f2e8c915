//! `graph`: the plan that would be captured, without a GPU.

use crate::Outcome;
use crate::args::{GraphArgs, GraphFormat};
use crate::load;
use crate::output::print;
use decode_graph::arch::{self, PlanOptions};
use decode_graph::error::Result;
use decode_graph::ops::Gpu;
use decode_graph::plan::{DecodePlan, fuse::fuse};
use serde_json::{Value, json};

pub(crate) fn run(args: &GraphArgs) -> Result<Outcome> {
    let model = load::required(&args.model)?;
    let options = PlanOptions { capacity: args.capacity, kv: args.cache_type_k.element() };
    let plain = arch::record(&model, options)?;
    let plan = if args.no_fuse { plain } else { fuse(&plain) };
    // Geometry depends on the GPU; golden listings are made for this one.
    let gpu = Gpu::H200;
    print(&match args.output {
        GraphFormat::Plan => plan.listing(&gpu),
        GraphFormat::Dot => plan.dot(&gpu),
        GraphFormat::Json => format!("{:#}\n", json(&plan, &gpu)),
    })?;
    Ok(Outcome::Done)
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
