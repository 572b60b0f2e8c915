//! Qwen3: every query and key head is normalised before it rotates; heads of 128 whatever
//! `hidden / heads` is.

use super::family::{Family, PLAIN};

pub(super) const FAMILY: Family = Family { name: "qwen3", head_norms: true, ..PLAIN };
