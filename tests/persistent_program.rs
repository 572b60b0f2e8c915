//! The program of the persistent kernel, walked as its kernel walks it: which warp has which units, in
//! which chunks they lie, and that the ring brings them all.

#![allow(clippy::unwrap_used)]

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::ops::{Arg, Gpu, KvType};
use decode_graph::plan::fuse;
use decode_graph::plan::program::{CHUNKS, Program, Slot, WARPS};

const QKV: u32 = 1;
const ATTENTION: u32 = 2;
const GATE_UP: u32 = 4;

fn number(slot: Slot) -> u32 {
    match slot {
        Slot::Arg(Arg::U32(n)) => n,
        other => panic!("{other:?} is no number"),
    }
}

/// How a step's tiles are shared out; mirrors `Shape` of `ptx/persistent/program.cuh`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    units: u32,
    parts: u32,
    sets: u32,
    at_once: u32,
    each: u32,
    tiles: u32,
}

impl Shape {
    fn chunks(&self) -> u32 {
        self.units.div_ceil(self.each)
    }

    /// Tile and unit of each product of warp `w`, in order, tiles below `end` from `base` on.
    fn products(&self, w: u32, base: u32, end: u32) -> Vec<(u32, u32)> {
        let (set, first) = (w / self.parts, w % self.parts);
        let tiles = (base..end).filter(move |n| set < self.sets && n % self.sets == set);
        let units = move || (first..self.units).step_by(self.parts as usize);
        tiles.flat_map(|n| units().map(move |k| (n, k))).collect()
    }

    /// Walks the step: every warp waits for its chunks in order, and for the others after `at_once`
    /// tiles; a chunk is asked for when all units of the one before in its place are released.
    fn walk(&self) -> Result<(), String> {
        let chunk = |(n, k): (u32, u32)| n * self.chunks() + k / self.each;
        let all = self.tiles * self.chunks();
        let mut released = vec![0; all as usize];
        let units_of = |c: u32| {
            let first = (c % self.chunks()) * self.each;
            (self.units - first).min(self.each)
        };
        let mut asked = 0;
        for base in (0..self.tiles).step_by(self.at_once as usize) {
            let end = (base + self.at_once).min(self.tiles);
            let mut left: Vec<_> =
                (0..WARPS).map(|w| self.products(w, base, end).into_iter().peekable()).collect();
            let mut moved = true;
            while moved {
                moved = false;
                let free = |c: u32, released: &[u32]| {
                    c < CHUNKS || released[(c - CHUNKS) as usize] == units_of(c - CHUNKS)
                };
                while asked < all && free(asked, &released) {
                    asked += 1;
                }
                for warp in &mut left {
                    while let Some(product) = warp.next_if(|p| chunk(*p) < asked) {
                        released[chunk(product) as usize] += 1;
                        moved = true;
                    }
                }
            }
            if left.iter_mut().any(|w| w.peek().is_some()) {
                return Err(format!("stands at tile {base} of {}", self.tiles));
            }
        }
        let whole = (0..all).all(|c| released[c as usize] == units_of(c));
        whole.then_some(()).ok_or_else(|| "a unit is left over, or has two warps".to_owned())
    }
}

#[test]
fn every_unit_has_one_warp_and_the_ring_brings_it() {
    let mut shapes = std::collections::HashSet::new();
    for spec in
        ["tiny", "smollm2-135m", "llama-3.2-1b", "qwen2.5-1.5b", "llama-2-7b", "llama-3.1-8b"]
    {
        for quant in ["q4_k_m", "q4_0", "q8_0", "bf16", "q6_k", "f16"] {
            let name = format!("{spec}:{quant}");
            let checkpoint = Checkpoint::synthetic(&SyntheticSpec::parse(&name).unwrap()).unwrap();
            let options = PlanOptions { capacity: 64, kv: KvType::F16 };
            let plan = fuse::fuse(&record(&checkpoint, options).unwrap());
            let program = Program::of(&plan, &Gpu::H200).unwrap_or_else(|| panic!("{name}"));
            assert!(program.shared_bytes + 1024 <= Gpu::H200.shared_per_block, "{name}");
            for step in &program.instructions {
                let kind = number(step.slots[0]);
                let Slot::Words(low, high) = step.slots[7] else { continue };
                let (at_once, each, inverse) = (high & 0xff, (high >> 8) & 0xff, high >> 16);
                assert!(
                    (0..4096).all(|k| (k * inverse) >> 15 == k / each),
                    "{name}: divided by {each}"
                );
                if kind == ATTENTION {
                    assert!(2 * 16 * 64 * each <= program.chunk_bytes, "{name}");
                    continue;
                }
                let widest =
                    number(step.slots[8]).max(if kind == QKV { number(step.slots[9]) } else { 0 });
                assert!(widest * each <= program.chunk_bytes, "{name}: a chunk in its place");
                let (units, parts, sets) = (low & 0xffff, low >> 16 & 0xff, low >> 24);
                assert!(parts >= 1 && sets >= 1 && parts * sets <= WARPS, "{name}");
                assert!(at_once > 0 && at_once % 4 == 0 && at_once * parts <= 128, "{name}");
                let most = number(step.slots[1]).div_ceil(132);
                for items in most.saturating_sub(1).max(1)..=most {
                    let tiles = items * if kind == GATE_UP { 2 } else { 1 };
                    let shape = Shape { units, parts, sets, at_once, each, tiles };
                    if shapes.insert(shape) {
                        shape.walk().unwrap_or_else(|e| panic!("{name}, kind {kind}: {e}"));
                    }
                }
            }
        }
    }
    assert!(shapes.len() > 50, "only {} shapes", shapes.len());
}

#[test]
fn units_without_a_warp_are_noticed() {
    let shape = Shape { units: 16, parts: 16, sets: 1, at_once: 8, each: 2, tiles: 61 };
    assert!(shape.walk().is_ok());
    assert!(Shape { sets: 0, ..shape }.walk().is_err(), "no warp has a tile");
    assert!(Shape { sets: 2, parts: 16, ..shape }.walk().is_err(), "the second set has no warps");
}
