//! Measuring decode latency: how it is sampled, summarised, related to the memory's speed,
//! printed and compared.
//!
//! ```text
//! measure ──Measurement──▶ stats ──▶ fields (one description of a row) ──▶ report md/json/csv/sql
//!    ▲                        ▲                                                  │
//! DecodeSession           roofline (bytes a token, % of ceiling)      compare ◀──┘ (result files)
//! ```

pub mod compare;
pub mod fields;
pub mod measure;
pub mod model;
pub mod profile;
pub mod report;
pub mod roofline;
pub mod stats;

pub use roofline::ceiling;
