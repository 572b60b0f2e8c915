//! Where a session departs from the reference: the first position, and in it the step, found by
//! bisection over the plan.
//!
//! ```text
//! differs(s) = a buffer or cache row that step s wrote has NMSE > bound against the reference's
//! good = −1, bad = a step that differs at the end of a token; while good + 1 < bad:
//!   s = (good + bad) / 2;  bad = s if differs(s), else good = s
//! ```
//!
//! Each try computes the position anew on both sides, from caches that agree. Unlike `GPU_DEBUG=2`,
//! which judges every step alone on the device's own inputs, this follows what one step hands to the
//! next, and looks at few steps: the step found differs, the one before it does not.

use crate::cuda::eager::errors;
use crate::engine::{row_at, written_cache};
use crate::error::{Error, Result};
use crate::session::{DecodeSession, Written};

/// The step at which a session departs from the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Departure {
    /// Position of the token.
    pub position: u32,
    /// Index of the step.
    pub step: usize,
    /// Its label.
    pub label: String,
    /// Name of its op.
    pub op: &'static str,
    /// The buffer that is farthest off; `keys` or `values` of the cache.
    pub what: String,
    /// `Σ (x − r)² / Σ r²` of it.
    pub nmse: f64,
    /// `max |x − r|` of it.
    pub max_error: f64,
    /// Steps of its position that were compared until it was found.
    pub tries: u32,
}

/// The buffer that is farthest off: its name, NMSE and maximum error.
type Distance = (String, f64, f64);

fn farthest(found: &[Written], reference: &[Written]) -> Result<Distance> {
    let pairs = found.iter().zip(reference);
    let of = |(x, r): (&Written, &Written)| {
        let (nmse, max_error) = errors(&x.values, &r.values);
        (x.name.clone(), nmse, max_error)
    };
    pairs
        .map(of)
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .ok_or_else(|| Error::Internal("a step writes nothing".to_owned()))
}

/// The two sides of a comparison, at one position.
struct Sides<'a> {
    session: &'a mut DecodeSession,
    reference: &'a mut DecodeSession,
}

impl Sides<'_> {
    /// How far apart the two are after step `step` of the current position with input `token`.
    fn distance(&mut self, token: u32, step: usize) -> Result<Distance> {
        farthest(&self.session.outputs(token, step)?, &self.reference.outputs(token, step)?)
    }

    /// A step that differs by more than `bound` at the current position, if there is one: that which
    /// writes the lowest layer's row of the cache that does, else the last.
    fn differing(&mut self, token: u32, bound: f64) -> Result<Option<usize>> {
        let steps = &self.session.plan().steps;
        let last = steps.len().saturating_sub(1);
        let writes = steps.iter().enumerate().filter_map(|(i, s)| Some((i, written_cache(&s.op)?)));
        let writes: Vec<_> = writes.collect();
        let (_, nmse, _) = self.distance(token, last)?;
        let position = self.session.position();
        // A row may be wrong long before a logit shows it.
        for (step, cache) in writes {
            let (found, reference) =
                (self.session.cache(cache.layer)?, self.reference.cache(cache.layer)?);
            let apart = |found: &[f32], reference: &[f32]| {
                let row = |all| row_at(&cache, position, all);
                errors(&row(found), &row(reference)).0 > bound
            };
            if apart(&found.0, &reference.0) || apart(&found.1, &reference.1) {
                return Ok(Some(step));
            }
        }
        Ok((nmse > bound).then_some(last))
    }
}

/// The first step at which `session` departs by an NMSE above `bound` from `reference`, which has
/// the same plan and runs on the CPU, over the positions of `tokens`; `None` where none does. Both
/// are reset before.
///
/// # Errors
///
/// [`Error::Usage`] when the plans differ; those of [`DecodeSession::outputs`].
pub fn first_departure(
    session: &mut DecodeSession,
    reference: &mut DecodeSession,
    tokens: &[u32],
    bound: f64,
) -> Result<Option<Departure>> {
    if session.plan() != reference.plan() {
        let what = "the plans differ: the same fusion, cache type and capacity are needed";
        return Err(Error::Usage(what.to_owned()));
    }
    session.reset()?;
    reference.reset()?;
    let mut sides = Sides { session, reference };
    for &token in tokens {
        if let Some(mut bad) = sides.differing(token, bound)? {
            let mut found = sides.distance(token, bad)?;
            let (mut first, mut tries) = (0, 1);
            while first < bad {
                let middle = first + (bad - first) / 2;
                let here = sides.distance(token, middle)?;
                tries += 1;
                if here.1 > bound {
                    (bad, found) = (middle, here);
                } else {
                    first = middle + 1;
                }
            }
            let (what, nmse, max_error) = found;
            let position = sides.session.position();
            let step = &sides.session.plan().steps[bad];
            let (label, op) = (step.label.clone(), step.op.describe().name());
            return Ok(Some(Departure {
                position,
                step: bad,
                label,
                op,
                what,
                nmse,
                max_error,
                tries,
            }));
        }
        sides.session.feed(token)?;
        sides.reference.feed(token)?;
    }
    Ok(None)
}
