//! Batch-1 decode of a language model as one captured CUDA graph.
pub mod checkpoint;
pub mod error;
pub mod quant;
