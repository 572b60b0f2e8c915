//! `out[r] = Σ_c weight[r, c] · x[c] + bias[r]`

use super::{Buf, Describe, Gpu, HostMemory, Launch, Matrix, Traffic, Vector, WeightId};

/// Matrix times one token's activations.
#[derive(Clone, Debug, PartialEq)]
pub struct MatVec {
    /// Input, `[columns]` f32.
    pub x: Buf,
    /// `[rows, columns]`.
    pub weight: Matrix,
    /// `[rows]` f32.
    pub bias: Option<Vector>,
    /// Output, `[rows]` f32; does not overlap `x`.
    pub out: Buf,
}

impl Describe for MatVec {
    fn name(&self) -> &'static str {
        "matvec"
    }

    fn shape(&self) -> String {
        let w = &self.weight;
        format!("[{}] → [{}] {}", w.columns, w.rows, w.format)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        std::iter::once(self.weight.id).chain(self.bias.map(|b| b.id)).collect()
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let bias = self.bias.map_or(0, |b| 4 * u64::from(b.len));
        let io = 4 * (u64::from(self.weight.rows) + u64::from(self.weight.columns));
        Traffic { weights: self.weight.bytes() + bias, kv: 0, activations: io }
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        super::gemv::launch(gpu, "matvec", None, self, self.out)
    }

    fn reference(&self, mem: &mut HostMemory) {
        let x = mem.buf(self.x).to_vec();
        mem.product(self.weight, &x, self.out);
        if let Some(bias) = self.bias {
            let bias = mem.vector(bias).to_vec();
            for (out, b) in mem.buf_mut(self.out).iter_mut().zip(bias) {
                *out += b;
            }
        }
    }
}
