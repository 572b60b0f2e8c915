//! The fuzz targets on stable Rust: the corpus and what it mutates to in a second, in every run; and
//! as long as one likes:
//!
//! ```text
//! cargo test --release --test fuzz_corpus -- --ignored --nocapture twenty_million
//! ```

#![allow(missing_docs, clippy::unwrap_used)]

mod gguf_file;
#[path = "../fuzz/targets/mod.rs"]
mod targets;

use std::path::PathBuf;
use std::time::{Duration, Instant};

type Target = fn(&[u8]) -> bool;

const TARGETS: [(&str, Target); 5] = [
    ("gguf", targets::gguf),
    ("safetensors", targets::safetensors),
    ("chat_template", targets::chat_template),
    ("tokenizer", targets::tokenizer),
    ("result_json", targets::result_json),
];

fn corpus(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

/// xorshift64 (Marsaglia 2003): the same inputs in every run of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n.max(1)
    }
}

/// Values at which arithmetic on lengths and counts goes wrong.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    7,
    31,
    32,
    64,
    255,
    256,
    65_535,
    65_536,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    1 << 32,
    1 << 61,
    i64::MAX as u64,
    u64::MAX,
];

/// Most bytes of a mutated input.
const MOST_BYTES: usize = 8192;

/// Replaces `input` by a mutation of one of `seeds`.
fn mutate(random: &mut Random, seeds: &[(PathBuf, Vec<u8>)], input: &mut Vec<u8>) {
    input.clear();
    input.extend_from_slice(&seeds[random.below(seeds.len())].1);
    for _ in 0..1 + random.below(4) {
        let at = random.below(input.len());
        let size = 1 + random.below(16);
        match random.below(10) {
            0 => input.truncate(at),
            1 | 2 if !input.is_empty() => input[at] ^= 1 << random.below(8),
            3 if !input.is_empty() => input[at] = random.next() as u8,
            // A whole field, at any place: most fields are not aligned.
            4..=6 => {
                let value = EDGES[random.below(EDGES.len())].wrapping_add(random.next() % 3);
                let width = [4, 8][random.below(2)];
                let end = (at + width).min(input.len());
                input[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
            }
            7 => drop(input.drain(at..(at + size).min(input.len()))),
            8 => {
                let end = (at + 4 * size).min(input.len());
                let copy = input[at..end].to_vec();
                let to = random.below(input.len() + 1);
                input.splice(to..to, copy);
            }
            _ => {
                let other = &seeds[random.below(seeds.len())].1;
                let from = random.below(other.len());
                let part = other[from..(from + 8 * size).min(other.len())].to_vec();
                let end = (at + part.len()).min(input.len());
                input.splice(at..end, part);
            }
        }
    }
    input.truncate(MOST_BYTES);
}

/// What a campaign came to.
#[derive(Debug, Default)]
struct Tally {
    executions: u64,
    accepted: u64,
    slowest: Duration,
}

/// Runs `target` on mutations until either bound; tells how far it is every minute.
fn campaign(name: &str, target: Target, seed: u64, executions: u64, time: Duration) -> Tally {
    let seeds = corpus(name);
    let (mut random, mut input, mut tally) = (Random(seed), Vec::new(), Tally::default());
    let (start, mut told) = (Instant::now(), Duration::ZERO);
    while tally.executions < executions && start.elapsed() < time {
        for _ in 0..64 {
            mutate(&mut random, &seeds, &mut input);
            let before = Instant::now();
            let outcome = std::panic::catch_unwind(|| target(&input));
            let took = before.elapsed();
            let hex: String = match outcome {
                Ok(_) => String::new(),
                Err(_) => input.iter().map(|b| format!("{b:02x}")).collect(),
            };
            let accepted = outcome.unwrap_or_else(|_| panic!("{name} broke on {hex}"));
            tally.accepted += u64::from(accepted);
            tally.slowest = tally.slowest.max(took);
            tally.executions += 1;
        }
        if start.elapsed() - told > Duration::from_secs(60) {
            told = start.elapsed();
            println!("{name}, seed {seed}: {tally:?} in {} s", told.as_secs());
        }
    }
    tally
}

#[test]
fn the_corpus_and_its_neighbourhood_break_no_target() {
    for (name, target) in TARGETS {
        let seeds = corpus(name);
        assert!(seeds.len() >= 5, "{name}: only {} seeds", seeds.len());
        let accepted = seeds.iter().filter(|(_, bytes)| target(bytes)).count();
        assert!(accepted >= 2, "{name}: the targets must be reached behind their checks");
        let tally = campaign(name, target, 0x5EED, 4096, Duration::from_secs(2));
        assert!(tally.executions >= 64 && tally.slowest < Duration::from_secs(1), "{tally:?}");
        println!("{name}: {tally:?}");
    }
}

#[test]
#[ignore = "25 minutes: the long campaign"]
fn twenty_million_executions_of_the_gguf_target() {
    let time = Duration::from_secs(25 * 60);
    let tally = campaign("gguf", targets::gguf, 0xD1CE, 20_000_000, time);
    println!("gguf, the end: {tally:?}, 0 crashes");
    assert!(tally.slowest < Duration::from_secs(5), "{tally:?}");
}

#[test]
#[ignore = "20 minutes: the other targets"]
fn twenty_minutes_of_the_other_targets() {
    for (name, target) in &TARGETS[1..] {
        let tally = campaign(name, *target, 0xD1CE, u64::MAX, Duration::from_secs(5 * 60));
        println!("{name}, the end: {tally:?}, 0 crashes");
    }
}

/// Writes the seeds that are files of a model; the others are text, written by hand.
#[test]
#[ignore = "writes fuzz/corpus/gguf"]
fn write_the_corpus_of_models() {
    use gguf_file::{Gguf, minimal, text};
    let vocabulary = |g: Gguf| {
        let words = ["<unk>", "<s>", "</s>", "<0x41>", "a", "b", "ab"];
        let words: Vec<u8> = words.iter().flat_map(|w| text(w.as_bytes())).collect();
        let floats: Vec<u8> = (0..7).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let kinds: Vec<u8> = [2, 3, 3, 6, 1, 1, 1].into_iter().flat_map(i32::to_le_bytes).collect();
        g.array(b"tokenizer.ggml.tokens", 8, 7, &words)
            .array(b"tokenizer.ggml.scores", 6, 7, &floats)
            .array(b"tokenizer.ggml.token_type", 5, 7, &kinds)
            .key(b"tokenizer.ggml.bos_token_id", 4, &1u32.to_le_bytes())
            .key(b"tokenizer.ggml.eos_token_id", 4, &2u32.to_le_bytes())
    };
    let model = |arch: &str| {
        let k = |rest: &str| format!("{arch}.{rest}").into_bytes();
        let mut g = Gguf::default().key(b"general.architecture", 8, &text(arch.as_bytes()));
        for (rest, value) in [
            ("block_count", 1u32),
            ("context_length", 32),
            ("embedding_length", 8),
            ("feed_forward_length", 8),
            ("attention.head_count", 2),
            ("attention.head_count_kv", 1),
            ("vocab_size", 7),
        ] {
            g = g.key(&k(rest), 4, &value.to_le_bytes());
        }
        g.key(&k("attention.layer_norm_rms_epsilon"), 6, &1e-5f32.to_le_bytes())
    };
    let tensors = |mut g: Gguf| {
        for (name, dims) in [
            ("token_embd.weight", &[8, 7][..]),
            ("output_norm.weight", &[8]),
            ("blk.0.attn_norm.weight", &[8]),
            ("blk.0.ffn_norm.weight", &[8]),
            ("blk.0.attn_q.weight", &[8, 8]),
            ("blk.0.attn_k.weight", &[8, 4]),
            ("blk.0.attn_v.weight", &[8, 4]),
            ("blk.0.attn_output.weight", &[8, 8]),
            ("blk.0.ffn_gate.weight", &[8, 8]),
            ("blk.0.ffn_up.weight", &[8, 8]),
            ("blk.0.ffn_down.weight", &[8, 8]),
        ] {
            let bytes = 4 * dims.iter().product::<u64>() as usize;
            g = g.tensor(name, dims, 0, &vec![0x3C; bytes]);
        }
        g
    };
    let llama = |g: Gguf| vocabulary(g.key(b"tokenizer.ggml.model", 8, &text(b"llama")));
    let gpt2 = |g: Gguf| {
        let merges = [text(b"a b"), text(b"b a")].concat();
        vocabulary(g.key(b"tokenizer.ggml.model", 8, &text(b"gpt2")))
            .array(b"tokenizer.ggml.merges", 8, 2, &merges)
            .key(b"tokenizer.ggml.pre", 8, &text(b"smollm"))
    };
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/gguf");
    std::fs::create_dir_all(&folder).unwrap();
    for (name, bytes) in [
        ("empty_container", Gguf::default().bytes()),
        ("every_value_type", minimal().bytes()),
        ("llama_model", tensors(llama(model("llama"))).bytes()),
        ("qwen2_without_biases", tensors(gpt2(model("qwen2"))).bytes()),
        ("keys_without_tensors", gpt2(model("llama")).bytes()),
        ("one_tensor_of_blocks", Gguf::default().tensor("t", &[256], 12, &[7; 144]).bytes()),
        ("cut_in_the_data", minimal().bytes()[..600].to_vec()),
    ] {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}

/// Writes the seeds that are files of safetensors.
#[test]
#[ignore = "writes fuzz/corpus/safetensors"]
fn write_the_corpus_of_safetensors() {
    use safetensors::tensor::{Dtype, TensorView, serialize};
    const BYTES: [u8; 64] = [0x3C; 64];
    let model = |dtype: Dtype, size: usize| {
        let layer = |part: &str| format!("model.layers.0.{part}.weight");
        let tensors = [
            ("model.embed_tokens.weight".to_owned(), vec![3, 4]),
            ("model.norm.weight".to_owned(), vec![4]),
            (layer("input_layernorm"), vec![4]),
            (layer("post_attention_layernorm"), vec![4]),
            (layer("self_attn.q_proj"), vec![4, 4]),
            (layer("self_attn.k_proj"), vec![2, 4]),
            (layer("self_attn.v_proj"), vec![2, 4]),
            (layer("self_attn.o_proj"), vec![4, 4]),
            (layer("mlp.gate_proj"), vec![4, 4]),
            (layer("mlp.up_proj"), vec![4, 4]),
            (layer("mlp.down_proj"), vec![4, 4]),
        ];
        let views = tensors.map(|(name, shape)| {
            let bytes = size * shape.iter().product::<usize>();
            (name, TensorView::new(dtype, shape, &BYTES[..bytes]).unwrap())
        });
        serialize(views, None).unwrap()
    };
    let whole = model(Dtype::F32, 4);
    let header = |json: &str| [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat();
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/safetensors");
    std::fs::create_dir_all(&folder).unwrap();
    for (name, bytes) in [
        ("whole_model_f32", whole.clone()),
        ("whole_model_bf16", model(Dtype::BF16, 2)),
        ("cut_in_the_data", whole[..whole.len() - 5].to_vec()),
        ("empty_object", header("{}")),
        ("metadata_alone", header(r#"{"__metadata__":{"format":"pt"}}"#)),
        (
            "overlap",
            header(concat!(
                r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"#,
                r#""b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#
            )),
        ),
    ] {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}
