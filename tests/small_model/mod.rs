//! Makes small GGUF files with any keys and tensors, right or wrong.
#![allow(clippy::unwrap_used)] // A wrong builder is a wrong test.
#![allow(dead_code)] // Each test file uses its own part.

use decode_graph::checkpoint::Checkpoint;
use decode_graph::quant::QuantFormat;
use std::path::{Path, PathBuf};

/// A value of a key.
#[derive(Clone, Debug)]
pub(crate) enum Key {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Text(&'static str),
    U32s(Vec<u32>),
    Bools(Vec<bool>),
}

/// A tensor: `[columns, rows]` or `[elements]`.
#[derive(Clone, Debug)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
    pub(crate) format: QuantFormat,
}

/// Keys and tensors of a model, to be changed before it is written.
#[derive(Clone, Debug)]
pub(crate) struct SmallModel {
    pub(crate) keys: Vec<(String, Key)>,
    pub(crate) tensors: Vec<Tensor>,
}

pub(crate) const HIDDEN: u64 = 64;
pub(crate) const FFN: u64 = 128;
pub(crate) const VOCAB: u64 = 96;

impl SmallModel {
    /// Two layers, 4 heads over 2 key/value heads of 16, of `format`, with tied embeddings.
    pub(crate) fn new(arch: &str, format: QuantFormat) -> Self {
        let k = |rest: &str| format!("{arch}.{rest}");
        let arch_name: &'static str = Box::leak(arch.to_owned().into_boxed_str());
        let keys = vec![
            ("general.architecture".to_owned(), Key::Text(arch_name)),
            (k("block_count"), Key::U32(2)),
            (k("context_length"), Key::U32(128)),
            (k("embedding_length"), Key::U32(HIDDEN as u32)),
            (k("feed_forward_length"), Key::U32(FFN as u32)),
            (k("attention.head_count"), Key::U32(4)),
            (k("attention.head_count_kv"), Key::U32(2)),
            (k("attention.layer_norm_rms_epsilon"), Key::F32(0.05)),
            (k("rope.freq_base"), Key::F32(10_000.0)),
            (k("vocab_size"), Key::U32(VOCAB as u32)),
        ];
        let mut m = Self { keys, tensors: Vec::new() };
        m.tensor("token_embd.weight", &[HIDDEN, VOCAB], format);
        m.tensor("output_norm.weight", &[HIDDEN], QuantFormat::F32);
        for l in 0..2 {
            let n = |part: &str| format!("blk.{l}.{part}");
            m.tensor(&n("attn_norm.weight"), &[HIDDEN], QuantFormat::F32);
            m.tensor(&n("ffn_norm.weight"), &[HIDDEN], QuantFormat::F32);
            for (part, columns, rows) in [
                ("attn_q", HIDDEN, 64),
                ("attn_k", HIDDEN, 32),
                ("attn_v", HIDDEN, 32),
                ("attn_output", 64, HIDDEN),
                ("ffn_gate", HIDDEN, FFN),
                ("ffn_up", HIDDEN, FFN),
                ("ffn_down", FFN, HIDDEN),
            ] {
                m.tensor(&n(&format!("{part}.weight")), &[columns, rows], format);
                if arch == "qwen2" && matches!(part, "attn_q" | "attn_k" | "attn_v") {
                    m.tensor(&n(&format!("{part}.bias")), &[rows], QuantFormat::F32);
                }
            }
        }
        m
    }

    pub(crate) fn tensor(&mut self, name: &str, shape: &[u64], format: QuantFormat) -> &mut Self {
        self.tensors.push(Tensor { name: name.to_owned(), shape: shape.to_vec(), format });
        self
    }

    pub(crate) fn set(&mut self, key: &str, value: Key) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self.keys.push((key.to_owned(), value));
        self
    }

    pub(crate) fn unset(&mut self, key: &str) -> &mut Self {
        self.keys.retain(|(k, _)| k != key);
        self
    }

    pub(crate) fn change(&mut self, name: &str, f: impl FnOnce(&mut Tensor)) -> &mut Self {
        f(self.tensors.iter_mut().find(|t| t.name == name).unwrap());
        self
    }

    pub(crate) fn remove(&mut self, name: &str) -> &mut Self {
        self.tensors.retain(|t| t.name != name);
        self
    }

    /// Makes a `llama` or `qwen2` of width 256, so that every format has whole blocks, with `heads`
    /// query heads over half as many.
    pub(crate) fn widen(mut self, heads: u32) -> Self {
        const WIDTH: u64 = 256;
        for t in &mut self.tensors {
            let rows = match t.name.as_str() {
                n if n.contains("attn_k.") || n.contains("attn_v.") => WIDTH / 2,
                n if n.contains("ffn_gate.") || n.contains("ffn_up.") => 2 * WIDTH,
                "token_embd.weight" => VOCAB,
                _ => WIDTH,
            };
            let columns = if t.name.contains("ffn_down.") { 2 * WIDTH } else { WIDTH };
            t.shape = if t.shape.len() == 1 { vec![rows] } else { vec![columns, rows] };
        }
        let Some(Key::Text(arch)) = self.keys.first().map(|(_, v)| v.clone()) else {
            panic!("the first key is the architecture");
        };
        for (rest, value) in [
            ("attention.head_count", heads),
            ("attention.head_count_kv", heads / 2),
            ("embedding_length", WIDTH as u32),
            ("feed_forward_length", 2 * WIDTH as u32),
        ] {
            self.set(&format!("{arch}.{rest}"), Key::U32(value));
        }
        self
    }

    /// Writes it into `folder` and opens it.
    pub(crate) fn open(&self, folder: &Path) -> Checkpoint {
        Checkpoint::open(&self.write(folder)).unwrap()
    }

    pub(crate) fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("small.gguf");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        let text = |out: &mut Vec<u8>, s: &str| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s.as_bytes());
        };
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            text(&mut out, key);
            let id: u32 = match value {
                Key::U32(_) => 4,
                Key::I32(_) => 5,
                Key::F32(_) => 6,
                Key::Text(_) => 8,
                Key::U32s(_) | Key::Bools(_) => 9,
                Key::U64(_) => 10,
            };
            out.extend(id.to_le_bytes());
            match value {
                Key::U32(v) => out.extend(v.to_le_bytes()),
                Key::I32(v) => out.extend(v.to_le_bytes()),
                Key::U64(v) => out.extend(v.to_le_bytes()),
                Key::F32(v) => out.extend(v.to_le_bytes()),
                Key::Text(v) => text(&mut out, v),
                Key::U32s(v) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend((v.len() as u64).to_le_bytes());
                    v.iter().for_each(|v| out.extend(v.to_le_bytes()));
                }
                Key::Bools(v) => {
                    out.extend(7u32.to_le_bytes());
                    out.extend((v.len() as u64).to_le_bytes());
                    out.extend(v.iter().map(|v| u8::from(*v)));
                }
            }
        }
        let mut data = Vec::new();
        for t in &self.tensors {
            text(&mut out, &t.name);
            out.extend((t.shape.len() as u32).to_le_bytes());
            t.shape.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.format.describe().ggml_id().to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(weights(t));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }
}

/// Seeded weights: norms about 1, everything else about 0.
fn weights(t: &Tensor) -> Vec<u8> {
    let mut state =
        t.name.bytes().fold(0x1234_5678_u64, |s, b| (s ^ u64::from(b)).wrapping_mul(0x100_0193));
    let mut bits = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u32
    };
    let rows: u64 = t.shape[1..].iter().product();
    let columns = t.shape[0] as usize;
    if t.name.ends_with("norm.weight") && t.format == QuantFormat::F32 {
        let one = |_| 1.0 + (bits() as f32 / 2f32.powi(32) - 0.5) * 0.2;
        return (0..t.shape.iter().product::<u64>()).map(one).flat_map(f32::to_le_bytes).collect();
    }
    let mut out = vec![0; t.format.row_bytes(columns).unwrap() * rows as usize];
    t.format.describe().synthesize(1.0 / (columns as f32).sqrt(), &mut bits, &mut out);
    out
}
