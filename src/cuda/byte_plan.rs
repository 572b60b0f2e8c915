//! What a plan needs of device memory, known before anything is allocated.

use super::bind::FORCED;
use super::upload::{ALIGNMENT, WeightMap};
use crate::engine::MemoryUse;
use crate::error::{Error, Result};
use crate::plan::{DecodePlan, WorkspaceLayout};

/// Device memory left for code, the graph and the driver, bytes.
const RESERVE: u64 = 64 << 20;

/// Device memory that a plan needs, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BytePlan {
    /// Weights in tiles.
    pub weights: u64,
    /// Keys and values of all layers.
    pub caches: u64,
    /// Workspace.
    pub workspace: u64,
    /// Step state, counters and forced tokens.
    pub state: u64,
    /// Instructions and mail of the persistent kernel.
    pub program: u64,
}

impl BytePlan {
    /// What `plan` needs, its weights placed by `map` and its buffers by `layout`, and `program`
    /// bytes beside it.
    pub fn of(plan: &DecodePlan, map: &WeightMap, layout: &WorkspaceLayout, program: u64) -> Self {
        Self {
            weights: map.bytes,
            caches: plan.cache.bytes() + 2 * u64::from(plan.cache.layers) * ALIGNMENT,
            workspace: layout.bytes() as u64,
            state: FORCED + 4 * u64::from(plan.cache.capacity),
            program,
        }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.caches + self.workspace + self.state + self.program
    }

    /// Beside what was `taken`, bytes.
    pub fn with_taken(&self, taken: u64) -> MemoryUse {
        let Self { weights, caches: kv, workspace, state, program } = *self;
        MemoryUse { weights, kv, workspace, other: state + program, taken }
    }

    /// Compares with what is free.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] with each part.
    pub fn check(&self, free: u64) -> Result<()> {
        let need = self.total() + RESERVE;
        if need <= free {
            return Ok(());
        }
        let Self { weights, caches, workspace, state, program } = self;
        let what = format!(
            "the model (weights {weights}, KV cache {caches}, workspace {workspace}, state {state}, \
             program {program}, code {RESERVE})"
        );
        let advice = if *caches > *weights / 4 {
            "use a shorter context, an f16 KV cache or a smaller model, or free GPU memory"
        } else {
            "use a smaller model or quantisation, or free GPU memory"
        };
        Err(Error::OutOfMemory { what, need, free, advice: advice.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_with_its_parts_before_anything_is_allocated() {
        let bytes = BytePlan { weights: 4000, caches: 500, workspace: 60, state: 7, program: 30 };
        assert!(bytes.check(4597 + RESERVE).is_ok());
        let error = bytes.check(4596 + RESERVE).unwrap_err();
        assert_eq!(error.exit_code(), 6);
        let text = error.to_string();
        for part in ["weights 4000", "KV cache 500", "workspace 60", "state 7", "program 30"] {
            assert!(text.contains(part), "{text}");
        }
    }
}
