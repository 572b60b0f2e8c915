//! Gemma 3: as Gemma 2 without the cap on scores, with norms of query and key heads, and with
//! five of six layers local; those rotate on a base of their own, without the stretch of the rest.

use super::ModelConfig;
use super::config::per_root;
use super::family::{Family, PLAIN};
use super::keys::Keys;
use crate::error::Result;
use crate::ops::Activation;

pub(super) static FAMILY: Family = Family {
    name: "gemma3",
    head_norms: true,
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
    if c.layers == 62 {
        c.attention_scale = per_root(c.hidden / c.heads);
    }
    keys.must_be_off("attn_logit_softcapping")?;
    c.logit_softcap = keys.positive_or_off("final_logit_softcapping", None)?;
    let base = keys.positive("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let rope = c.rope.unscaled(base);
    c.read_local(keys, None, 6, rope)
}
