//! `out[i] = x[i] · gain[i] / sqrt(mean(x²) + eps)`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, Vector, WeightId};

/// Root-mean-square normalisation of one token's activations.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    /// Input, `[dim]` f32.
    pub x: Buf,
    /// `[dim]` f32.
    pub gain: Vector,
    /// Output, `[dim]` f32; does not overlap `x`.
    pub out: Buf,
    /// Added to the mean square before the root.
    pub eps: f32,
}

impl RmsNorm {
    /// Elements.
    pub fn dim(&self) -> u32 {
        self.gain.len
    }
}

impl Describe for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn shape(&self) -> String {
        format!("[{}]", self.dim())
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
        Traffic { weights: n, kv: 0, activations: 2 * n }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "rms_norm".into(),
            grid: 1,
            block: 1024,
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
        let x = mem.buf(self.x).to_vec();
        // f64 for the sum: the reference should not be what limits a comparison.
        let sum: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        let scale = 1.0 / ((sum / x.len() as f64) as f32 + self.eps).sqrt();
        let gain = mem.vector(self.gain).to_vec();
        for ((out, x), g) in mem.buf_mut(self.out).iter_mut().zip(x).zip(gain) {
            *out = x * scale * g;
        }
    }
}
