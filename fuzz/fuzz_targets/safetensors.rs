//! See `targets::safetensors`.

#![no_main]

#[path = "../targets/mod.rs"]
#[allow(dead_code, reason = "each target uses its own function")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    targets::safetensors(data);
});
