//! `out[j, r] = Σ_c weight[e_j, r, c] · x[j, c]`, `e_j` the experts of a [`TopK`](super::TopK)

use super::gemv::{self, tiles};
use super::product::dot;
use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Matrix, Traffic, WeightId};
use crate::quant::TileLayout;
use rayon::prelude::*;

/// The chosen experts' matrices times one token's activations. Which they are is read on the
/// device; the weights of no other expert are read.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertMatVec {
    /// `[columns]` f32 for all experts, or `[used, columns]`.
    pub x: Buf,
    /// Whether each expert has an input of its own.
    pub own_input: bool,
    /// Of a [`TopK`](super::TopK): the first `used` elements are indices.
    pub route: Buf,
    /// `[experts · rows, columns]`, expert after expert.
    pub weight: Matrix,
    /// Experts in `weight`.
    pub experts: u32,
    /// Experts that are chosen.
    pub used: u32,
    /// `[used, rows]` f32.
    pub out: Buf,
}

impl ExpertMatVec {
    /// Rows of one expert.
    pub fn rows(&self) -> u32 {
        self.weight.rows / self.experts
    }

    /// Blocks that share an expert: two a multiprocessor share all of them out evenly.
    pub(super) fn each(&self, gpu: &Gpu) -> u32 {
        (2 * gpu.sms / self.used).clamp(1, tiles(self.rows()))
    }

    pub(super) fn launch_of(&self, kernel: &str, each: u32, args: Vec<Arg>) -> Launch {
        let w = &self.weight;
        let f = w.format.suffix();
        let layout = TileLayout { format: w.format, rows: 16, columns: w.columns as usize };
        let stage = gemv::activation_bytes(w.format) * layout.units() as u32;
        Launch {
            module: format!("expert_{f}"),
            kernel: format!("{kernel}_{f}"),
            grid: self.used * each,
            block: gemv::WARPS * 32,
            cluster: 1,
            shared_bytes: stage + gemv::FLUSH * gemv::WARPS * 16 * 4,
            programmatic: true,
            args,
        }
    }
}

impl Describe for ExpertMatVec {
    fn name(&self) -> &'static str {
        "expert_matvec"
    }

    fn shape(&self) -> String {
        let (w, rows) = (&self.weight, self.rows());
        let (used, experts) = (self.used, self.experts);
        format!("[{}] → {used} of {experts}×[{rows}] {}", w.columns, w.format)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.x, self.route]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.weight.id]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let used = u64::from(self.used);
        let weights = self.weight.bytes() / u64::from(self.experts) * used;
        let inputs = if self.own_input { used } else { 1 };
        let io = inputs * u64::from(self.weight.columns) + used * u64::from(self.rows());
        Traffic { weights, kv: 0, activations: 4 * io }
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let w = &self.weight;
        let each = self.each(gpu);
        let args = vec![
            Arg::Step,
            Arg::Buf(self.x),
            Arg::Buf(self.route),
            Arg::Weight(w.id),
            Arg::Buf(self.out),
            Arg::U32(self.rows()),
            Arg::U32(w.columns),
            Arg::U32(if self.own_input { w.columns } else { 0 }),
            Arg::U32(each),
        ];
        self.launch_of("expert_matvec", each, args)
    }

    fn reference(&self, mem: &mut HostMemory) {
        let (rows, columns) = (self.rows() as usize, self.weight.columns as usize);
        let x = mem.buf(self.x);
        let chosen: Vec<usize> =
            mem.buf(self.route)[..self.used as usize].iter().map(|e| *e as usize).collect();
        let one = |row: &mut Vec<f32>, i: usize| {
            let (slot, r) = (i / rows, i % rows);
            let x = if self.own_input { &x[slot * columns..][..columns] } else { x };
            mem.row(self.weight, chosen[slot] * rows + r, row);
            dot(row, x)
        };
        let out: Vec<f32> =
            (0..chosen.len() * rows).into_par_iter().map_init(|| vec![0.0; columns], one).collect();
        mem.buf_mut(self.out).copy_from_slice(&out);
    }
}
