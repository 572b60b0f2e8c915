//! The tests of `gpu_engine.rs` with the persistent kernel.

#[path = "gpu_engine.rs"]
mod engine;
