//! Gemma 2: scaled embeddings, norms before and after each block, GELU, soft caps on scores and
//! logits, and every other layer, the first one included, local.

use super::config::per_root;
use super::family::{Family, PLAIN};
use super::keys::Keys;
use super::{ModelConfig, RopeConfig};
use crate::error::Result;
use crate::ops::Activation;

pub(super) static FAMILY: Family = Family {
    name: "gemma2",
    post_norms: true,
    activation: Activation::GeluTanh,
    softcaps: true,
    windows: true,
    adapt,
    ..PLAIN
};

fn adapt(keys: &Keys<'_>, c: &mut ModelConfig) -> Result<()> {
    c.embed_scale = (c.hidden as f32).sqrt();
    // The 27B model, told by its layers, divides by another size than that of its heads.
    if c.layers == 46 {
        c.attention_scale = per_root(c.hidden / c.heads);
    }
    c.attention_softcap = keys.positive_or_off("attn_logit_softcapping", Some(50.0))?;
    c.logit_softcap = keys.positive_or_off("final_logit_softcapping", Some(30.0))?;
    let base = keys.positive("rope.freq_base_swa")?.unwrap_or(c.rope.base);
    let rope = RopeConfig { base, ..c.rope };
    c.read_local(keys, Some(4096), 2, rope)
}
