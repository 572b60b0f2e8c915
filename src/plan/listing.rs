//! The plan as text and as DOT: what is checked in under `graphs/` and read in reviews.

use super::DecodePlan;
use crate::ops::Gpu;
use std::fmt::Write;

impl DecodePlan {
    /// One row a step: label, kernel, geometry, shape, bytes at position 0; then the workspace and
    /// the totals.
    pub fn listing(&self, gpu: &Gpu) -> String {
        let mut s = format!(
            "# {}: {} steps, vocab {}, cache {} layers x {} heads x {} x {} {}\n",
            self.model,
            self.steps.len(),
            self.vocab,
            self.cache.layers,
            self.cache.kv_heads,
            self.cache.capacity,
            self.cache.head_dim,
            self.cache.kind.name()
        );
        let _ = writeln!(s, "# label | kernel | grid x block, shared | shape | bytes a token");
        for step in &self.steps {
            let op = step.op.describe();
            let l = op.launch(gpu);
            let _ = writeln!(
                s,
                "{:<14} {:<20} {:>5} x {:<4} {:>6}  {:<44} {:>11}{}",
                step.label,
                l.kernel,
                l.grid,
                l.block,
                l.shared_bytes,
                op.shape(),
                op.traffic(0).dram(),
                if l.programmatic { "" } else { "  (full edge)" }
            );
        }
        let layout = self.workspace();
        let _ = writeln!(s, "# workspace {} bytes: buffer, offset, bytes, steps", layout.bytes());
        for (b, p) in self.buffers.iter().zip(layout.placements()).filter(|(_, p)| p.bytes > 0) {
            // Later layers reuse what the first one shows.
            if p.first > 20 && p.last != usize::MAX {
                continue;
            }
            let last = if p.last == usize::MAX { "end".to_owned() } else { p.last.to_string() };
            let _ =
                writeln!(s, "{:<14} {:>9} {:>9}  {}..{last}", b.name, p.offset, p.bytes, p.first);
        }
        let t = self.traffic(0);
        let layers = self.cache.layers.max(1) as usize;
        let inner = self.steps.iter().filter(|s| s.layer.is_some()).count();
        let _ = writeln!(
            s,
            "# total: {} nodes, {} a layer, {} weight bytes a token, {} cache bytes a position",
            self.steps.len(),
            inner / layers,
            t.weights,
            self.traffic(1).kv - t.kv
        );
        s
    }

    /// The plan as a DOT digraph: a node a step, an edge a launch dependency.
    pub fn dot(&self, gpu: &Gpu) -> String {
        let mut s = String::from("digraph plan {\n  node [shape=box, fontname=monospace];\n");
        for (i, step) in self.steps.iter().enumerate() {
            let op = step.op.describe();
            let l = op.launch(gpu);
            let _ = writeln!(
                s,
                "  n{i} [label=\"{}\\n{} <<<{}, {}>>>\\n{}\"];",
                step.label,
                l.kernel,
                l.grid,
                l.block,
                op.shape()
            );
            if i > 0 {
                let style = if l.programmatic { "dashed" } else { "solid" };
                let _ = writeln!(s, "  n{} -> n{i} [style={style}];", i - 1);
            }
        }
        s.push_str("}\n");
        s
    }
}
