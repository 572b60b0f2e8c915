//! x
pub mod error;
pub mod quant;
