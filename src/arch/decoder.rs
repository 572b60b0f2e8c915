//! Records the layers of every architecture: a gated decoder with grouped attention.
//!
//! ```text
//! residual = scale · embed(token)
//! each layer:  residual += post(o · attention(rope(head_norm(q · norm(residual))), caches))
//!              residual += post(down · (act(gate · norm(residual)) ∘ (up · norm(residual))))
//! next = argmax(cap(head · norm(residual)))
//! ```
//!
//! `scale`, `head_norm`, `post` and `cap` are there where the architecture has them.

use super::weights::{self, CheckedMatrix, CheckedVector, Projection, ValidatedModelWeights};
use super::{Experts, FeedForward, ModelConfig, PlanOptions, RopeConfig, ValidatedLayerWeights};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::ops::{
    Add, Argmax, Attention, Buf, Describe, Embed, ExpertMatVec, ExpertSum, Glu, KvAppend, MatVec,
    Matrix, Op, RmsNorm, Rope, Softcap, TopK, Vector, WeightId,
};
use crate::plan::{CacheSpec, DecodePlan, PlanBuilder};
use crate::quant::RowOrder;

/// The plan under construction, and what every layer shares.
struct Recorder<'a> {
    config: &'a ModelConfig,
    plan: PlanBuilder,
    residual: Buf,
    /// Frequencies and how they are used.
    rotation: (Vector, RopeConfig),
    /// Those of local layers.
    local_rotation: Option<(Vector, RopeConfig)>,
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
    let divisors = divisors(checkpoint, config, &model, options.capacity)?;
    let mut rotation =
        |name, rope: RopeConfig| (plan.computed(name, rope.frequencies(&divisors)), rope);
    let local_rope = config.local.as_ref().map(|l| l.rope).filter(|rope| *rope != config.rope);
    let local_rotation = local_rope.map(|rope| rotation("rope_freqs_local", rope));
    let rotation = rotation("rope_freqs", config.rope);
    let mut r = Recorder { config, plan, residual, rotation, local_rotation };

    let table = r.matrix(model.embedding());
    r.plan.record("embed", Op::Embed(Embed { table, out: residual, scale: config.embed_scale }));
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

/// The divisors of the rotary frequencies, `[rotary / 2]`, for a context of `capacity` positions.
fn divisors(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    model: &ValidatedModelWeights,
    capacity: u32,
) -> Result<Vec<f32>> {
    let rope = &config.rope;
    let given = model.rope_divisors();
    // Once for the plan, not by position: keys that are in the cache stay rotated as they are.
    let by_length = given.by_length.as_ref();
    let by_length =
        by_length.map(|[short, long]| if capacity > rope.original { long } else { short });
    let Some(chosen) = given.any.as_ref().or(by_length) else {
        return Ok(vec![1.0; rope.rotary as usize / 2]);
    };
    let divisors = weights::read_vector(checkpoint, chosen.name())?;
    if let Some(bad) = divisors.iter().find(|f| !(f.is_finite() && **f > 0.0)) {
        let why = format!("holds {bad}, expected finite divisors above 0");
        let defect = crate::error::Defect::BadValue;
        return Err(Error::invalid(checkpoint.path(), chosen.name(), None, defect, why));
    }
    Ok(divisors)
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
        self.plan.matrix(m.name(), m.first_row(), shape)
    }

    fn vector(&mut self, v: &CheckedVector) -> Vector {
        self.plan.vector(v.name(), v.first(), v.len())
    }

    fn norm(&mut self, what: &str, x: Buf, gain: &CheckedVector) -> Buf {
        let out = self.plan.buffer("hidden", gain.len());
        self.norm_rows(what, x, out, gain, 1)
    }

    fn norm_rows(&mut self, what: &str, x: Buf, out: Buf, gain: &CheckedVector, rows: u32) -> Buf {
        let (gain, eps) = (self.vector(gain), self.config.eps);
        self.plan.record(what, Op::RmsNorm(RmsNorm { x, gain, out, rows, eps }));
        out
    }

    fn project(&mut self, what: &str, buffer: &str, p: &Projection, x: Buf) -> Buf {
        let out = self.plan.buffer(buffer, p.weight.rows());
        let weight = self.matrix(&p.weight);
        let bias = p.bias.as_ref().map(|b| self.vector(b));
        self.plan.record(what, Op::MatVec(MatVec { x, weight, bias, out }));
        out
    }

    fn rope(&mut self, what: &str, x: Buf, heads: u32, (freqs, rope): (Vector, RopeConfig)) {
        let (head_dim, pairing, magnitude) = (self.config.head_dim, rope.pairing, rope.magnitude);
        let op = Rope { x, heads, head_dim, freqs, pairing, magnitude };
        self.plan.record(what, Op::Rope(op));
    }

    /// Adds `x`, normalised where the architecture does so, to the residual stream.
    fn join(&mut self, block: &str, x: Buf, post_norm: Option<&CheckedVector>) {
        let x = match post_norm {
            Some(gain) => self.norm(&format!("{block}.post_norm"), x, gain),
            None => x,
        };
        let op = Add { out: self.residual, x, len: self.config.hidden };
        self.plan.record(&format!("{block}.add"), Op::Add(op));
    }

    fn attention(&mut self, layer: u32, w: &ValidatedLayerWeights) {
        let c = self.config;
        let cache = self.plan.cache().layer(layer);
        let local = c.local(layer);
        let x = self.norm("attn.norm", self.residual, w.attn_norm());
        let [q, k, v] = w.qkv();
        let mut q = self.project("attn.q", "q", q, x);
        let mut k = self.project("attn.k", "k", k, x);
        let v = self.project("attn.v", "v", v, x);
        if let Some([q_gain, k_gain]) = w.head_norms() {
            let out = self.plan.buffer("q_norm", c.q_rows());
            q = self.norm_rows("attn.q_norm", q, out, q_gain, c.heads);
            let out = self.plan.buffer("k_norm", c.kv_rows());
            k = self.norm_rows("attn.k_norm", k, out, k_gain, c.kv_heads);
        }
        let rotation = local.and(self.local_rotation).unwrap_or(self.rotation);
        self.rope("attn.rope_q", q, c.heads, rotation);
        self.rope("attn.rope_k", k, c.kv_heads, rotation);
        self.plan.record("attn.kv_append", Op::KvAppend(KvAppend { k, v, cache }));
        let out = self.plan.buffer("attn_out", c.q_rows());
        let partial = self.plan.buffer("attn_partial", Attention::partial_len(c.heads, &cache));
        let (scale, softcap) = (c.attention_scale, c.attention_softcap);
        let window = local.map(|l| l.window);
        let op = Attention { q, cache, out, partial, heads: c.heads, scale, softcap, window };
        self.plan.record("attn.attention", Op::Attention(op));
        let o = self.project("attn.o", "hidden", w.output(), out);
        self.join("attn", o, w.post_attn_norm());
    }

    fn feed_forward(&mut self, w: &ValidatedLayerWeights) {
        let x = self.norm("ffn.norm", self.residual, w.ffn_norm());
        match w.feed_forward() {
            FeedForward::Experts { size, router, gate, up, down } => {
                self.experts(*size, x, router, [gate, up, down]);
            }
            FeedForward::Dense { gate, up, down } => {
                let gate = self.project("ffn.gate", "ffn_gate", gate, x);
                let up = self.project("ffn.up", "ffn_up", up, x);
                let out = self.glu(gate, up, self.config.ffn);
                let down = self.project("ffn.down", "hidden", down, out);
                self.join("ffn", down, w.post_ffn_norm());
            }
        }
    }

    fn glu(&mut self, gate: Buf, up: Buf, len: u32) -> Buf {
        let out = self.plan.buffer("ffn_act", len);
        let activation = self.config.architecture.family().activation;
        let op = Glu { gate, up, out, len, activation };
        self.plan.record(&format!("ffn.{}", op.name()), Op::Glu(op));
        out
    }

    fn experts(&mut self, e: Experts, x: Buf, router: &Projection, matrices: [&CheckedMatrix; 3]) {
        let (used, experts, hidden) = (e.used, e.count, self.config.hidden);
        let logits = self.project("ffn.router", "router", router, x);
        let route = self.plan.buffer("route", 2 * used);
        self.plan.record("ffn.top_k", Op::TopK(TopK { logits, route, experts, used }));
        let product = |r: &mut Self, what: &str, x, own_input, m: &CheckedMatrix, rows| {
            let out = r.plan.buffer(&format!("ffn_{what}"), used * rows);
            let weight = r.matrix(m);
            let op = ExpertMatVec { x, own_input, route, weight, experts, used, out };
            r.plan.record(&format!("ffn.{what}"), Op::ExpertMatVec(op));
            out
        };
        let [gate, up, down] = matrices;
        let gate = product(self, "gate", x, false, gate, e.ffn);
        let up = product(self, "up", x, false, up, e.ffn);
        let act = self.glu(gate, up, used * e.ffn);
        let x = product(self, "down", act, true, down, hidden);
        let op = ExpertSum { out: self.residual, x, route, used, len: hidden };
        self.plan.record("ffn.sum", Op::ExpertSum(op));
    }

    fn head(&mut self, model: &ValidatedModelWeights) {
        let vocab = self.config.vocab;
        let x = self.norm("final.norm", self.residual, model.final_norm());
        let logits = self.project("lm_head", "logits", model.head(), x);
        self.plan.set_logits(logits);
        if let Some(cap) = self.config.logit_softcap {
            self.plan.record("softcap", Op::Softcap(Softcap { x: logits, len: vocab, cap }));
        }
        let candidates = self.plan.buffer("candidates", Argmax::CANDIDATES_LEN);
        self.plan.record("argmax", Op::Argmax(Argmax { logits, vocab, candidates }));
    }
}
