//! Records a plan: the one way in which an architecture describes a token.

use super::{BufferSpec, CacheSpec, DecodePlan, Step, WeightSpec};
use crate::ops::{Buf, Matrix, Op, Vector, WeightId};
use std::collections::HashMap;

/// Collects steps, buffers and weights in the order in which they are recorded.
#[derive(Debug)]
pub struct PlanBuilder {
    plan: DecodePlan,
    layer: Option<u32>,
    /// Weights by what they are, so that a tied embedding stands in the table once.
    known: HashMap<String, WeightId>,
}

impl PlanBuilder {
    /// An empty plan for a model with this cache and vocabulary.
    pub fn new(model: impl Into<String>, cache: CacheSpec, vocab: u32) -> Self {
        let plan = DecodePlan {
            model: model.into(),
            steps: Vec::new(),
            buffers: Vec::new(),
            weights: Vec::new(),
            cache,
            vocab,
            logits: Buf(0),
        };
        Self { plan, layer: None, known: HashMap::new() }
    }

    /// Steps recorded from here on belong to `layer`.
    pub fn enter_layer(&mut self, layer: u32) {
        self.layer = Some(layer);
    }

    /// Steps recorded from here on belong to no layer.
    pub fn leave_layers(&mut self) {
        self.layer = None;
    }

    /// The caches.
    pub fn cache(&self) -> CacheSpec {
        self.plan.cache
    }

    /// A new buffer of `elements` f32.
    pub fn buffer(&mut self, name: &str, elements: u32) -> Buf {
        self.plan.buffers.push(BufferSpec { name: name.to_owned(), elements });
        Buf(self.plan.buffers.len() as u32 - 1)
    }

    /// The buffer in which the logits stand after a step.
    pub fn set_logits(&mut self, logits: Buf) {
        self.plan.logits = logits;
    }

    fn weight(&mut self, key: String, spec: WeightSpec) -> WeightId {
        let weights = &mut self.plan.weights;
        *self.known.entry(key).or_insert_with(|| {
            weights.push(spec);
            WeightId(weights.len() as u32 - 1)
        })
    }

    /// A matrix of the checkpoint: a tensor from row `first_row` on. Naming the same rows twice
    /// gives the same weight.
    pub fn matrix(&mut self, name: &str, first_row: u32, m: Matrix) -> Matrix {
        let Matrix { format, rows, columns, order, .. } = m;
        let key = format!("{name} {first_row}+{rows} {order:?}");
        let name = name.to_owned();
        let spec = WeightSpec::Matrix { name, first_row, format, rows, columns, order };
        Matrix { id: self.weight(key, spec), ..m }
    }

    /// A vector of the checkpoint, as f32: a tensor from element `first` on.
    pub fn vector(&mut self, name: &str, first: u32, len: u32) -> Vector {
        let spec = WeightSpec::Vector { name: name.to_owned(), first, len };
        Vector { id: self.weight(format!("{name} {first}+{len}"), spec), len }
    }

    /// A vector that the architecture computed.
    pub fn computed(&mut self, name: &str, values: Vec<f32>) -> Vector {
        let len = values.len() as u32;
        let spec = WeightSpec::Computed { name: name.to_owned(), values };
        Vector { id: self.weight(format!("computed {name}"), spec), len }
    }

    /// Records a step; its label is `L<layer>.<what>` inside a layer, `what` outside.
    pub fn record(&mut self, what: &str, op: Op) {
        let label = match self.layer {
            Some(l) => format!("L{l:02}.{what}"),
            None => what.to_owned(),
        };
        self.plan.steps.push(Step { label, layer: self.layer, op });
    }

    /// The plan.
    pub fn finish(self) -> DecodePlan {
        self.plan
    }
}
