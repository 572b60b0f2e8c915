//! The plan: its order, its fusion, its workspace, its listing.
#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod small_model;

use decode_graph::arch::{self, PlanOptions};
use decode_graph::ops::{Gpu, KvType, Op};
use decode_graph::plan::{DecodePlan, WeightSpec, WorkspaceLayout, fuse};
use decode_graph::quant::{QuantFormat, RowOrder};
use small_model::{Key, SmallModel};

fn plan_of(model: &SmallModel) -> DecodePlan {
    let folder = tempfile::tempdir().unwrap();
    let options = PlanOptions { capacity: 64, kv: KvType::F16 };
    arch::record(&model.open(folder.path()), options).unwrap()
}

fn labels(plan: &DecodePlan) -> Vec<&str> {
    plan.steps.iter().map(|s| s.label.as_str()).collect()
}

/// Buffers that are alive at the same time and share memory.
fn overlaps(plan: &DecodePlan, placed: &[decode_graph::plan::Placement]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (i, a) in placed.iter().enumerate() {
        for (j, b) in placed.iter().enumerate().skip(i + 1) {
            let alive = a.first <= b.last && b.first <= a.last;
            let shared = a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
            if alive && shared && a.bytes > 0 && b.bytes > 0 {
                found.push((plan.buffers[i].name.clone(), plan.buffers[j].name.clone()));
            }
        }
    }
    found
}

#[test]
fn a_plain_plan_has_the_steps_of_a_layer_in_order() {
    let plan = plan_of(&SmallModel::new("llama", QuantFormat::Q8_0));
    let all = labels(&plan);
    assert_eq!(all[0], "embed");
    let layer = [
        "attn.norm",
        "attn.q",
        "attn.k",
        "attn.v",
        "attn.rope_q",
        "attn.rope_k",
        "attn.kv_append",
        "attn.attention",
        "attn.o",
        "attn.add",
        "ffn.norm",
        "ffn.gate",
        "ffn.up",
        "ffn.swiglu",
        "ffn.down",
        "ffn.add",
    ];
    assert_eq!(all[17..33], layer.map(|l| format!("L01.{l}")));
    assert_eq!(all[33..], ["final.norm", "lm_head", "argmax"]);
}

#[test]
fn fusion_leaves_five_steps_a_layer() {
    let fused = fuse::fuse(&plan_of(&SmallModel::new("qwen2", QuantFormat::Q4_1)));
    let layer =
        |l| ["qkv", "attention", "o_proj", "gate_up", "down"].map(|s| format!("L{l:02}.{s}"));
    let mut want = vec!["embed".to_owned()];
    want.extend(layer(0));
    want.extend(layer(1));
    want.push("lm_head".to_owned());
    // Attention is not fused and keeps its own label.
    let got: Vec<_> =
        labels(&fused).iter().map(|l| l.replace("attn.attention", "attention")).collect();
    assert_eq!(got, want);
}

#[test]
fn formats_without_a_common_kernel_stay_plain() {
    let mut model = SmallModel::new("qwen2", QuantFormat::Q4_1);
    model.change("blk.0.attn_v.weight", |t| t.format = QuantFormat::F16);
    let fused = fuse::fuse(&plan_of(&model));
    assert!(labels(&fused).contains(&"L00.attn.rope_k"));
    assert!(labels(&fused).contains(&"L01.qkv"));
    assert!(!labels(&fused).contains(&"L00.qkv"));
}

#[test]
fn a_buffer_that_is_read_later_is_not_fused_away() {
    let mut plan = plan_of(&SmallModel::new("llama", QuantFormat::Q8_0));
    let Op::RmsNorm(norm) = plan.steps[1].op.clone() else { panic!() };
    let n = plan.steps.len();
    let Op::RmsNorm(last) = &mut plan.steps[n - 3].op else { panic!() };
    last.x = norm.out;
    let fused = fuse::fuse(&plan);
    assert!(labels(&fused).contains(&"L00.attn.norm") && labels(&fused).contains(&"L01.qkv"));
}

#[test]
fn only_what_the_fused_kernel_rotates_in_halves_has_paired_rows() {
    let orders = |plan: &DecodePlan| -> Vec<(String, RowOrder)> {
        let paired = |w: &WeightSpec| match w {
            WeightSpec::Matrix { name, order, .. } if *order != RowOrder::Natural => {
                Some((name.clone(), *order))
            }
            _ => None,
        };
        plan.weights.iter().filter_map(paired).collect()
    };
    let plain = plan_of(&SmallModel::new("qwen2", QuantFormat::Q8_0));
    assert_eq!(orders(&plain), []);
    let order = RowOrder::PairHalves { head_dim: 16, rotary: 16 };
    let names = ["blk.0.attn_q", "blk.0.attn_k", "blk.1.attn_q", "blk.1.attn_k"];
    let fused = fuse::fuse(&plain);
    assert_eq!(orders(&fused), names.map(|n| (format!("{n}.weight"), order)));
    for step in &fused.steps {
        if let Op::Qkv(op) = &step.op {
            assert_eq!((op.q.weight.order, op.k.weight.order), (order, order));
            assert_eq!(op.v.weight.order, RowOrder::Natural);
        }
    }
    let llama = plan_of(&SmallModel::new("llama", QuantFormat::Q8_0));
    assert_eq!(orders(&fuse::fuse(&llama)), []);
}

#[test]
fn a_tied_head_is_the_embedding_and_an_untied_one_keeps_its_type() {
    let mut model = SmallModel::new("llama", QuantFormat::Q8_0);
    let count = plan_of(&model).weights.len();
    model.tensor("output.weight", &[small_model::HIDDEN, small_model::VOCAB], QuantFormat::F16);
    let untied = plan_of(&model);
    assert_eq!(untied.weights.len(), count + 1);
    let n = untied.steps.len();
    let Op::MatVec(head) = &untied.steps[n - 2].op else { panic!() };
    assert_eq!(head.weight.format, QuantFormat::F16);
}

#[test]
fn live_buffers_never_share_memory_and_a_planted_overlap_is_seen() {
    for format in [QuantFormat::Q8_0, QuantFormat::F16] {
        let plain = plan_of(&SmallModel::new("qwen2", format));
        for plan in [fuse::fuse(&plain), plain] {
            let layout = plan.workspace();
            let mut placed = layout.placements().to_vec();
            assert_eq!(overlaps(&plan, &placed), []);
            assert!(placed.iter().all(|p| p.offset + p.bytes <= layout.bytes()));
            assert!(placed.iter().all(|p| p.offset.is_multiple_of(256)));
            let sum: usize = placed.iter().map(|p| p.bytes).sum();
            assert!(layout.bytes() < sum, "nothing is reused");
            // The first layer's queries onto the residual stream.
            let q = plan.buffers.iter().position(|b| b.name == "q").unwrap();
            placed[q].offset = placed[0].offset;
            assert!(overlaps(&plan, &placed).contains(&("residual".to_owned(), "q".to_owned())));
        }
    }
}

#[test]
fn buffers_laid_apart_share_nothing_and_have_a_zone_on_every_side() {
    const ZONE: usize = 4096;
    for plain in
        [QuantFormat::Q8_0, QuantFormat::F16].map(|f| plan_of(&SmallModel::new("llama", f)))
    {
        for plan in [fuse::fuse(&plain), plain] {
            let layout = WorkspaceLayout::apart(&plan, ZONE);
            let mut placed: Vec<_> = layout.placements().iter().filter(|p| p.bytes > 0).collect();
            placed.sort_by_key(|p| p.offset);
            assert!(placed.iter().all(|p| p.offset.is_multiple_of(256)));
            let starts = placed.iter().map(|p| p.offset).chain([layout.bytes()]);
            let ends = std::iter::once(0).chain(placed.iter().map(|p| p.offset + p.bytes));
            assert!(starts.zip(ends).all(|(start, end)| start >= end + ZONE));
        }
    }
}

#[test]
fn layers_after_the_first_need_no_more_workspace() {
    let two = plan_of(&SmallModel::new("llama", QuantFormat::Q8_0));
    let mut model = SmallModel::new("llama", QuantFormat::Q8_0);
    model.set("llama.block_count", Key::U32(1));
    model.tensors.retain(|t| !t.name.starts_with("blk.1."));
    assert_eq!(plan_of(&model).workspace().bytes(), two.workspace().bytes());
}

#[test]
fn the_listing_shows_each_step_and_the_bytes_of_the_weights() {
    let plan = fuse::fuse(&plan_of(&SmallModel::new("llama", QuantFormat::Q8_0)));
    let text = plan.listing(&Gpu::H200);
    for step in &plan.steps {
        assert!(text.contains(&step.label), "{} is missing in\n{text}", step.label);
    }
    let weights = plan.traffic(0).weights;
    assert!(
        text.contains(&format!("{} nodes, 5 a layer, {weights} weight bytes", plan.steps.len()))
    );
    assert_eq!(plan.dot(&Gpu::H200).matches(" -> ").count(), plan.steps.len() - 1);
}
