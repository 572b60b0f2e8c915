//! `out[j, r] = act(gate[j, r]) · up[j, r]`, both products of the chosen experts' matrices: a fusion

use super::{
    Activation, Arg, Buf, Describe, ExpertMatVec, Glu, Gpu, HostMemory, Launch, Traffic, WeightId,
};

/// Gate and up projections of the chosen experts, and the activation.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertGateUp {
    /// Gate projection, of one input for all experts.
    pub gate: ExpertMatVec,
    /// Up projection, of the gate's format, shape, input and experts.
    pub up: ExpertMatVec,
    /// Activation.
    pub act: Glu,
}

impl ExpertGateUp {
    pub(super) fn parts(&self) -> [&dyn Describe; 3] {
        [&self.gate, &self.up, &self.act]
    }
}

impl Describe for ExpertGateUp {
    fn name(&self) -> &'static str {
        "expert_gate_up"
    }

    fn shape(&self) -> String {
        let (w, rows) = (&self.gate.weight, self.gate.rows());
        let (used, experts) = (self.gate.used, self.gate.experts);
        format!("[{}] → {used} of {experts}×2×[{rows}] {}", w.columns, w.format)
    }

    fn reads(&self) -> Vec<Buf> {
        self.gate.reads()
    }

    fn writes(&self) -> Vec<Buf> {
        vec![self.act.out]
    }

    fn weights(&self) -> Vec<WeightId> {
        vec![self.gate.weight.id, self.up.weight.id]
    }

    fn traffic(&self, position: u32) -> Traffic {
        let (gate, up) = (self.gate.traffic(position), self.up.traffic(position));
        let io = self.gate.weight.columns + self.gate.used * self.gate.rows();
        Traffic { weights: gate.weights + up.weights, kv: 0, activations: 4 * u64::from(io) }
    }

    fn launch(&self, gpu: &Gpu) -> Launch {
        let gate = &self.gate;
        let each = gate.each(gpu);
        let args = vec![
            Arg::Step,
            Arg::Buf(gate.x),
            Arg::Buf(gate.route),
            Arg::Weight(gate.weight.id),
            Arg::Weight(self.up.weight.id),
            Arg::Buf(self.act.out),
            Arg::U32(gate.rows()),
            Arg::U32(gate.weight.columns),
            Arg::U32(each),
            Arg::U32(u32::from(self.act.activation == Activation::GeluTanh)),
        ];
        gate.launch_of("expert_gate_up", each, args)
    }

    fn reference(&self, mem: &mut HostMemory) {
        self.parts().iter().for_each(|op| op.reference(mem));
    }
}
