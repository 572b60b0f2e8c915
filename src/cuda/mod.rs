//! The plan on a CUDA device: driver binding, memory, kernels, issue, graph, debug.
//!
//! ```text
//! plan ── bind ──▶ BoundPlan ──issue──┬─▶ graph   captured once, one driver call a token
//!          ▲                          └─▶ eager   launch by launch; GPU_DEBUG looks at each step
//!   upload, kernels, signature
//! ```

pub mod bind;
mod byte_plan;
mod captured;
pub mod ceiling;
pub mod driver;
pub mod eager;
pub mod engine;
mod fill;
pub mod graph;
mod issue;
pub mod kernels;
mod modules;
mod program;
mod red_zones;
mod signature;
mod stamps;
pub mod step_state;
pub mod upload;

pub use bind::BoundPlan;
pub use byte_plan::BytePlan;
pub use captured::{Captured, CapturedNode};
pub use engine::{CudaEngine, CudaOptions};
pub use graph::CapturedGraph;
