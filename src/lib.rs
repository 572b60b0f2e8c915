//! x
pub mod cuda;
pub mod error;
