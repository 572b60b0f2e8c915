//! Llama 2 and 3, and what is stored as `llama`: Mistral and Mistral-Nemo, TinyLlama, SmolLM.
//!
//! The converter has permuted the rows of query and key, so neighbours rotate. Heads may have
//! another size than `hidden / heads` (`attention.key_length`, as in Nemo), and experts may stand
//! in the place of the feed-forward blocks (Mixtral).
//!
//! All layers see `attention.sliding_window` positions where the key is there, as the code of the
//! first Mistral has it. (Other engines ignore it; below its length there is no difference.)

use super::ModelConfig;
use super::family::{Family, Has, PLAIN};
use super::keys::Keys;
use crate::error::Result;
use crate::ops::Pairing;

pub(super) static FAMILY: Family = Family {
    name: "llama",
    pairing: Pairing::Adjacent,
    experts: Has::Sometimes,
    windows: true,
    adapt,
    ..PLAIN
};

fn adapt(keys: &Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    c.read_local(keys, None, 0, c.rope)
}
