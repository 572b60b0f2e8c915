//! Known failures, built in on demand: where each is, the kernels and the capture say.

use super::state::Node;
use std::collections::HashMap;
use std::time::Duration;

/// A known failure of such systems, to be found by the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Plant {
    /// A buffer is moved after the capture; the graph has its old address.
    StalePointer,
    /// The graph has the position of its first replay.
    FrozenPosition,
    /// A kernel is not captured.
    DroppedNode,
    /// A kernel goes to a stream that is not captured, and runs at once.
    OtherStream,
    /// Two kernels are captured in the wrong order.
    SwappedNodes,
    /// A replay leaves out the last layer.
    LastLayerSkipped,
    /// Keys and values are written to the next head.
    KvOneHeadOff,
    /// Keys and values are written one position late.
    KvOnePositionLate,
    /// Keys are written where the values belong, and the other way round.
    KeysForValues,
    /// Rotation pairs neighbours where it must pair halves, or the other way round.
    RopePairs,
    /// Rotation by the position before.
    RopePositionBefore,
    /// A block's scale is its neighbour's.
    SubBlockScale,
    /// Of equal logits the last one is chosen.
    ArgmaxTies,
    /// Rows of a partial tile are not written.
    LastTile,
    /// The feed-forward block takes the activations of the token before.
    ReusedActivations,
    /// A forced input is not taken.
    ForcedIgnored,
    /// Logits that are not finite are not reported.
    NonFiniteIgnored,
    /// The ring says that a step is the one before it.
    RingOneStepBehind,
    /// The last kernel chooses a token at the capacity as well.
    CapacityIgnored,
    /// A kernel writes one element behind its output.
    OutputOverrun,
    /// Keys and values are also written one row behind the cache.
    CacheOverrun,
    /// No failure: the host sees a token only [`Plant::LATE`] after it was chosen.
    LateToken,
    /// Attention covers the positions that there were at the graph's first replay.
    GridFromPosition,
}

impl Plant {
    /// Delay of [`Plant::LateToken`]: shorter than a wait after which the driver is asked.
    pub(crate) const LATE: Duration = Duration::from_millis(10);
}

/// What plants remember from one kernel to the next.
#[derive(Default)]
pub(super) struct Remembered {
    pub(super) position: Option<u32>,
    pub(super) strayed: bool,
    /// Input of a kernel at its last run, by address.
    pub(super) activations: HashMap<u64, Vec<u8>>,
}

/// Changes what a capture recorded.
pub(super) fn plant_in_capture(plant: Option<Plant>, nodes: &mut Vec<Node>) {
    match plant {
        Some(Plant::DroppedNode) if nodes.len() > 2 => drop(nodes.remove(nodes.len() / 2)),
        Some(Plant::SwappedNodes) if nodes.len() > 2 => nodes.swap(1, 2),
        _ => {}
    }
}
