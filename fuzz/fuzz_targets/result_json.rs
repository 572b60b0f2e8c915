//! See `targets::result_json`.

#![no_main]

#[path = "../targets/mod.rs"]
#[allow(dead_code, reason = "each target uses its own function")]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    targets::result_json(data);
});
