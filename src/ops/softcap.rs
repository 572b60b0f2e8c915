//! `x[i] = cap · tanh(x[i] / cap)`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Bounds the logits smoothly, in place. Attention has the same as a parameter.
#[derive(Clone, Debug, PartialEq)]
pub struct Softcap {
    /// `[len]` f32, updated.
    pub x: Buf,
    /// Elements.
    pub len: u32,
    /// Bound of the magnitude, above 0.
    pub cap: f32,
}

impl Softcap {
    /// `cap · tanh(x / cap)`.
    pub fn of(cap: f32, x: f32) -> f32 {
        cap * (x / cap).tanh()
    }
}

impl Describe for Softcap {
    fn name(&self) -> &'static str {
        "softcap"
    }

    fn shape(&self) -> String {
        format!("[{}] at {}", self.len, self.cap)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        Traffic { weights: 0, kv: 0, activations: 8 * u64::from(self.len) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "softcap".into(),
            grid: self.len.div_ceil(256),
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![Arg::Step, Arg::Buf(self.x), Arg::U32(self.len), Arg::F32(self.cap)],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        mem.buf_mut(self.x).iter_mut().for_each(|x| *x = Self::of(self.cap, *x));
    }
}
