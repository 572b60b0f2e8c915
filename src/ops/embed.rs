//! `out[i] = scale · table[token, i]`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Matrix, Traffic, WeightId};

/// Embedding look-up of the token in the step state.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {
    /// `[vocab, dim]`.
    pub table: Matrix,
    /// Output, `[dim]` f32.
    pub out: Buf,
    /// Factor on every element (1 but for Gemma).
    pub scale: f32,
}

impl Describe for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn shape(&self) -> String {
        format!("[{}]", self.table.columns)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.table.id]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let weights = self.table.bytes() / u64::from(self.table.rows);
        Traffic { weights, kv: 0, activations: 4 * u64::from(self.table.columns) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        let f = self.table.format.suffix();
        Launch {
            module: format!("gemv_{f}"),
            kernel: format!("embed_{f}"),
            grid: self.table.columns.div_ceil(256),
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Weight(self.table.id),
                Arg::Buf(self.out),
                Arg::U32(self.table.rows),
                Arg::U32(self.table.columns),
                Arg::F32(self.scale),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let mut row = vec![0.0; self.table.columns as usize];
        mem.row(self.table, mem.state.token as usize, &mut row);
        for (out, v) in mem.buf_mut(self.out).iter_mut().zip(row) {
            *out = v * self.scale;
        }
    }
}
