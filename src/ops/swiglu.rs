//! `out[i] = silu(gate[i]) · up[i]`, `silu(z) = z / (1 + e^−z)`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Gated activation of the feed-forward block.
#[derive(Clone, Debug, PartialEq)]
pub struct SwiGlu {
    /// `[len]` f32.
    pub gate: Buf,
    /// `[len]` f32.
    pub up: Buf,
    /// `[len]` f32.
    pub out: Buf,
    /// Elements.
    pub len: u32,
}

impl Describe for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
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
            kernel: "swiglu".into(),
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
            *out = g / (1.0 + (-g).exp()) * u;
        }
    }
}
