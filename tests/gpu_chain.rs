//! The tests of `gpu_engine.rs`, with a kernel a step instead of the persistent kernel.

#[path = "gpu_engine.rs"]
mod engine;
