//! `route = (e_0 … e_k−1, w_0 … w_k−1)`: the experts of the `k` greatest logits, best first (the lower
//! of equals), and `w_j = e^{logits[e_j]} / Σ_i e^{logits[e_i]}`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Chooses a token's experts from the router's logits. The choice stays on the device, so that one
/// captured graph serves every token.
#[derive(Clone, Debug, PartialEq)]
pub struct TopK {
    /// Of the router, `[experts]` f32.
    pub logits: Buf,
    /// Indices of the chosen experts as f32 (below 2^24, so exact), then their weights:
    /// `[2 · used]`.
    pub route: Buf,
    /// Experts to choose from, at most [`TopK::MOST_EXPERTS`].
    pub experts: u32,
    /// Experts that are chosen.
    pub used: u32,
}

impl TopK {
    /// What one warp of the kernel holds.
    pub const MOST_EXPERTS: u32 = 512;
    /// What one warp of the kernel writes.
    pub const MOST_USED: u32 = 32;
}

impl Describe for TopK {
    fn name(&self) -> &'static str {
        "top_k"
    }

    fn shape(&self) -> String {
        format!("{} of [{}]", self.used, self.experts)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.logits]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.route]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let activations = 4 * (u64::from(self.experts) + 2 * u64::from(self.used));
        Traffic { weights: 0, kv: 0, activations }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "top_k".into(),
            grid: 1,
            block: 32,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.logits),
                Arg::Buf(self.route),
                Arg::U32(self.experts),
                Arg::U32(self.used),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let logits = mem.buf(self.logits);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        // Stable, so that the lower of equals comes first.
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        let used = self.used as usize;
        let best = logits[order[0]];
        let powers: Vec<f32> = order[..used].iter().map(|e| (logits[*e] - best).exp()).collect();
        let sum: f32 = powers.iter().sum();
        let (chosen, weights) = mem.buf_mut(self.route).split_at_mut(used);
        for (c, e) in chosen.iter_mut().zip(&order) {
            *c = *e as f32;
        }
        for (w, p) in weights.iter_mut().zip(powers) {
            *w = p / sum;
        }
    }
}
