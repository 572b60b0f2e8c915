//! `verify --golden`: outside truth, a file of logits along a text and of greedy continuations.

use crate::args::EngineArgs;
use crate::environment::Environment;
use crate::output::print;
use crate::progress::Progress;
use crate::sampling::{log_sum_exp, top};
use crate::verify::step;
use crate::{Outcome, interrupt, load};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Defect, Error, Result};
use decode_graph::session::DecodeSession;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::path::Path;

/// Positions whose first token is the golden one, fraction, at least.
const TOP1: f64 = 0.98;
/// Error of any golden logit, at most.
const LOGIT: f64 = 0.25;
/// Mean error of log Σ exp(logit), at most.
const LOG_SUM_EXP: f64 = 0.02;
/// Difference of the mean negative log-likelihoods, nats, at most.
const NLL: f64 = 0.01;
/// Where a continuation leaves the golden one, the golden token may lead by this, at most.
const MARGIN: f64 = 0.25;

#[derive(Deserialize)]
struct Golden {
    greedy: Vec<Greedy>,
    forced: Forced,
}

#[derive(Deserialize)]
struct Greedy {
    prompt: String,
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    logit: Vec<f64>,
}

#[derive(Deserialize)]
struct Forced {
    ids: Vec<u32>,
    top_ids: Vec<Vec<u32>>,
    top_logits: Vec<Vec<f64>>,
    logsumexp: Vec<f64>,
    mean_nll: f64,
}

/// What is printed, as one JSON object.
#[derive(Debug, Default, Serialize)]
struct Report {
    positions: usize,
    top1_agreement: f64,
    max_abs_logit_error: f64,
    mean_abs_logsumexp_error: f64,
    mean_nll: f64,
    golden_mean_nll: f64,
    greedy_prompts: usize,
    greedy_equal: usize,
    first_divergences: Vec<Divergence>,
}

#[derive(Debug, Serialize)]
struct Divergence {
    prompt: String,
    step: usize,
    golden_margin: f64,
}

pub(crate) fn run(
    path: &Path,
    model: Checkpoint,
    args: &EngineArgs,
    environment: &Environment,
) -> Result<Outcome> {
    let golden = read(path)?;
    let (_, mut session) = load::session(Some(model), args, golden.capacity(), environment)?;
    golden.check_ids(path, session.plan().vocab)?;
    interrupt::watch();
    let mut report = Report::default();
    golden.forced.check(&mut session, &mut report, environment)?;
    for greedy in &golden.greedy {
        greedy.check(&mut session, &mut report)?;
    }
    let text = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::Internal(format!("the report is no JSON: {e}")))?;
    print(&format!("{text}\n"))?;
    let broken = report.broken();
    if broken.is_empty() { Ok(Outcome::Done) } else { Err(Error::Verification(broken.join("; "))) }
}

fn read(path: &Path) -> Result<Golden> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    let wrong = |why: String| Error::invalid(path, "golden file", None, Defect::BadValue, why);
    let golden: Golden = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    let f = &golden.forced;
    let n = f.ids.len();
    let even = [f.top_ids.len(), f.top_logits.len(), f.logsumexp.len()] == [n; 3]
        && f.top_ids.iter().zip(&f.top_logits).all(|(a, b)| !a.is_empty() && a.len() == b.len());
    if n < 2 || !even {
        return Err(wrong("the lists of \"forced\" are not of one length above 1".to_owned()));
    }
    let greedy = |g: &Greedy| {
        !g.prompt_ids.is_empty() && !g.greedy_ids.is_empty() && g.steps.len() >= g.greedy_ids.len()
    };
    if !golden.greedy.iter().all(greedy) {
        return Err(wrong("a prompt of \"greedy\" lacks ids or steps".to_owned()));
    }
    Ok(golden)
}

impl Golden {
    fn capacity(&self) -> u32 {
        let greedy = self.greedy.iter().map(|g| g.prompt_ids.len() + g.greedy_ids.len());
        let most = greedy.chain([self.forced.ids.len()]).max().unwrap_or(0);
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    fn check_ids(&self, path: &Path, vocab: u32) -> Result<()> {
        let prompts = self.greedy.iter().flat_map(|g| &g.prompt_ids);
        let mut ids = self.forced.ids.iter().chain(self.forced.top_ids.iter().flatten());
        let bad = ids.find(|id| **id >= vocab).or_else(|| prompts.clone().find(|id| **id >= vocab));
        bad.map_or(Ok(()), |id| {
            let why = format!("token {id} is outside the model's vocabulary of {vocab}");
            Err(Error::invalid(path, "ids", None, Defect::BadValue, why))
        })
    }
}

impl Forced {
    fn check(
        &self,
        session: &mut DecodeSession,
        report: &mut Report,
        environment: &Environment,
    ) -> Result<()> {
        let n = self.ids.len();
        let bar = Progress::tokens("golden text".to_owned(), environment, n as u64);
        session.reset()?;
        let (mut same, mut nll) = (0, 0.0);
        for (i, &id) in self.ids.iter().enumerate() {
            let logits = step(session, id)?;
            bar.step();
            let all = log_sum_exp(&logits);
            same += usize::from(top(&logits, 1).first().map(|t| t.0) == self.top_ids[i].first().copied());
            for (&id, golden) in self.top_ids[i].iter().zip(&self.top_logits[i]) {
                let error = (f64::from(logits[id as usize]) - golden).abs();
                // Not a number is as wrong as can be; `max` would drop it.
                let error = if error.is_nan() { f64::INFINITY } else { error };
                report.max_abs_logit_error = report.max_abs_logit_error.max(error);
            }
            report.mean_abs_logsumexp_error += (all - self.logsumexp[i]).abs() / n as f64;
            if let Some(&next) = self.ids.get(i + 1) {
                nll += (all - f64::from(logits[next as usize])) / (n - 1) as f64;
            }
        }
        report.positions = n;
        report.top1_agreement = same as f64 / n as f64;
        report.mean_nll = nll;
        report.golden_mean_nll = self.mean_nll;
        Ok(())
    }
}

impl Greedy {
    fn check(&self, session: &mut DecodeSession, report: &mut Report) -> Result<()> {
        session.reset()?;
        let last_input = self.prompt_ids.len() as u32 - 1;
        let mut ids = Vec::new();
        session.decode(&self.prompt_ids, self.greedy_ids.len() as u32, &mut |chosen| {
            if chosen.position >= last_input {
                ids.push(chosen.token);
            }
            if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if interrupt::requested() {
            return Err(Error::Interrupted);
        }
        report.greedy_prompts += 1;
        let pairs = ids.iter().zip(&self.greedy_ids);
        let equal = pairs.take_while(|(a, b)| a == b).count();
        if equal == self.greedy_ids.len() {
            report.greedy_equal += 1;
            return Ok(());
        }
        let golden_margin = match self.steps[equal].logit[..] {
            [first, second, ..] => first - second,
            // Without a second logit the lead is unknown, and no excuse.
            _ => f64::MAX,
        };
        let prompt = self.prompt.clone();
        report.first_divergences.push(Divergence { prompt, step: equal, golden_margin });
        Ok(())
    }
}

impl Report {
    /// The bounds that do not hold.
    fn broken(&self) -> Vec<String> {
        let mut broken = Vec::new();
        let mut bound = |holds: bool, what: String| {
            if !holds {
                broken.push(what);
            }
        };
        let nll = (self.mean_nll - self.golden_mean_nll).abs();
        bound(self.top1_agreement >= TOP1, format!("top1_agreement is below {TOP1}"));
        bound(self.max_abs_logit_error <= LOGIT, format!("max_abs_logit_error is above {LOGIT}"));
        bound(
            self.mean_abs_logsumexp_error <= LOG_SUM_EXP,
            format!("mean_abs_logsumexp_error is above {LOG_SUM_EXP}"),
        );
        bound(nll <= NLL, format!("mean_nll differs by more than {NLL}"));
        for d in &self.first_divergences {
            let what = format!("{:?} diverges at step {} by more than {MARGIN}", d.prompt, d.step);
            bound(d.golden_margin <= MARGIN, what);
        }
        broken
    }
}
