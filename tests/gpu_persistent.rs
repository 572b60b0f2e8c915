//! The tests of `gpu_engine.rs` with the persistent kernel, which is on trial.

#[path = "gpu_engine.rs"]
mod engine;
