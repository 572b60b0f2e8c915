//! The golden plan listings under `graphs/`: what a model's token costs on an H200, in text that a
//! review can read. `cargo test --test graphs -- --ignored` writes them anew.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests.

use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::ops::{Gpu, KvType};
use decode_graph::plan::fuse::fuse;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// File under `graphs/`, what it lists, and whether the plan is fused.
const LISTINGS: [(&str, &str, bool); 11] = [
    ("gemma-2-2b-q4_k_m.txt", "gemma-2-2b:q4_k_m", true),
    ("gemma-3-270m-q4_k_m.txt", "gemma-3-270m:q4_k_m", true),
    ("llama-3.1-8b-q4_k_m.txt", "llama-3.1-8b:q4_k_m", true),
    ("llama-3.2-1b-q4_k_m.txt", "llama-3.2-1b:q4_k_m", true),
    ("mixtral-8x7b-q4_k_m.txt", "mixtral-8x7b:q4_k_m", true),
    ("phi-4-mini-q4_k_m.txt", "phi-4-mini:q4_k_m", true),
    ("qwen2.5-1.5b-q4_k_m.txt", "qwen2.5-1.5b:q4_k_m", true),
    ("qwen3-30b-a3b-q4_k_m.txt", "qwen3-30b-a3b:q4_k_m", true),
    ("qwen3-8b-q4_k_m.txt", "qwen3-8b:q4_k_m", true),
    ("smollm2-135m-q4_1.txt", "smollm2-135m:q4_1", true),
    ("tiny-q4_k_m-no-fuse.txt", "tiny:q4_k_m", false),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("graphs")
}

/// What `decode-bench graph --synthetic SPEC -o plan` prints.
fn listing(spec: &str, fused: bool) -> String {
    let model = Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap();
    let plain = arch::record(&model, PlanOptions { capacity: 4096, kv: KvType::F16 }).unwrap();
    if fused { fuse(&plain).listing(&Gpu::H200) } else { plain.listing(&Gpu::H200) }
}

#[test]
fn golden_listings_are_what_the_recorder_records() {
    for (file, spec, fused) in LISTINGS {
        let found = listing(spec, fused);
        let golden = std::fs::read_to_string(folder().join(file)).unwrap();
        let differing = golden.lines().zip(found.lines()).enumerate().find(|(_, (a, b))| a != b);
        if let Some((n, (golden, found))) = differing {
            panic!("graphs/{file}, line {}:\n  golden {golden}\n  now    {found}", n + 1);
        }
        assert_eq!(golden, found, "graphs/{file} has another length");
    }
}

#[test]
fn every_architecture_has_a_listing_of_its_fused_plan() {
    let fused = LISTINGS.iter().filter(|(.., fused)| *fused);
    let listed: BTreeSet<String> = fused
        .map(|(_, spec, _)| {
            let model = Checkpoint::synthetic(&SyntheticSpec::parse(spec).unwrap()).unwrap();
            model.architecture().unwrap().to_owned()
        })
        .collect();
    for architecture in arch::SUPPORTED {
        assert!(listed.contains(architecture), "{architecture} has no listing");
    }
}

#[test]
fn every_listing_in_the_folder_is_compared() {
    let compared: BTreeSet<String> = LISTINGS.iter().map(|(file, ..)| (*file).to_owned()).collect();
    let files = std::fs::read_dir(folder()).unwrap();
    let there: BTreeSet<String> = files
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".txt"))
        .collect();
    assert_eq!(there, compared);
}

#[test]
#[ignore = "writes graphs/*.txt: cargo test --test graphs -- --ignored"]
fn regenerate() {
    for (file, spec, fused) in LISTINGS {
        std::fs::write(folder().join(file), listing(spec, fused)).unwrap();
    }
}
