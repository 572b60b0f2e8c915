//! x
pub mod error;
pub mod tokenizer;
