//! Measuring decode latency: how it is sampled, summarised, related to the memory's speed,
//! printed and compared.
//!
//! ```text
//! measure ──Measurement──▶ stats ──▶ fields (one description of a row) ──▶ report md/json/csv/sql
//!    ▲                        ▲                                                  │
//! DecodeSession           roofline (bytes a token, % of ceiling)      compare ◀──┤ (result files)
//! telemetry (nvml)                                                    plot    ◀──┘
//! ```

pub mod baseline;
pub mod bootstrap;
pub mod compare;
pub mod fields;
pub mod measure;
pub mod model;
pub mod nvml;
pub mod plot;
pub mod profile;
pub mod report;
pub mod roofline;
pub mod stats;
pub mod telemetry;

pub use roofline::ceiling;
