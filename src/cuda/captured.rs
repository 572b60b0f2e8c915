//! What the driver holds of a capture, node by node, beside the plan that it was held against.

use super::bind::BoundPlan;
use super::driver::Edge;
use super::graph::{CapturedGraph, Census, Expected, chain, compare, expected};
use crate::error::Result;
use std::fmt::{Display, Formatter};

/// A node of the captured graph, as the driver tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapturedNode {
    /// Label of the step that it is.
    pub label: String,
    /// The kernel; `None` where the driver does not tell.
    pub kernel: Option<String>,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Dynamic shared memory of a block, bytes.
    pub shared_bytes: u32,
    /// Whether the edge to it is programmatic; `None` for the first node, and where the driver does
    /// not tell.
    pub programmatic: Option<bool>,
}

/// A capture that was found to be its plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Captured {
    /// The chain, first to last.
    pub nodes: Vec<CapturedNode>,
    /// How many nodes, edges and names were compared.
    pub census: Census,
}

impl Captured {
    /// Asks the driver for every node and edge of `graph`, and holds them against `plan`.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`](crate::error::Error::Verification) with the first step that is not
    /// as planned; [`Error::Driver`](crate::error::Error::Driver).
    pub(super) fn of(graph: &CapturedGraph, plan: &BoundPlan) -> Result<Self> {
        let (nodes, edges) = graph.holds()?;
        let expected = expected(plan);
        let census = compare(&nodes, &edges, &expected)?;
        let node = |(e, (i, edge)): (&Expected, (usize, Option<Edge>))| {
            let kernel = nodes.get(i).and_then(|n| n.kernel.as_ref());
            CapturedNode {
                label: e.label.clone(),
                kernel: kernel.and_then(|k| k.name.clone()),
                grid: kernel.map_or([0; 3], |k| k.grid),
                block: kernel.map_or([0; 3], |k| k.block),
                shared_bytes: kernel.map_or(0, |k| k.shared_bytes),
                programmatic: edge.and_then(|e| e.programmatic),
            }
        };
        let nodes = expected.iter().zip(chain(&nodes, &edges)?).map(node).collect();
        Ok(Self { nodes, census })
    }
}

/// A row a node, and what was compared.
impl Display for Captured {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "# label | kernel | grid x block, shared | edge from the node above")?;
        for (i, node) in self.nodes.iter().enumerate() {
            let CapturedNode { label, grid: [grid, ..], block: [block, ..], shared_bytes, .. } =
                node;
            let kernel = node.kernel.as_deref().unwrap_or("not told");
            let edge = match (i, node.programmatic) {
                (0, _) => "none",
                (_, Some(true)) => "programmatic",
                (_, Some(false)) => "full",
                (_, None) => "not told",
            };
            writeln!(
                f,
                "{label:<14} {kernel:<20} {grid:>5} x {block:<4} {shared_bytes:>6}  {edge}"
            )?;
        }
        let Census { nodes, edges, programmatic, named } = self.census;
        let programmatic = programmatic
            .map_or_else(|| "kinds not told".to_owned(), |n| format!("{n} programmatic"));
        writeln!(
            f,
            "# the plan, as the driver holds it: {nodes} nodes in order, {named} of them named, \
             {edges} edges, {programmatic}"
        )
    }
}
