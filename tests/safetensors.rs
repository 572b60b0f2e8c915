//! A folder of safetensors is the model that the same weights are as GGUF, and the one that
//! `transformers` runs; what is wrong with it is said by file, key or tensor.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

mod counting_allocator;
mod small_model;

use counting_allocator::bounded;
use decode_graph::arch;
use decode_graph::checkpoint::{Checkpoint, write_gguf};
use decode_graph::error::{Defect, Error};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use safetensors::tensor::{Dtype, TensorView, serialize};
use serde_json::{Value, json};
use small_model::{FFN, HIDDEN, SmallModel, VOCAB};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Logits after each token, `[tokens, vocab]`.
fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<Vec<f32>> {
    let capacity = tokens.len() as u32;
    let options =
        SessionOptions { backend: BackendChoice::Cpu, capacity, ..SessionOptions::default() };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {}).unwrap();
    let step = |t: &u32| {
        session.feed(*t).unwrap();
        session.logits().unwrap()
    };
    tokens.iter().map(step).collect()
}

/// A tensor to be written: type, shape (outermost first), bytes.
type Raw = (Dtype, Vec<usize>, Vec<u8>);

/// The name that a tensor of GGUF has in a checkpoint of `transformers`.
fn name(gguf: &str) -> String {
    let parts = [
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    match gguf {
        "token_embd.weight" => return "model.embed_tokens.weight".to_owned(),
        "output_norm.weight" => return "model.norm.weight".to_owned(),
        _ => {}
    }
    let mut pieces = gguf.split('.').skip(1);
    let (layer, part, kind) =
        (pieces.next().unwrap(), pieces.next().unwrap(), pieces.next().unwrap());
    let own = parts.iter().find(|(gguf, _)| *gguf == part).unwrap().1;
    format!("model.layers.{layer}.{own}.{kind}")
}

/// The tensors of a small model as `transformers` would store them.
fn stored(model: &Checkpoint, interleaved: bool) -> BTreeMap<String, Raw> {
    let of = |t: &decode_graph::checkpoint::TensorInfo| {
        let mut bytes = model.read_all(t).unwrap();
        if interleaved && (t.name.contains("attn_q.") || t.name.contains("attn_k.")) {
            // Back to halves: of each head of 16 rows first the even ones, then the odd ones.
            let rows = *t.shape.last().unwrap() as usize;
            let row = bytes.len() / rows;
            let order = (0..rows).map(|r| (r / 16) * 16 + (r % 8) * 2 + (r % 16) / 8);
            bytes = order.flat_map(|r| bytes[r * row..(r + 1) * row].to_vec()).collect();
        }
        let dtype = match t.format {
            QuantFormat::F32 => Dtype::F32,
            QuantFormat::F16 => Dtype::F16,
            QuantFormat::Bf16 => Dtype::BF16,
            other => panic!("{other}"),
        };
        let shape = t.shape.iter().rev().map(|n| *n as usize).collect();
        (name(&t.name), (dtype, shape, bytes))
    };
    model.tensors().iter().map(of).collect()
}

fn config(arch: &str) -> Value {
    json!({
        "model_type": arch, "num_hidden_layers": 2, "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 0.05, "rope_theta": 10000.0, "vocab_size": VOCAB, "hidden_act": "silu",
        "tie_word_embeddings": true, "torch_dtype": "float32", "rope_scaling": null,
    })
}

fn bytes(tensors: &BTreeMap<String, Raw>) -> Vec<u8> {
    let view = |(_, (dtype, shape, bytes)): (&String, &Raw)| {
        // The bytes live as long as the map.
        let bytes: &'static [u8] = Box::leak(bytes.clone().into_boxed_slice());
        TensorView::new(*dtype, shape.clone(), bytes).unwrap()
    };
    serialize(tensors.iter().map(|t| (t.0.clone(), view(t))), None).unwrap()
}

/// Writes a folder with `shards` files.
fn write(folder: &Path, config: &Value, tensors: &BTreeMap<String, Raw>, shards: usize) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    if shards == 1 {
        std::fs::write(folder.join("model.safetensors"), bytes(tensors)).unwrap();
        return;
    }
    let mut map = BTreeMap::new();
    for shard in 0..shards {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let own = tensors.clone().into_iter().enumerate().filter(|(i, _)| i % shards == shard);
        let part: BTreeMap<String, Raw> = own.map(|(_, t)| t).collect();
        map.extend(part.keys().map(|name| (name.clone(), file.clone())));
        std::fs::write(folder.join(file), bytes(&part)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn the_same_weights_as_gguf_and_as_a_folder_give_the_same_logits_bit_for_bit() {
    for arch in ["llama", "qwen2"] {
        for (format, shards) in
            [(QuantFormat::F32, 1), (QuantFormat::Bf16, 3), (QuantFormat::F16, 2)]
        {
            let folder = tempfile::tempdir().unwrap();
            let gguf = SmallModel::new(arch, format).open(folder.path());
            write(folder.path(), &config(arch), &stored(&gguf, arch == "llama"), shards);
            let made = Checkpoint::open(folder.path()).unwrap();
            assert_eq!(made.tensors().len(), gguf.tensors().len());
            for t in gguf.tensors() {
                let own = made.tensor(&t.name).unwrap();
                assert_eq!((own.format, &own.shape), (t.format, &t.shape), "{}", t.name);
                assert_eq!(made.read_all(own).unwrap(), gguf.read_all(t).unwrap(), "{}", t.name);
            }
            let tokens: Vec<u32> = (0..24).map(|i| (i * 37 + 5) % VOCAB as u32).collect();
            let expected = logits(&gguf, &tokens);
            assert_eq!(logits(&made, &tokens), expected, "{arch} {format}");
            let copy = folder.path().join("copy.gguf");
            write_gguf(&made, &copy, &mut |_, _| {}).unwrap();
            assert_eq!(logits(&Checkpoint::open(&copy).unwrap(), &tokens), expected);
        }
    }
}

/// Folders under `golden/transformers`, by name.
fn goldens() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/transformers");
    let mut all: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    all
}

/// First of the largest.
fn argmax(values: &[f32]) -> usize {
    (0..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// Every `model_type` that is mapped, as the refusal of another one lists them.
fn known() -> BTreeSet<String> {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), &config("another"), &BTreeMap::new(), 1);
    let said = Checkpoint::open(folder.path()).unwrap_err().to_string();
    let (_, list) = said.split_once("known are ").unwrap_or_else(|| panic!("{said}"));
    let names = list.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    names.filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[test]
fn every_family_that_is_known_computes_what_transformers_computes() {
    let mut served = BTreeSet::new();
    for folder in goldens() {
        let family = folder.file_name().unwrap().to_str().unwrap().to_owned();
        let checkpoint = Checkpoint::open(&folder).unwrap_or_else(|e| panic!("{family}: {e}"));
        let text = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
        let tokens: Vec<u32> = serde_json::from_str(&text("tokens.json")).unwrap();
        let golden = std::fs::read(folder.join("logits.bin")).unwrap();
        let golden: Vec<f32> =
            golden.as_chunks().0.iter().map(|b: &[u8; 4]| f32::from_le_bytes(*b)).collect();
        let own = logits(&checkpoint, &tokens);
        let rows = golden.chunks_exact(golden.len() / tokens.len());
        assert_eq!((own.len(), rows.len()), (96, 96), "{family}");
        let mut worst = 0f32;
        for (position, (own, golden)) in own.iter().zip(rows).enumerate() {
            assert_eq!(own.len(), golden.len(), "{family}: logits at {position}");
            assert_eq!(argmax(own), argmax(golden), "{family}: first choice at {position}");
            worst = own.iter().zip(golden).fold(worst, |w, (a, b)| w.max((a - b).abs()));
        }
        println!("{family}: {} positions, largest error of a logit {worst:.2e}", tokens.len());
        assert!(worst <= 1e-3, "{family}: {worst}");
        let config: Value = serde_json::from_str(&text("config.json")).unwrap();
        served.insert(config["model_type"].as_str().unwrap().to_owned());
    }
    assert_eq!(served, known(), "a family without a golden, or a golden of no family");
}

/// A well-formed small folder of `llama`.
fn sound(folder: &Path) -> BTreeMap<String, Raw> {
    let gguf = SmallModel::new("llama", QuantFormat::F32).open(folder);
    let tensors = stored(&gguf, true);
    write(folder, &config("llama"), &tensors, 1);
    tensors
}

fn invalid(folder: &Path) -> (Defect, String) {
    told(Checkpoint::open(folder))
}

fn told(outcome: Result<Checkpoint, Error>) -> (Defect, String) {
    match outcome {
        Err(e @ Error::InvalidModel { defect, .. }) => (defect, e.to_string()),
        Err(other) => panic!("another error: {other}"),
        Ok(_) => panic!("accepted"),
    }
}

/// `header` with its length before it and `data` zeros after it.
fn file(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

#[test]
fn a_malformed_file_is_refused_by_class_and_place() {
    let folder = tempfile::tempdir().unwrap();
    sound(folder.path());
    let f32s = |name: &str, n: usize, from: usize, to: usize| {
        format!(r#""{name}":{{"dtype":"F32","shape":[{n}],"data_offsets":[{from},{to}]}}"#)
    };
    let one = |entry: &str| format!("{{{entry}}}");
    let (a, b) = (f32s("a", 2, 0, 8), f32s("b", 2, 8, 16));
    let cases: [(&str, Vec<u8>, Defect, &str); 29] = [
        ("S01", vec![1, 2, 3], Defect::Truncated, "header length"),
        ("S02", (1u64 << 63).to_le_bytes().to_vec(), Defect::BadCount, "header length"),
        ("S03", [&1000u64.to_le_bytes()[..], b"{}"].concat(), Defect::Truncated, "header"),
        ("S04", 100_000_001u64.to_le_bytes().to_vec(), Defect::BadCount, "header length"),
        ("S05", file(" {}", 0), Defect::BadMagic, "header"),
        ("S05 empty", file("", 0), Defect::BadMagic, "header"),
        ("S05 mark", file("\u{feff}{}", 0), Defect::BadMagic, "header"),
        ("S06", [&4u64.to_le_bytes()[..], b"{\"\xff\""].concat(), Defect::BadString, "header"),
        ("S07", file("{\"a\":", 0), Defect::BadType, "tensor a"),
        ("S08", file(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), Defect::BadType, "tensor a"),
        ("S10", file(&one(&format!("{a},{}", f32s("b", 2, 4, 12))), 12), Defect::BadOffset, "b"),
        ("S11", file(&one(&format!("{a},{}", f32s("b", 2, 12, 20))), 20), Defect::BadOffset, "b"),
        ("S12", file(&one(&a), 9), Defect::BadOffset, "data"),
        ("S13", file(&one(&f32s("a", 2, 8, 0)), 8), Defect::BadOffset, "tensor a"),
        ("short", file(&one(&a), 7), Defect::Truncated, "tensor a"),
        ("S15", file(&one(&a.replace("0,8", "0,-8")), 8), Defect::BadType, "tensor a"),
        ("S15 real", file(&one(&a.replace("0,8", "0,8e0")), 8), Defect::BadType, "tensor a"),
        ("S15 text", file(&one(&a.replace("0,8", "0,\"8\"")), 8), Defect::BadType, "tensor a"),
        (
            "S15 2^64",
            file(&one(&a.replace("0,8", "0,18446744073709551616")), 8),
            Defect::BadType,
            "tensor a",
        ),
        (
            "S15 2^64 - 1",
            file(&one(&a.replace("0,8", "0,18446744073709551615")), 8),
            Defect::Truncated,
            "tensor a",
        ),
        ("S16", file(&one(&f32s("a", 3, 0, 8)), 8), Defect::ShapeMismatch, "tensor a"),
        (
            "S17",
            file(&one(&a.replace("[2]", "[4294967296,4294967296]")), 8),
            Defect::SizeOverflow,
            "tensor a",
        ),
        ("S20", file(&one(&format!("{a},{a}")), 8), Defect::Duplicate, "tensor a"),
        (
            "S21",
            file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0),
            Defect::Duplicate,
            "__metadata__",
        ),
        ("S22", file(r#"{"__metadata__":{"a":1}}"#, 0), Defect::BadType, "__metadata__"),
        ("S23", file(&one(&a.replace("F32", "F33")), 8), Defect::UnknownType, "tensor a"),
        (
            "S23 odd",
            file(&one(&a.replace("F32", "F4").replace("[2]", "[3]").replace("0,8", "0,2")), 2),
            Defect::BadShape,
            "tensor a",
        ),
        ("after", file(&format!("{} x", one(&a)), 8), Defect::BadType, "header"),
        ("gone", file(&one(&format!("{a},{b}")), 16), Defect::MissingTensor, "lm_head"),
    ];
    for (id, bytes, expected, at) in cases {
        let size = bytes.len();
        std::fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        if id == "gone" {
            // Well-formed: only what it lacks is wrong, and its names.
            assert!(matches!(Checkpoint::open(folder.path()), Err(Error::Unsupported { .. })));
            continue;
        }
        let (defect, said) = told(bounded(id, size, || Checkpoint::open(folder.path())));
        assert_eq!(defect, expected, "{id}: {said}");
        assert!(said.contains(" at byte "), "{id}: no place: {said}");
        assert!(said.contains("model.safetensors") && said.contains(at), "{id}: {said}");
    }
}

#[test]
fn a_tensor_that_is_refused_is_told_where_the_header_names_it() {
    let folder = tempfile::tempdir().unwrap();
    sound(folder.path());
    let entry =
        |name: &str| format!(r#""{name}":{{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#);
    // Also where the name stands before it as a text, and after it as part of another.
    for (name, header, at) in [
        ("a", format!("{{{}}}", entry("a")), 9),
        ("b", format!(r#"{{"__metadata__":{{"b":"b"}}, {}}}"#, entry("b")), 35),
        ("c", format!("{{\n {}\n}}", entry("c")), 11),
        // Escapes are not followed: the header's own place.
        ("d", format!("{{{}}}", entry("\\u0064")), 8),
    ] {
        std::fs::write(folder.path().join("model.safetensors"), file(&header, 8)).unwrap();
        match Checkpoint::open(folder.path()).unwrap_err() {
            Error::InvalidModel { at: field, offset, defect: Defect::ShapeMismatch, .. } => {
                assert_eq!((field, offset), (format!("tensor {name}"), Some(at)), "{header}");
            }
            other => panic!("{header}: {other}"),
        }
    }
}

#[test]
fn no_prefix_and_no_flipped_bit_of_a_header_makes_it_panic() {
    let folder = tempfile::tempdir().unwrap();
    let entry = r#"{"model.norm.weight":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}}"#;
    let whole = file(entry, 8);
    std::fs::write(folder.path().join("config.json"), config("llama").to_string()).unwrap();
    let path = folder.path().join("model.safetensors");
    for cut in 0..whole.len() {
        std::fs::write(&path, &whole[..cut]).unwrap();
        assert!(Checkpoint::inspect_only(folder.path()).is_err(), "cut at {cut}");
    }
    for bit in 0..whole.len() * 8 {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &flipped).unwrap();
        let _ = Checkpoint::open(folder.path());
        let _ = Checkpoint::inspect_only(folder.path());
    }
}

#[test]
fn a_header_of_a_million_tensors_is_refused_soon() {
    let folder = tempfile::tempdir().unwrap();
    sound(folder.path());
    let entry = |i| format!(r#""{i}":{{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#);
    let all: Vec<String> = (0..200_000).map(entry).collect();
    std::fs::write(
        folder.path().join("model.safetensors"),
        file(&format!("{{{}}}", all.join(",")), 4),
    )
    .unwrap();
    let start = std::time::Instant::now();
    assert_eq!(invalid(folder.path()).0, Defect::BadCount);
    assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
    // S09 within the limit of tensors: all of them on one span.
    let all = file(&format!("{{{}}}", all[..65_536].join(",")), 4);
    std::fs::write(folder.path().join("model.safetensors"), all).unwrap();
    let start = std::time::Instant::now();
    assert_eq!(invalid(folder.path()).0, Defect::BadOffset);
    assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
}

#[test]
fn shards_stay_in_the_folder_and_are_whole() {
    let index = "model.safetensors.index.json";
    for name in ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "passwd", ".."] {
        let folder = tempfile::tempdir().unwrap();
        sound(folder.path());
        let map = json!({"weight_map": {"model.norm.weight": name}});
        std::fs::write(folder.path().join(index), map.to_string()).unwrap();
        let (defect, said) = invalid(folder.path());
        assert_eq!(defect, Defect::BadName, "{name}");
        assert!(said.contains(index) && said.contains("weight_map"), "{said}");
    }
    let folder = tempfile::tempdir().unwrap();
    let tensors = sound(folder.path());
    write(folder.path(), &config("llama"), &tensors, 3);
    let second = folder.path().join("model-00002-of-00003.safetensors");
    let bytes = std::fs::read(&second).unwrap();
    std::fs::remove_file(&second).unwrap();
    let (defect, said) = invalid(folder.path());
    assert_eq!(defect, Defect::BadSplit);
    assert!(said.contains("model-00002-of-00003.safetensors"), "{said}");
    // The first shard under the second's name: its tensors stand twice.
    std::fs::copy(folder.path().join("model-00001-of-00003.safetensors"), &second).unwrap();
    let (defect, said) = invalid(folder.path());
    assert_eq!(defect, Defect::Duplicate);
    assert!(said.contains("model-00002-of-00003.safetensors: tensor "), "{said}");
    std::fs::write(&second, bytes).unwrap();
    let text = std::fs::read_to_string(folder.path().join(index)).unwrap();
    let other = text.replacen("00002-of", "00001-of", 1);
    std::fs::write(folder.path().join(index), other).unwrap();
    assert_eq!(invalid(folder.path()).0, Defect::MissingTensor);
}

#[test]
fn what_a_configuration_asks_for_is_mapped_or_refused_by_key() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = sound(folder.path());
    let with = |change: &dyn Fn(&mut Value)| {
        let mut config = config("llama");
        change(&mut config);
        write(folder.path(), &config, &tensors, 1);
        Checkpoint::open(folder.path())
    };
    let set = |key: &'static str, value: Value| with(&move |c: &mut Value| c[key] = value.clone());
    for (key, value, expected) in [
        ("num_attention_heads", json!(0), Defect::BadValue),
        ("num_attention_heads", json!(5), Defect::BadValue),
        ("num_attention_heads", json!("4"), Defect::BadType),
        ("num_attention_heads", json!(-4), Defect::BadType),
        ("num_key_value_heads", json!(0), Defect::BadValue),
        ("hidden_size", json!(0), Defect::BadValue),
        ("num_hidden_layers", json!(null), Defect::MissingKey),
        ("max_position_embeddings", json!(0), Defect::BadValue),
        ("rope_theta", json!(-1), Defect::BadValue),
        ("rms_norm_eps", json!("x"), Defect::BadType),
        ("partial_rotary_factor", json!(1.5), Defect::BadValue),
    ] {
        match set(key, value.clone()) {
            Err(Error::InvalidModel { path, at, defect, .. }) => {
                assert_eq!(defect, expected, "{key} = {value}");
                assert!(path.ends_with("config.json") && at.contains(key), "{at}");
            }
            other => panic!("{key} = {value}: {other:?}"),
        }
    }
    // S26: what is only wrong in a plan is said with the key of this file, too.
    for (key, value) in [
        ("num_hidden_layers", json!(0)),
        ("partial_rotary_factor", json!(0)),
        ("head_dim", json!(15)),
        ("head_dim", json!(1000)),
        ("rms_norm_eps", json!(0.0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rope_theta", json!(0)),
        ("max_position_embeddings", json!(1u64 << 63)),
        ("intermediate_size", json!(0)),
        ("intermediate_size", json!(1u64 << 31)),
    ] {
        let outcome = set(key, value.clone()).and_then(|c| arch::ModelConfig::read(&c).map(drop));
        let error = outcome.unwrap_err();
        let said = error.to_string();
        let class = matches!(error, Error::InvalidModel { defect: Defect::BadValue, .. });
        assert!(class && said.contains("config.json"), "{key} = {value}: {said}");
        // Half a rotation is what is wrong with an odd head.
        let named = said.contains(key) || said.contains("15 of a head's 15 elements");
        assert!(named, "{key} = {value}: {said}");
    }
    let plan = arch::ModelConfig::read(&set("num_hidden_layers", json!(2_000_000)).unwrap());
    let said = plan.unwrap_err().to_string();
    assert!(said.contains("config.json: num_hidden_layers (llama.block_count)"), "{said}");
    for (key, value, named) in [
        ("model_type", json!("gpt_neox"), "gpt_neox"),
        ("hidden_act", json!("relu"), "relu"),
        ("quantization_config", json!({"quant_method": "gptq"}), "quantised"),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0}), "dynamic"),
    ] {
        let refusal = set(key, value).unwrap_err();
        assert_eq!(refusal.exit_code(), 4, "{refusal}");
        assert!(refusal.to_string().contains(named), "{refusal}");
    }
    let untied = set("tie_word_embeddings", json!(false)).unwrap_err().to_string();
    assert!(untied.contains("lm_head.weight"), "{untied}");
    let biases = set("attention_bias", json!(true)).unwrap_err().to_string();
    assert!(biases.contains("blk.0.attn_q.bias"), "{biases}");
    let scaled = set(
        "rope_scaling",
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
    );
    let scaled = scaled.unwrap();
    let factors = scaled.read_all(scaled.tensor("rope_freqs.weight").unwrap()).unwrap();
    assert_eq!(factors.len(), 8 * 4);
    assert_eq!(factors[28..], 8f32.to_le_bytes());
}

#[test]
fn a_tensor_of_another_type_or_without_a_place_is_refused_by_name_and_listed() {
    let folder = tempfile::tempdir().unwrap();
    let tensors = sound(folder.path());
    let cases = [
        ("model.norm.weight", "I64", Dtype::I64, 8, "I64"),
        ("model.layers.0.mlp.extra_proj.weight", "place", Dtype::F32, 4, "llama models"),
        ("model.layers.7.mlp.up_proj.weight", "layer", Dtype::F32, 4, "llama models"),
        ("vision_tower.weight", "vision", Dtype::F32, 4, "llama models"),
    ];
    for (name, what, dtype, size, said) in cases {
        let mut changed = tensors.clone();
        changed.insert(name.to_owned(), (dtype, vec![64], vec![0; 64 * size]));
        write(folder.path(), &config("llama"), &changed, 1);
        let refusal = Checkpoint::open(folder.path()).unwrap_err();
        assert_eq!(refusal.exit_code(), 4, "{what}: {refusal}");
        let text = refusal.to_string();
        assert!(text.contains(name) && text.contains(said), "{what}: {text}");
        let listed = Checkpoint::inspect_only(folder.path()).unwrap();
        assert_eq!(listed.architecture(), Some("llama"));
        let found = listed.tensors.iter().find(|t| t.name == name).unwrap();
        assert_eq!(found.type_name, dtype.to_string());
    }
}
