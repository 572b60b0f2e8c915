//! Phi-3, Phi-3.5 and Phi-4 (`phi3`): fused projections, a part of each head rotates, and divisors
//! of the frequencies that depend on the length of the context (LongRoPE, Ding et al., 2024).
//!
//! All layers see `attention.sliding_window` positions, as the models' own code has it. (Other
//! engines ignore the window; below its length there is no difference.)

use super::ModelConfig;
use super::family::{Family, PLAIN};
use super::keys::Keys;
use crate::error::Result;

pub(super) static FAMILY: Family =
    Family { name: "phi3", fused: true, windows: true, adapt, ..PLAIN };

fn adapt(keys: &Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    c.read_local(keys, None, 0, c.rope)
}
