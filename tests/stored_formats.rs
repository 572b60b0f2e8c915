//! A tensor is its values, whatever format it is stored in: a norm, a bias or a matrix that a file
//! stores in a format of its own computes what the same values stored as f32 compute, on the CPU and,
//! bit for bit the same, over the fake driver. A type that is taken for another one, or a tensor that
//! is passed over, does not. The ids are those of the list that the cases were collected in.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod small_model;

use decode_graph::checkpoint::Checkpoint;
use decode_graph::ops::KvType;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use fake_driver::Fake;
use small_model::{HIDDEN, SmallModel, VOCAB};

/// Logits after a few tokens.
fn logits(checkpoint: &Checkpoint, backend: BackendChoice, fused: bool) -> Vec<f32> {
    let (kv, persistent) = (Some(KvType::F16), false);
    let options =
        SessionOptions { backend, kv, fused, persistent, capacity: 8, ..SessionOptions::default() };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {}).unwrap();
    for token in [5, 9, 2] {
        session.feed(token).unwrap();
    }
    session.logits().unwrap()
}

fn opened(bytes: Vec<u8>) -> Checkpoint {
    Checkpoint::from_gguf("stored.gguf".as_ref(), bytes).unwrap()
}

fn data(checkpoint: &Checkpoint, name: &str) -> Vec<u8> {
    checkpoint.read_all(checkpoint.tensor(name).unwrap()).unwrap()
}

/// `model` with the tensor `name` stored as f32, and in it `values`.
fn with_values(model: &SmallModel, name: &str, values: &[f32]) -> Checkpoint {
    let mut model = model.clone();
    model.change(name, |t| t.format = QuantFormat::F32);
    let mut bytes = model.bytes();
    let old = data(&opened(bytes.clone()), name);
    let at = bytes.windows(old.len()).position(|w| w == old).unwrap();
    let new: Vec<u8> = values.iter().copied().flat_map(f32::to_le_bytes).collect();
    bytes[at..at + old.len()].copy_from_slice(&new);
    opened(bytes)
}

/// The largest difference, of the largest value.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
    a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / largest
}

#[test]
fn a_tensor_of_a_format_of_its_own_computes_what_its_values_as_f32_do() {
    use QuantFormat::{Bf16, F16, Q4_0, Q5_1, Q8_0};
    let _fake = Fake::new();
    let mut llama = SmallModel::new("llama", Q8_0);
    let mut qwen2 = SmallModel::new("qwen2", Q8_0);
    for model in [&mut llama, &mut qwen2] {
        model.tensor("output.weight", &[HIDDEN, VOCAB], Q8_0);
    }
    // M18, M21, M22.
    for (model, name, formats) in [
        (&llama, "blk.0.attn_norm.weight", &[F16, Bf16, Q8_0][..]),
        (&llama, "output_norm.weight", &[F16, Q8_0]),
        (&qwen2, "blk.1.attn_k.bias", &[F16, Q8_0]),
        (&llama, "output.weight", &[F16, Q4_0]),
        (&llama, "token_embd.weight", &[Bf16, Q4_0]),
        (&llama, "blk.1.ffn_down.weight", &[F16, Q5_1]),
        (&qwen2, "blk.0.attn_v.weight", &[Bf16, Q4_0]),
    ] {
        for format in formats {
            let row = format!("{name} as {format}");
            let mut model = model.clone();
            model.change(name, |t| t.format = *format);
            let own = opened(model.bytes());
            let tensor = own.tensor(name).unwrap();
            assert_eq!(tensor.format, *format);
            let columns = tensor.shape[0] as usize;
            let stored = data(&own, name);
            let mut values = vec![0.0; tensor.shape.iter().product::<u64>() as usize];
            let rows = stored.chunks_exact(format.row_bytes(columns).unwrap());
            for (row, out) in rows.zip(values.chunks_exact_mut(columns)) {
                format.decode_row(row, out);
            }
            let plain = with_values(&model, name, &values);
            let found = logits(&own, BackendChoice::Cpu, true);
            let off = apart(&logits(&plain, BackendChoice::Cpu, true), &found);
            assert!(off <= 1e-5, "{row}: {off}");
            // The comparison can fail: other values are other logits.
            let others: Vec<f32> = values.iter().map(|v| v * 1.25).collect();
            let other = with_values(&model, name, &others);
            let off = apart(&logits(&other, BackendChoice::Cpu, true), &found);
            assert!(off > 1e-3, "{row}: its values make no difference: {off}");
            for fused in [true, false] {
                let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let cpu = bits(logits(&own, BackendChoice::Cpu, fused));
                let device = bits(logits(&own, BackendChoice::Cuda, fused));
                assert!(cpu == device, "{row} on the device, fused {fused}");
            }
        }
    }
}
