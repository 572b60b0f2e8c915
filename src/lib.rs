//! A language model's decode step, recorded once as a plan and replayed as one CUDA graph.

pub mod arch;
pub mod bench;
pub mod checkpoint;
pub mod cuda;
mod engine;
pub mod error;
pub mod ops;
pub mod plan;
pub mod quant;
pub mod reference;
pub mod session;
pub mod tokenizer;
pub mod verify;
