//! Records Llama's decoder and its kin: pre-norm, grouped attention, gated feed-forward.
//!
//! ```text
//! residual = embed(token)
//! each layer:  residual += o · attention(rope(q · norm(residual)), caches)
//!              residual += down · (silu(gate · norm(residual)) ∘ (up · norm(residual)))
//! next = argmax(head · norm(residual))
//! ```

use super::weights::{self, CheckedMatrix, CheckedVector, Projection, ValidatedModelWeights};
use super::{LayerRole, ModelConfig, PlanOptions, ValidatedLayerWeights};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::ops::{
    Add, Argmax, Attention, Buf, Embed, KvAppend, MatVec, Matrix, Op, RmsNorm, Rope, SwiGlu,
    Vector, WeightId,
};
use crate::plan::{CacheSpec, DecodePlan, PlanBuilder};
use crate::quant::RowOrder;

/// The plan under construction, and what every layer shares.
struct Recorder<'a> {
    config: &'a ModelConfig,
    plan: PlanBuilder,
    residual: Buf,
    freqs: Vector,
}

/// Records the plain plan of `checkpoint`.
///
/// # Errors
///
/// Those of the validation of its weights, and [`Error::Usage`] for an impossible capacity.
pub(super) fn record(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: PlanOptions,
) -> Result<DecodePlan> {
    let model = ValidatedModelWeights::validate(checkpoint, config)?;
    let cache = cache(config, options)?;
    let mut plan = PlanBuilder::new(config.name.as_str(), cache, config.vocab);
    let residual = plan.buffer("residual", config.hidden);
    let freqs = plan.computed("rope_freqs", frequencies(checkpoint, config, &model)?);
    let mut r = Recorder { config, plan, residual, freqs };

    let table = r.matrix(model.embedding());
    r.plan.record("embed", Op::Embed(Embed { table, out: residual, scale: 1.0 }));
    for layer in 0..config.layers {
        let weights = ValidatedLayerWeights::validate(checkpoint, config, layer)?;
        r.plan.enter_layer(layer);
        r.attention(layer, &weights);
        r.feed_forward(&weights);
    }
    r.plan.leave_layers();
    r.head(&model);
    Ok(r.plan.finish())
}

/// The caches, whose size fits 32-bit element indices per layer.
fn cache(config: &ModelConfig, options: PlanOptions) -> Result<CacheSpec> {
    let spec = CacheSpec {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        capacity: options.capacity,
        kind: options.kv,
    };
    // Kernels index one layer's cache with 32 bits; 512 layers of it fit 64.
    if options.capacity == 0 || spec.layer_elements() > u64::from(u32::MAX) {
        let most = u32::MAX / config.kv_rows();
        return Err(Error::Usage(format!(
            "a context of {} positions is not possible for this model: 1 to {most}",
            options.capacity
        )));
    }
    Ok(spec)
}

/// `base^(−2i/rotary) · scale / factor[i]`, `[rotary / 2]`, radians per position: in f64, rounded
/// once.
fn frequencies(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    model: &ValidatedModelWeights,
) -> Result<Vec<f32>> {
    let rope = &config.rope;
    let half = rope.rotary / 2;
    let factors = match model.rope_factors() {
        Some(v) => weights::read_vector(checkpoint, v.name())?,
        None => vec![1.0; half as usize],
    };
    if let Some(bad) = factors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        let why = format!("holds {bad}, expected finite divisors above 0");
        let defect = crate::error::Defect::BadValue;
        return Err(Error::invalid(checkpoint.path(), "rope_freqs.weight", None, defect, why));
    }
    let base = f64::from(rope.base);
    let one = |(i, factor): (u32, f32)| {
        let f = base.powf(-2.0 * f64::from(i) / f64::from(rope.rotary));
        (f * f64::from(rope.scale) / f64::from(factor)) as f32
    };
    Ok((0..half).zip(factors).map(one).collect())
}

impl Recorder<'_> {
    fn matrix(&mut self, m: &CheckedMatrix) -> Matrix {
        // The table assigns the index; the file's order is what every plain op expects.
        let shape = Matrix {
            id: WeightId(0),
            format: m.format(),
            rows: m.rows(),
            columns: m.columns(),
            order: RowOrder::Natural,
        };
        self.plan.matrix(m.name(), shape)
    }

    fn vector(&mut self, v: &CheckedVector) -> Vector {
        self.plan.vector(v.name(), v.len())
    }

    fn norm(&mut self, what: &str, gain: &CheckedVector) -> Buf {
        let (x, eps) = (self.residual, self.config.eps);
        let out = self.plan.buffer("hidden", self.config.hidden);
        let gain = self.vector(gain);
        self.plan.record(what, Op::RmsNorm(RmsNorm { x, gain, out, eps }));
        out
    }

    fn project(&mut self, what: &str, buffer: &str, p: &Projection, x: Buf) -> Buf {
        let out = self.plan.buffer(buffer, p.weight.rows());
        let weight = self.matrix(&p.weight);
        let bias = p.bias.as_ref().map(|b| self.vector(b));
        self.plan.record(what, Op::MatVec(MatVec { x, weight, bias, out }));
        out
    }

    fn rope(&mut self, what: &str, x: Buf, heads: u32) {
        let (head_dim, freqs) = (self.config.head_dim, self.freqs);
        let pairing = self.config.rope.pairing;
        let op = Rope { x, heads, head_dim, freqs, pairing, magnitude: 1.0 };
        self.plan.record(what, Op::Rope(op));
    }

    fn add(&mut self, what: &str, x: Buf) {
        let op = Add { out: self.residual, x, len: self.config.hidden };
        self.plan.record(what, Op::Add(op));
    }

    fn attention(&mut self, layer: u32, w: &ValidatedLayerWeights) {
        let c = self.config;
        let cache = self.plan.cache().layer(layer);
        let x = self.norm("attn.norm", w.attn_norm());
        let q = self.project("attn.q", "q", w.projection(LayerRole::Query), x);
        let k = self.project("attn.k", "k", w.projection(LayerRole::Key), x);
        let v = self.project("attn.v", "v", w.projection(LayerRole::Value), x);
        self.rope("attn.rope_q", q, c.heads);
        self.rope("attn.rope_k", k, c.kv_heads);
        self.plan.record("attn.kv_append", Op::KvAppend(KvAppend { k, v, cache }));
        let out = self.plan.buffer("attn_out", c.q_rows());
        let partial = self.plan.buffer("attn_partial", Attention::partial_len(c.heads, &cache));
        let scale = (1.0 / f64::from(c.head_dim).sqrt()) as f32;
        let op = Attention { q, cache, out, partial, heads: c.heads, scale };
        self.plan.record("attn.attention", Op::Attention(op));
        let o = self.project("attn.o", "hidden", w.projection(LayerRole::Output), out);
        self.add("attn.add", o);
    }

    fn feed_forward(&mut self, w: &ValidatedLayerWeights) {
        let len = self.config.ffn;
        let x = self.norm("ffn.norm", w.ffn_norm());
        let gate = self.project("ffn.gate", "ffn_gate", w.projection(LayerRole::Gate), x);
        let up = self.project("ffn.up", "ffn_up", w.projection(LayerRole::Up), x);
        let out = self.plan.buffer("ffn_act", len);
        self.plan.record("ffn.swiglu", Op::SwiGlu(SwiGlu { gate, up, out, len }));
        let down = self.project("ffn.down", "hidden", w.projection(LayerRole::Down), out);
        self.add("ffn.add", down);
    }

    fn head(&mut self, model: &ValidatedModelWeights) {
        let vocab = self.config.vocab;
        let x = self.norm("final.norm", model.final_norm());
        let logits = self.project("lm_head", "logits", model.head(), x);
        self.plan.set_logits(logits);
        let candidates = self.plan.buffer("candidates", Argmax::CANDIDATES_LEN);
        self.plan.record("argmax", Op::Argmax(Argmax { logits, vocab, candidates }));
    }
}
