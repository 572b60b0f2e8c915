//! `out[i] = out[i] + Σ_j w_j · x[j, i]`, `w_j` the weights of a [`TopK`](super::TopK)

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Adds what the chosen experts made to the residual stream, in place, each with its weight.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertSum {
    /// Residual stream, `[len]` f32, updated.
    pub out: Buf,
    /// `[used, len]` f32.
    pub x: Buf,
    /// Of a [`TopK`](super::TopK): the elements from `used` on are weights.
    pub route: Buf,
    /// Experts that are chosen.
    pub used: u32,
    /// Elements.
    pub len: u32,
}

impl Describe for ExpertSum {
    fn name(&self) -> &'static str {
        "expert_sum"
    }

    fn shape(&self) -> String {
        format!("{}×[{}]", self.used, self.len)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.out, self.x, self.route]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let activations = 4 * (u64::from(self.used) + 2) * u64::from(self.len);
        Traffic { weights: 0, kv: 0, activations }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "expert_sum".into(),
            grid: self.len.div_ceil(256),
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.out),
                Arg::Buf(self.x),
                Arg::Buf(self.route),
                Arg::U32(self.used),
                Arg::U32(self.len),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let x = mem.buf(self.x).to_vec();
        let weights = mem.buf(self.route)[self.used as usize..].to_vec();
        for (i, out) in mem.buf_mut(self.out).iter_mut().enumerate() {
            let each = x.iter().skip(i).step_by(self.len as usize);
            *out += each.zip(&weights).map(|(x, w)| w * x).sum::<f32>();
        }
    }
}
