//! Workspace: every intermediate vector of a plan in one allocation, reused by lifetime.

use super::DecodePlan;
use crate::ops::{HostMemory, HostWeight};

/// Alignment of a buffer, bytes.
const ALIGNMENT: usize = 256;

/// A buffer before it has a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BufferSpec {
    /// For listings: `hidden`, `q`, `ffn_act`, …
    pub name: String,
    /// f32 elements.
    pub elements: u32,
}

/// Where a buffer lies and how long it is needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Bytes from the start of the workspace.
    pub offset: usize,
    /// Bytes.
    pub bytes: usize,
    /// First step that touches it.
    pub first: usize,
    /// Last step that touches it.
    pub last: usize,
}

/// The workspace of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkspaceLayout {
    placements: Vec<Placement>,
    bytes: usize,
}

impl WorkspaceLayout {
    /// Lays the buffers of `plan` out: in order of first use, each at the lowest offset that no
    /// buffer alive at the same time covers.
    ///
    /// A step's outputs never share memory with its inputs, and a kernel writes only after its
    /// predecessor has completed, so a lifetime is the closed interval of steps that name it.
    pub fn of(plan: &DecodePlan) -> Self {
        Self::lay(plan, None)
    }

    /// Lays the buffers of `plan` out side by side, at least `zone` bytes before, between and behind
    /// them: for a kernel whose blocks are at different steps at one time, so that a buffer's last
    /// write may come after another's first; and for a run that looks for accesses outside them.
    pub fn apart(plan: &DecodePlan, zone: usize) -> Self {
        Self::lay(plan, Some(zone))
    }

    fn lay(plan: &DecodePlan, apart: Option<usize>) -> Self {
        let zone = apart.unwrap_or(0);
        let mut life = vec![None::<(usize, usize)>; plan.buffers.len()];
        for (i, step) in plan.steps.iter().enumerate() {
            for b in step.op.buffers() {
                let l = life[b.0 as usize].get_or_insert((i, i));
                l.1 = i;
            }
        }
        // The logits are read after the last step, whatever follows.
        if let Some(l) = &mut life[plan.logits.0 as usize] {
            l.1 = usize::MAX;
        }
        let mut order: Vec<usize> = (0..plan.buffers.len()).collect();
        order.sort_by_key(|&b| life[b].map_or(usize::MAX, |l| l.0));
        let mut placements =
            vec![Placement { offset: 0, bytes: 0, first: 0, last: 0 }; plan.buffers.len()];
        let mut placed: Vec<usize> = Vec::new();
        let mut total = 0;
        for b in order {
            // A buffer that no step names takes no room.
            let Some((first, last)) = life[b] else { continue };
            let bytes = plan.buffers[b].elements as usize * 4;
            let mut taken: Vec<(usize, usize)> = placed
                .iter()
                .map(|&o| &placements[o])
                .filter(|o| apart.is_some() || o.first <= last && first <= o.last)
                .map(|o| (o.offset, (o.offset + o.bytes + zone).next_multiple_of(ALIGNMENT)))
                .collect();
            taken.sort_unstable();
            let mut offset = zone.next_multiple_of(ALIGNMENT);
            for (from, to) in taken {
                if offset + bytes + zone <= from {
                    break;
                }
                offset = offset.max(to);
            }
            placements[b] = Placement { offset, bytes, first, last };
            placed.push(b);
            total = total.max((offset + bytes + zone).next_multiple_of(ALIGNMENT));
        }
        Self { placements, bytes: total }
    }

    /// Placement of each buffer, in the order of the plan's table.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// Bytes of the workspace.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The host twin of this workspace, with `weights` in the order of the plan's table and one pair
    /// of caches of `cache_len` elements per layer.
    pub fn host_memory(
        &self,
        weights: Vec<HostWeight>,
        layers: usize,
        cache_len: usize,
    ) -> HostMemory {
        let words = |p: &Placement| p.offset / 4..(p.offset + p.bytes) / 4;
        let ranges = self.placements.iter().map(words).collect();
        HostMemory::new(self.bytes / 4, ranges, weights, layers, cache_len)
    }
}
