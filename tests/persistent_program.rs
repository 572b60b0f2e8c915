//! The program of the persistent kernel, walked as its kernel walks it: which warp has which units, and
//! which chunk they lie in.

#![allow(clippy::unwrap_used)]

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::ops::{Arg, Gpu, KvType};
use decode_graph::plan::fuse;
use decode_graph::plan::program::{CHUNKS, FLIGHT, Program, Slot, WARPS};

const QKV: u32 = 1;
const ATTENTION: u32 = 2;
const GATE_UP: u32 = 4;

fn number(slot: Slot) -> u32 {
    match slot {
        Slot::Arg(Arg::U32(n)) => n,
        other => panic!("{other:?} is no number"),
    }
}

#[test]
fn every_unit_has_one_warp_and_lies_in_one_chunk_whose_lap_the_warp_knows() {
    let mut products = 0;
    for spec in
        ["tiny", "smollm2-135m", "llama-3.2-1b", "qwen2.5-1.5b", "llama-2-7b", "llama-3.1-8b"]
    {
        for quant in ["q4_k_m", "q4_0", "q8_0", "bf16"] {
            let name = format!("{spec}:{quant}");
            let checkpoint = Checkpoint::synthetic(&SyntheticSpec::parse(&name).unwrap()).unwrap();
            let options = PlanOptions { capacity: 64, kv: KvType::F16 };
            let plan = fuse::fuse(&record(&checkpoint, options).unwrap());
            let Some(program) = Program::of(&plan, &Gpu::H200) else { continue };
            assert!(program.shared_bytes + 1024 <= Gpu::H200.shared_per_block, "{name}");
            for step in &program.instructions {
                let kind = number(step.slots[0]);
                let Slot::Words(low, high) = step.slots[7] else { continue };
                let shift = high >> 8 & 0xff;
                if kind == ATTENTION {
                    assert!(shift > 0 && 2048 << shift <= program.chunk_bytes, "{name}");
                    continue;
                }
                let (units, span, parts) = (low & 0xffff, low >> 16 & 0xff, low >> 24);
                let (at_once, inverse) = (high & 0xff, high >> 16);
                let widest =
                    number(step.slots[8]).max(if kind == QKV { number(step.slots[9]) } else { 0 });
                assert!(widest << shift <= program.chunk_bytes, "{name}: a chunk in its place");
                assert!((1..=WARPS).all(|n| (n * inverse) >> 12 == n / parts), "{name}: / {parts}");
                assert!(at_once > 0 && at_once % 2 == 0 && at_once * parts <= 128, "{name}");
                let tiles =
                    number(step.slots[1]).div_ceil(132) * if kind == GATE_UP { 2 } else { 1 };
                let chunks = units.div_ceil(1 << shift);
                let mut last = [None; WARPS as usize];
                for q in 0..tiles * parts {
                    let (n, first) = (q / parts, q % parts * span);
                    let end = (first + span).min(units);
                    assert!(
                        first < end && first >> shift == (end - 1) >> shift,
                        "{name}: {first}..{end}"
                    );
                    assert!(q % parts + 1 < parts || end == units, "{name}: units are left over");
                    let chunk = n * chunks + (first >> shift);
                    let warp = &mut last[(q % WARPS) as usize];
                    let on = warp.map_or(0, |before: u32| chunk - before);
                    assert!(on == CHUNKS || on <= CHUNKS - FLIGHT, "{name}: {on} chunks on");
                    *warp = Some(chunk);
                }
                products += 1;
            }
        }
    }
    assert!(products > 1000, "only {products} products");
}
