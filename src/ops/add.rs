//! `out[i] = out[i] + x[i]`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Adds a projection to the residual stream, in place.
#[derive(Clone, Debug, PartialEq)]
pub struct Add {
    /// Residual stream, `[len]` f32, updated.
    pub out: Buf,
    /// `[len]` f32.
    pub x: Buf,
    /// Elements.
    pub len: u32,
}

impl Describe for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn shape(&self) -> String {
        format!("[{}]", self.len)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.out, self.x]
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
            kernel: "add".into(),
            grid: self.len.div_ceil(256),
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![Arg::Step, Arg::Buf(self.out), Arg::Buf(self.x), Arg::U32(self.len)],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let x = mem.buf(self.x).to_vec();
        for (out, x) in mem.buf_mut(self.out).iter_mut().zip(x) {
            *out += x;
        }
    }
}
