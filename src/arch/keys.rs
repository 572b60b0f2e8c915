//! The metadata keys of one architecture, read with limits and refused by name.

use crate::checkpoint::Metadata;
use crate::error::{Defect, Error, Result};
use std::path::Path;

/// The keys that begin with an architecture's name.
pub(super) struct Keys<'a> {
    pub(super) path: &'a Path,
    pub(super) metadata: &'a Metadata,
    pub(super) prefix: &'static str,
}

impl Keys<'_> {
    pub(super) fn key(&self, rest: &str) -> String {
        format!("{}.{rest}", self.prefix)
    }

    pub(super) fn bad(&self, key: &str, why: String) -> Error {
        self.metadata.error(key, Defect::BadValue, why)
    }

    pub(super) fn unsupported(&self, key: &str, what: impl Into<String>, instead: &str) -> Error {
        Error::Unsupported {
            path: self.path.to_owned(),
            at: key.to_owned(),
            what: what.into(),
            instead: instead.to_owned(),
        }
    }

    /// `value` as u32, within `1..=max`.
    pub(super) fn within(&self, key: &str, value: u64, max: u64) -> Result<u32> {
        u32::try_from(value)
            .ok()
            .filter(|v| (1..=max).contains(&u64::from(*v)))
            .ok_or_else(|| self.bad(key, format!("is {value}, expected 1 to {max}")))
    }

    pub(super) fn count(&self, rest: &str, max: u64) -> Result<u32> {
        let key = self.key(rest);
        self.within(&key, self.metadata.required_u64(&key)?, max)
    }

    /// A count that need not be there; zero is how writers say that there is none.
    pub(super) fn optional_count(&self, rest: &str, max: u64) -> Result<Option<u32>> {
        let key = self.key(rest);
        let value = self.metadata.u64_key(&key)?.filter(|n| *n > 0);
        value.map(|n| self.within(&key, n, max)).transpose()
    }

    /// A count that may be given per layer; it must be the same for all of them.
    pub(super) fn uniform(&self, rest: &str, layers: u32, max: u64) -> Result<Option<u32>> {
        let key = self.key(rest);
        let Some(all) = self.metadata.u64_per_layer_key(&key, layers as usize)? else {
            return Ok(None);
        };
        let first = all.first().copied().unwrap_or(0);
        // Each is checked, so that a zero in the middle is a bad value and not a mixture.
        for value in &all {
            self.within(&key, *value, max)?;
        }
        if all.iter().any(|v| *v != first) {
            let what = "a count that differs from layer to layer";
            return Err(self.unsupported(&key, what, "use a model with equal layers"));
        }
        self.within(&key, first, max).map(Some)
    }

    pub(super) fn required_uniform(&self, rest: &str, layers: u32, max: u64) -> Result<u32> {
        let value = self.uniform(rest, layers, max)?;
        value.ok_or_else(|| self.metadata.missing(&self.key(rest)))
    }

    /// A finite number above zero, and not so small that it has fewer digits than others.
    pub(super) fn positive(&self, rest: &str) -> Result<Option<f32>> {
        let key = self.key(rest);
        match self.metadata.f32_key(&key)? {
            Some(v) if !(v.is_normal() && v > 0.0) => {
                let least = f32::MIN_POSITIVE;
                Err(self.bad(&key, format!("is {v:e}, expected a finite number from {least:e} on")))
            }
            value => Ok(value),
        }
    }

    /// A finite number above zero, or zero where writers say so that there is none; `default`
    /// where the key is absent.
    pub(super) fn positive_or_off(&self, rest: &str, default: Option<f32>) -> Result<Option<f32>> {
        match self.metadata.f32_key(&self.key(rest))? {
            None => Ok(default),
            Some(0.0) => Ok(None),
            Some(_) => self.positive(rest),
        }
    }

    /// Refuses a number that would change the answer and is not computed.
    pub(super) fn must_be_off(&self, rest: &str) -> Result<()> {
        let key = self.key(rest);
        match self.metadata.f32_key(&key)? {
            Some(v) if v != 0.0 => {
                Err(self.unsupported(&key, format!("the value {v}"), "use a model without it"))
            }
            _ => Ok(()),
        }
    }
}
