//! Llama 2 and 3, and what is stored as `llama`: Mistral and Mistral-Nemo, TinyLlama, SmolLM.
//!
//! The converter has permuted the rows of query and key, so neighbours rotate. Heads may have
//! another size than `hidden / heads` (`attention.key_length`, as in Nemo), and experts may stand
//! in the place of the feed-forward blocks (Mixtral).

use super::family::{Family, Has, PLAIN};
use crate::ops::Pairing;

pub(super) static FAMILY: Family =
    Family { name: "llama", pairing: Pairing::Adjacent, experts: Has::Sometimes, ..PLAIN };
