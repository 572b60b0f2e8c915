//! Qwen2 and Qwen2.5: biases on query, key and value.

use super::family::{Family, PLAIN};

pub(super) static FAMILY: Family = Family { name: "qwen2", qkv_bias: true, ..PLAIN };
