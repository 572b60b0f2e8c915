//! Everything that a run of tokens leaves behind, for comparison bit for bit.

use crate::environment::Environment;
use crate::interrupt;
use crate::progress::Progress;
use decode_graph::error::{Error, Result};
use decode_graph::session::DecodeSession;
use std::ops::ControlFlow;

/// Logits of positions, `[positions][vocab]`.
pub(crate) type Logits = Vec<Vec<f32>>;

/// What a run from position 0 on computed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Passage {
    /// The token chosen at each position.
    pub(crate) chosen: Vec<u32>,
    /// Of every position, or of the last one.
    pub(crate) logits: Logits,
    /// Keys of each layer, `[layers][kv_heads, capacity, head_dim]`.
    keys: Vec<Vec<f32>>,
    /// Values, in the same way.
    values: Vec<Vec<f32>>,
}

impl Passage {
    /// Gives every one of `tokens`, whatever is chosen, and looks at the logits after each.
    pub(crate) fn given(
        session: &mut DecodeSession,
        tokens: &[u32],
        name: &str,
        environment: &Environment,
    ) -> Result<Self> {
        let bar = Progress::tokens(name.to_owned(), environment, tokens.len() as u64);
        let mut passage = Self::default();
        session.reset()?;
        for &token in tokens {
            if interrupt::requested() {
                return Err(Error::Interrupted);
            }
            passage.chosen.push(session.feed(token)?);
            passage.logits.push(session.logits()?);
            bar.step();
        }
        passage.look_at_caches(session)
    }

    /// Gives `first` and goes on by itself for `steps` positions without a look in between, as a
    /// model is used: a device runs ahead of the host.
    pub(crate) fn free(session: &mut DecodeSession, first: u32, steps: u32) -> Result<Self> {
        let mut passage = Self::default();
        session.reset()?;
        session.decode(&[first], steps, &mut |chosen| {
            passage.chosen.push(chosen.token);
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if interrupt::requested() {
            return Err(Error::Interrupted);
        }
        passage.logits.push(session.logits()?);
        passage.look_at_caches(session)
    }

    fn look_at_caches(mut self, session: &mut DecodeSession) -> Result<Self> {
        for layer in 0..session.plan().cache.layers {
            let (keys, values) = session.cache(layer)?;
            self.keys.push(keys);
            self.values.push(values);
        }
        Ok(self)
    }

    /// How much there is to compare.
    pub(crate) fn extent(&self) -> String {
        let vocab = self.logits.first().map_or(0, Vec::len);
        let elements: usize = self.keys.iter().chain(&self.values).map(Vec::len).sum();
        format!(
            "{} tokens, {} x {vocab} logits, {elements} cache elements of {} layers",
            self.chosen.len(),
            self.logits.len(),
            self.keys.len()
        )
    }

    /// The first difference in any bit of tokens, logits, keys and values each; none if equal.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let rows = |what: &str, a: &[Vec<f32>], b: &[Vec<f32>]| {
            let at = (0..a.len().max(b.len())).find(|&i| match (a.get(i), b.get(i)) {
                (Some(a), Some(b)) => !same_bits(a, b),
                _ => true,
            })?;
            Some(format!("{what} {at}"))
        };
        let token = (0..self.chosen.len().max(other.chosen.len()))
            .find(|&i| self.chosen.get(i) != other.chosen.get(i));
        [
            token.map(|i| format!("token {i}")),
            rows("logits", &self.logits, &other.logits),
            rows("keys of layer", &self.keys, &other.keys),
            rows("values of layer", &self.values, &other.values),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

#[cfg(test)]
mod tests {
    use super::Passage;

    #[test]
    fn any_bit_of_tokens_logits_keys_and_values_is_a_difference_and_told() {
        let passage = Passage {
            chosen: vec![3, 4],
            logits: vec![vec![0.0, 1.0], vec![f32::NAN, 2.0]],
            keys: vec![vec![1.0], vec![3.0]],
            values: vec![vec![2.0], vec![0.0]],
        };
        assert_eq!(passage.differences(&passage.clone()), Vec::<String>::new());
        let differs = |change: fn(&mut Passage)| {
            let mut other = passage.clone();
            change(&mut other);
            assert_eq!(passage.differences(&other), other.differences(&passage));
            passage.differences(&other)
        };
        assert_eq!(differs(|p| p.chosen[1] = 5), ["token 1"]);
        assert_eq!(differs(|p| p.chosen.truncate(1)), ["token 1"]);
        assert_eq!(differs(|p| p.logits[0][0] = -0.0), ["logits 0"]);
        assert_eq!(differs(|p| p.logits.truncate(1)), ["logits 1"]);
        assert_eq!(differs(|p| p.keys[0][0] = 9.0), ["keys of layer 0"]);
        assert_eq!(differs(|p| p.values[1][0] = -0.0), ["values of layer 1"]);
        let extent = "2 tokens, 2 x 2 logits, 4 cache elements of 2 layers";
        assert_eq!(passage.extent(), extent);
    }
}
