//! Comparison with outside truth (logits and continuations that another implementation computed
//! from the same weights), and with the reference step by step.

mod departure;

pub use departure::{Departure, first_departure};

use crate::error::{Defect, Error, Result};
use crate::session::DecodeSession;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::Path;

/// Logits and continuations of one model, by another implementation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Golden {
    /// The model file.
    pub model: String,
    /// Who computed them, and how.
    pub reference: String,
    /// Greedy continuations.
    pub greedy: Vec<GoldenGreedy>,
    /// A teacher-forced text.
    pub forced: GoldenForced,
}

/// A prompt and its greedy continuation.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct GoldenGreedy {
    /// Text of the prompt.
    pub prompt: String,
    /// Ids of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Ids of the continuation.
    pub greedy_ids: Vec<u32>,
    /// The best tokens at each step of the continuation.
    pub steps: Vec<GoldenStep>,
}

/// The best tokens after one position, best first.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct GoldenStep {
    /// Ids.
    pub top: Vec<u32>,
    /// Their logits.
    pub logit: Vec<f64>,
    /// `ln Σ e^logit` over the vocabulary.
    pub logsumexp: f64,
}

/// A text whose every token is given, and the best tokens after each position.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct GoldenForced {
    /// The text, `[positions]`.
    pub ids: Vec<u32>,
    /// Best tokens after each position, best first, `[positions, k]`.
    pub top_ids: Vec<Vec<u32>>,
    /// Their logits, `[positions, k]`.
    pub top_logits: Vec<Vec<f64>>,
    /// `ln Σ e^logit` after each position, `[positions]`.
    pub logsumexp: Vec<f64>,
    /// Mean of `logsumexp − logit` of the text's own next token, nats.
    pub mean_nll: f64,
}

/// What a comparison with a [`Golden`] found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GoldenReport {
    /// Teacher-forced positions.
    pub positions: usize,
    /// Share of them at which the best token is the same.
    pub top1_agreement: f64,
    /// Largest difference of a logit, over the golden's best tokens at all positions.
    pub max_abs_logit_error: f64,
    /// Mean difference of `ln Σ e^logit`.
    pub mean_abs_logsumexp_error: f64,
    /// Mean of `logsumexp − logit` of the text's own next token, nats.
    pub mean_nll: f64,
    /// The same in the golden.
    pub golden_mean_nll: f64,
    /// Prompts that were continued.
    pub greedy_prompts: usize,
    /// Continuations that are equal to the end.
    pub greedy_equal: usize,
    /// Where the others part.
    pub first_divergences: Vec<Divergence>,
}

/// Where a continuation parts from the golden one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Index of the prompt.
    pub prompt: usize,
    /// Tokens that were equal before.
    pub step: usize,
    /// How far the golden's best logit is above its second best there.
    pub golden_margin: f64,
}

/// What a [`GoldenReport`] must keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GoldenBounds {
    /// [`GoldenReport::top1_agreement`], at least.
    pub top1_agreement: f64,
    /// [`GoldenReport::max_abs_logit_error`], at most.
    pub max_abs_logit_error: f64,
    /// [`GoldenReport::mean_abs_logsumexp_error`], at most.
    pub mean_abs_logsumexp_error: f64,
    /// A continuation may part only where [`Divergence::golden_margin`] is at most this.
    pub divergence_margin: f64,
}

impl GoldenBounds {
    /// For arithmetic in f32 throughout: only the order of summation differs.
    pub const EXACT: Self = Self {
        top1_agreement: 1.0,
        max_abs_logit_error: 2e-3,
        mean_abs_logsumexp_error: 2e-4,
        divergence_margin: 0.0,
    };

    /// For kernels that round the cache to f16 or the activations to 16-bit fixed point.
    pub const ROUNDED: Self = Self {
        top1_agreement: 0.98,
        max_abs_logit_error: 0.25,
        mean_abs_logsumexp_error: 0.02,
        divergence_margin: 0.1,
    };
}

impl Golden {
    /// Reads a golden file.
    ///
    /// # Errors
    ///
    /// [`Error::Io`], and [`Error::InvalidModel`] for a file of another form.
    pub fn open(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
        let bad = |at: &str, why: String| Error::invalid(path, at, None, Defect::BadValue, why);
        let golden: Self =
            serde_json::from_str(&text).map_err(|e| bad("golden file", e.to_string()))?;
        let f = &golden.forced;
        let n = f.ids.len();
        if [f.top_ids.len(), f.top_logits.len(), f.logsumexp.len()] != [n; 3] || n < 2 {
            return Err(bad("forced", "lists of different or no length".to_owned()));
        }
        if f.top_ids.iter().zip(&f.top_logits).any(|(a, b)| a.len() != b.len() || a.is_empty()) {
            return Err(bad("forced.top_ids", "as many ids as logits are expected".to_owned()));
        }
        for (i, g) in golden.greedy.iter().enumerate() {
            if g.prompt_ids.is_empty() || g.steps.len() != g.greedy_ids.len() {
                return Err(bad(&format!("greedy[{i}]"), "lists do not match".to_owned()));
            }
        }
        Ok(golden)
    }

    /// Positions that a session needs for the longest part.
    pub fn capacity(&self) -> usize {
        let greedy = self.greedy.iter().map(|g| g.prompt_ids.len() + g.greedy_ids.len());
        greedy.chain([self.forced.ids.len()]).max().unwrap_or(1)
    }
}

/// `ln Σ e^x`, in f64.
pub fn logsumexp(x: &[f32]) -> f64 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|v| (f64::from(*v) - f64::from(max)).exp()).sum();
    f64::from(max) + sum.ln()
}

/// Compares a session with `golden`; `progress` is told (positions done, of all). The session is
/// reset before and after.
///
/// # Errors
///
/// Those of [`DecodeSession::decode`]; [`Error::Usage`] when the capacity is too small or the
/// vocabulary another one.
pub fn compare(
    session: &mut DecodeSession,
    golden: &Golden,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<GoldenReport> {
    if golden.capacity() > session.capacity() as usize {
        return Err(Error::Usage(format!(
            "the golden file needs a context of {} positions, the session has {}",
            golden.capacity(),
            session.capacity()
        )));
    }
    let greedy = golden.greedy.iter().map(|g| g.prompt_ids.len() + g.greedy_ids.len());
    let total = (golden.forced.ids.len() + greedy.sum::<usize>()) as u64;
    let mut done = 0;
    let mut tick = || {
        done += 1;
        progress(done, total);
    };
    let mut report = forced(session, &golden.forced, &mut tick)?;
    report.greedy_prompts = golden.greedy.len();
    for (prompt, g) in golden.greedy.iter().enumerate() {
        match continuation(session, prompt, g, &mut tick)? {
            None => report.greedy_equal += 1,
            Some(divergence) => report.first_divergences.push(divergence),
        }
    }
    session.reset()?;
    Ok(report)
}

fn forced(
    session: &mut DecodeSession,
    golden: &GoldenForced,
    tick: &mut dyn FnMut(),
) -> Result<GoldenReport> {
    let n = golden.ids.len();
    let (mut same, mut worst, mut lse_error, mut nll) = (0usize, 0.0f64, 0.0, 0.0);
    session.reset()?;
    for i in 0..n {
        let chosen = session.feed(golden.ids[i])?;
        let logits = session.logits()?;
        let logit = |id: u32| {
            logits.get(id as usize).map(|v| f64::from(*v)).ok_or_else(|| {
                Error::Usage(format!("the golden file has token {id}, the model has not"))
            })
        };
        same += usize::from(golden.top_ids[i].first() == Some(&chosen));
        for (id, truth) in golden.top_ids[i].iter().zip(&golden.top_logits[i]) {
            let error = (logit(*id)? - truth).abs();
            // A NaN must not pass as small.
            worst = if error.is_nan() { f64::INFINITY } else { worst.max(error) };
        }
        let lse = logsumexp(&logits);
        lse_error += (lse - golden.logsumexp[i]).abs();
        if let Some(next) = golden.ids.get(i + 1) {
            nll += lse - logit(*next)?;
        }
        tick();
    }
    Ok(GoldenReport {
        positions: n,
        top1_agreement: same as f64 / n as f64,
        max_abs_logit_error: worst,
        mean_abs_logsumexp_error: lse_error / n as f64,
        mean_nll: nll / (n - 1) as f64,
        golden_mean_nll: golden.mean_nll,
        greedy_prompts: 0,
        greedy_equal: 0,
        first_divergences: Vec::new(),
    })
}

/// Where the greedy continuation of a prompt parts from the golden one, if it does.
fn continuation(
    session: &mut DecodeSession,
    prompt: usize,
    golden: &GoldenGreedy,
    tick: &mut dyn FnMut(),
) -> Result<Option<Divergence>> {
    let n_predict = u32::try_from(golden.greedy_ids.len()).unwrap_or(u32::MAX);
    let mut chosen = Vec::with_capacity(golden.greedy_ids.len());
    let last_input = golden.prompt_ids.len() - 1;
    session.reset()?;
    session.decode(&golden.prompt_ids, n_predict, &mut |c| {
        tick();
        if c.position as usize >= last_input {
            chosen.push(c.token);
        }
        ControlFlow::Continue(())
    })?;
    let step = (0..golden.greedy_ids.len()).find(|&i| chosen.get(i) != golden.greedy_ids.get(i));
    Ok(step.map(|step| {
        let golden_margin = match golden.steps[step].logit[..] {
            [best, second, ..] => best - second,
            _ => f64::INFINITY,
        };
        Divergence { prompt, step, golden_margin }
    }))
}

impl GoldenReport {
    /// Holds the report to `bounds`.
    ///
    /// # Errors
    ///
    /// [`Error::Verification`] naming every bound that is broken.
    pub fn check(&self, bounds: &GoldenBounds) -> Result<()> {
        let mut broken = Vec::new();
        if self.top1_agreement < bounds.top1_agreement {
            broken.push(format!(
                "the best token agrees at {:.4} of positions, {} expected",
                self.top1_agreement, bounds.top1_agreement
            ));
        }
        let mut at_most = |what: &str, value: f64, bound: f64| {
            // Written so that a NaN breaks the bound.
            if value.is_nan() || value > bound {
                broken.push(format!("{what} is {value:.3e}, at most {bound:.3e} expected"));
            }
        };
        at_most("max |logit error|", self.max_abs_logit_error, bounds.max_abs_logit_error);
        let (lse, most) = (self.mean_abs_logsumexp_error, bounds.mean_abs_logsumexp_error);
        at_most("mean |logsumexp error|", lse, most);
        for d in &self.first_divergences {
            let what = format!("margin where prompt {} parts at step {}", d.prompt, d.step);
            at_most(&what, d.golden_margin, bounds.divergence_margin);
        }
        if broken.is_empty() { Ok(()) } else { Err(Error::Verification(broken.join("; "))) }
    }
}
