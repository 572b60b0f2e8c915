//! `out[i] = act(gate[i]) · up[i]`: `silu(z) = z / (1 + e^−z)`, or
//! `gelu(z) = z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Activation of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `z / (1 + e^−z)`.
    Silu,
    /// The tanh form of the Gaussian error linear unit (Hendrycks and Gimpel, 2016).
    GeluTanh,
}

impl Activation {
    /// Its value at `z`.
    pub fn of(self, z: f32) -> f32 {
        match self {
            Self::Silu => z / (1.0 + (-z).exp()),
            Self::GeluTanh => {
                let root = std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
                0.5 * z * (1.0 + (root * (z + 0.044_715 * z * z * z)).tanh())
            }
        }
    }
}

/// Gated linear unit of the feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct Glu {
    /// `[len]` f32.
    pub gate: Buf,
    /// `[len]` f32.
    pub up: Buf,
    /// `[len]` f32.
    pub out: Buf,
    /// Elements.
    pub len: u32,
    /// Of the gate.
    pub activation: Activation,
}

impl Describe for Glu {
    fn name(&self) -> &'static str {
        match self.activation {
            Activation::Silu => "swiglu",
            Activation::GeluTanh => "geglu",
        }
    }

    fn shape(&self) -> String {
        format!("[{}]", self.len)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.gate, self.up]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        Traffic { weights: 0, kv: 0, activations: 12 * u64::from(self.len) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: self.name().into(),
            grid: self.len.div_ceil(256),
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.gate),
                Arg::Buf(self.up),
                Arg::Buf(self.out),
                Arg::U32(self.len),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let (gate, up) = (mem.buf(self.gate).to_vec(), mem.buf(self.up).to_vec());
        for ((out, g), u) in mem.buf_mut(self.out).iter_mut().zip(gate).zip(up) {
            *out = self.activation.of(g) * u;
        }
    }
}
