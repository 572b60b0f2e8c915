//! `next = argmax_i logits[i]` (the lowest `i` of equals), then token and position advance

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, WeightId};

/// Chooses the next token and advances the step state: the last op of every plan.
///
/// A forced token (prompt, teacher forcing) takes the place of the chosen one as the next input;
/// the chosen one is what the ring carries to the host. A non-finite logit, a position at
/// capacity or a token outside the vocabulary sets a status instead, and nothing advances.
#[derive(Clone, Debug, PartialEq)]
pub struct Argmax {
    /// `[vocab]` f32.
    pub logits: Buf,
    /// Elements.
    pub vocab: u32,
    /// Candidates `[blocks, 2]`: the best value of a block's share of the logits and its index.
    pub candidates: Buf,
}

impl Argmax {
    /// Blocks that share the logits out.
    pub const BLOCKS: u32 = 64;

    /// f32 elements of `candidates`.
    pub const CANDIDATES_LEN: u32 = 2 * 1024;
}

impl Describe for Argmax {
    fn name(&self) -> &'static str {
        "argmax"
    }

    fn shape(&self) -> String {
        format!("[{}]", self.vocab)
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.logits]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.candidates]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        Traffic { weights: 0, kv: 0, activations: 4 * u64::from(self.vocab) }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "argmax".into(),
            grid: Self::BLOCKS,
            block: 256,
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.logits),
                Arg::Buf(self.candidates),
                Arg::Counters,
                Arg::Forced,
                Arg::Ring,
                Arg::U32(self.vocab),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let logits = mem.buf(self.logits);
        let mut best = (0u32, f32::NEG_INFINITY);
        let mut finite = true;
        for (i, v) in (0u32..).zip(logits) {
            finite &= v.is_finite();
            if *v > best.1 {
                best = (i, *v);
            }
        }
        mem.state.next = best.0;
        mem.state.finite = finite;
    }
}
