//! A language model's decode step, recorded once as a plan and replayed as one CUDA graph.
//!
//! ```
//! use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
//! use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
//! use std::ops::ControlFlow;
//!
//! // Seeded random weights; `Checkpoint::open` reads a file.
//! let model = Checkpoint::synthetic(&SyntheticSpec::parse("tiny")?)?;
//! let options = SessionOptions { backend: BackendChoice::Cpu, capacity: 16, ..Default::default() };
//! let mut session = DecodeSession::new(&model, &options, &mut |_, _| {})?;
//! let mut tokens = Vec::new();
//! // Three inputs, then four tokens that the model chooses.
//! session.decode(&[1, 2, 3], 4, &mut |chosen| {
//!     tokens.push(chosen.token);
//!     ControlFlow::Continue(())
//! })?;
//! assert_eq!(tokens.len(), 2 + 4, "every step chooses, those of the prompt too");
//! # Ok::<(), decode_graph::error::Error>(())
//! ```

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
