//! `(x₀, x₁) ← (x₀ cos θ − x₁ sin θ, x₀ sin θ + x₁ cos θ) · magnitude`, `θ = position · freq[i]`

use super::{Arg, Buf, Describe, Gpu, HostMemory, Launch, Traffic, Vector, WeightId};

/// Which two elements of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// `(2i, 2i + 1)`: GGUF's `llama`.
    Adjacent,
    /// `(i, i + rotary / 2)`: GPT-NeoX, Qwen, Gemma, Phi.
    Halves,
}

/// Rotary position embedding, in place, on every head.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// `[heads, head_dim]` f32, updated.
    pub x: Buf,
    /// Heads.
    pub heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Angle per position of each pair, `[rotary / 2]` f32, radians; `rotary` elements of a head
    /// rotate, the rest pass through.
    pub freqs: Vector,
    /// Which elements pair.
    pub pairing: Pairing,
    /// Factor on sine and cosine (1 but for YaRN and LongRoPE).
    pub magnitude: f32,
}

impl Rope {
    /// Elements of a head that rotate.
    pub fn rotary(&self) -> u32 {
        2 * self.freqs.len
    }

    /// Indices of pair `i` within a head.
    pub fn pair(&self, i: usize) -> (usize, usize) {
        match self.pairing {
            Pairing::Adjacent => (2 * i, 2 * i + 1),
            Pairing::Halves => (i, i + self.freqs.len as usize),
        }
    }
}

impl Describe for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn shape(&self) -> String {
        format!("[{}, {}] rotary {}", self.heads, self.head_dim, self.rotary())
    }

    fn reads(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.x]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.freqs.id]
    }

    fn traffic(&self, _position: u32) -> Traffic {
        let n = u64::from(self.heads * self.head_dim);
        Traffic { weights: 4 * u64::from(self.freqs.len), kv: 0, activations: 8 * n }
    }

    fn launch(&self, _gpu: &Gpu) -> Launch {
        Launch {
            module: "elementwise".into(),
            kernel: "rope".into(),
            grid: self.heads,
            block: self.freqs.len.next_multiple_of(32),
            cluster: 1,
            shared_bytes: 0,
            programmatic: true,
            args: vec![
                Arg::Step,
                Arg::Buf(self.x),
                Arg::Weight(self.freqs.id),
                Arg::U32(self.head_dim),
                Arg::U32(self.freqs.len),
                Arg::U32(u32::from(self.pairing == Pairing::Halves)),
                Arg::F32(self.magnitude),
            ],
        }
    }

    fn reference(&self, mem: &mut HostMemory) {
        let freqs = mem.vector(self.freqs).to_vec();
        let position = mem.state.position as f32;
        let magnitude = self.magnitude;
        let pairs: Vec<_> = (0..freqs.len()).map(|i| self.pair(i)).collect();
        for head in mem.buf_mut(self.x).chunks_exact_mut(self.head_dim as usize) {
            for (f, &(a, b)) in freqs.iter().zip(&pairs) {
                let theta = position * f;
                let (sin, cos) = (theta.sin() * magnitude, theta.cos() * magnitude);
                let (x0, x1) = (head[a], head[b]);
                head[a] = x0 * cos - x1 * sin;
                head[b] = x0 * sin + x1 * cos;
            }
        }
    }
}
