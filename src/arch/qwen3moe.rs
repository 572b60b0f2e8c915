//! Qwen3 with experts in the place of every feed-forward block (`qwen3moe`, as Qwen3-30B-A3B).

use super::family::{Family, Has};
use super::qwen3;

pub(super) static FAMILY: Family =
    Family { name: "qwen3moe", experts: Has::Always, ..qwen3::FAMILY };
