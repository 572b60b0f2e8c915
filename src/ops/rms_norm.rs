//! `out[r, i] = x[r, i] · gain[i] / sqrt(mean_i(x[r, i]²) + eps)`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, Vector, WeightId};

/// Root-mean-square normalisation of one token's activations, or of each head of them.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    /// Input, `[rows, dim]` f32.
    pub x: Buf,
    /// `[dim]` f32.
    pub gain: Vector,
    /// Output, `[rows, dim]` f32; does not overlap `x`.
    pub out: Buf,
    /// Vectors that are normalised alone, with the same gain: 1, or heads.
    pub rows: u32,
    /// Added to the mean square before the root.
    pub eps: f32,
}

impl RmsNorm {
    /// Elements of a row.
    pub fn dim(&self) -> u32 {
        self.gain.len
    }
}

impl Describe for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn shape(&self) -> String {
        match self.rows {
            1 => format!("[{}]", self.dim()),
            rows => format!("[{rows}, {}]", self.dim()),
        }
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.gain.id]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let n = 4 * u64::from(self.dim());
        Traffic { weights: n, kv: 0, activations: 2 * n * u64::from(self.rows) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "rms_norm".into(),
            grid: self.rows,
            // A head is a few warps' work.
            block: if self.rows == 1 { 1024 } else { self.dim().next_multiple_of(32).min(1024) },
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.x),
                Arg::Weight(self.gain.id),
                Arg::Buf(self.out),
                Arg::U32(self.dim()),
                Arg::F32(self.eps),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let (x, gain) = (mem.buf(self.x).to_vec(), mem.vector(self.gain).to_vec());
        let dim = gain.len();
        let out = mem.buf_mut(self.out).chunks_exact_mut(dim);
        for (x, out) in x.chunks_exact(dim).zip(out) {
            // f64 for the sum: the reference should not be what limits a comparison.
            let sum: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let scale = 1.0 / ((sum / dim as f64) as f32 + self.eps).sqrt();
            for ((out, x), g) in out.iter_mut().zip(x).zip(&gain) {
                *out = x * scale * g;
            }
        }
    }
}
