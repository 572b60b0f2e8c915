//! `verify`: the model on this machine against the definition of correct, the plain plan on the
//! CPU; with `--golden` against outside truth.

use crate::args::{Backend, VerifyArgs};
use crate::environment::Environment;
use crate::output::print;
use crate::passage::{Logits, Passage};
use crate::top::top;
use crate::{Outcome, golden, interrupt, load};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::session::{BackendChoice, Mode, SessionOptions};
use decode_graph::verify::{first_departure, logsumexp};

/// Σ(x − r)² / Σr² of a position's logits, at most.
const NMSE: f64 = 1e-4;
/// Mean Kullback-Leibler divergence from the reference, nats, at most.
const DIVERGENCE: f64 = 1e-3;
/// Another token than the reference's may come first only where the reference's lead is below
/// this part of the logits' root mean square.
const LEAD: f64 = 0.02;

pub(crate) fn run(args: &VerifyArgs, environment: &Environment) -> Result<Outcome> {
    let model = load::named(&args.model)?;
    if let Some(path) = &args.golden {
        let model = model.map_or_else(|| load::required(&args.model), Ok)?;
        return golden::run(path, model, &args.engine, environment);
    }
    let (model, session) = load::session(model, &args.engine, args.n_gen, environment)?;
    let (cuda, kv) = (session.backend() == "cuda", session.plan().cache.kind);
    let tokens = tokens(args.n_gen, session.plan().vocab);
    drop(session);
    interrupt::watch();

    let base =
        SessionOptions { kv: Some(kv), ..load::options(&args.engine, args.n_gen, environment)? };
    if args.bisect {
        return bisect(&model, cuda, base, &tokens, environment);
    }
    let on = |backend, mode, fused| SessionOptions { backend, mode, fused, ..base.clone() };
    // The graph has the memory that every run has; what must equal it, the plain plan and the
    // launches one by one, has red zones around it.
    let zoned =
        |mode, fused| SessionOptions { red_zones: true, ..on(BackendChoice::Cuda, mode, fused) };
    let run = |name: &str, options: &SessionOptions| -> Result<(Passage, Passage)> {
        let mut session = load::open(&model, options, environment)?;
        // Not a number, and a number: what nobody has written must show.
        session.poison(0xFF)?;
        let given = Passage::given(&mut session, &tokens, name, environment)?;
        session.poison(0x7E)?;
        let first = tokens.first().copied().unwrap_or(0);
        let free = Passage::free(&mut session, first, args.n_gen)?;
        session.check_red_zones()?;
        Ok((given, free))
    };
    let reference = run("cpu, plain", &on(BackendChoice::Cpu, Mode::Eager, false))?;
    // Each with the earlier one that it must equal in every bit.
    let candidates: &[(&str, SessionOptions, Option<&str>)] =
        if cuda && args.engine.backend != Backend::Cpu {
            let (graph, eager) = ("cuda, graph, fused", "cuda, eager, fused");
            &[
                (graph, on(BackendChoice::Cuda, Mode::Graph, true), None),
                (eager, zoned(Mode::Eager, true), Some(graph)),
                ("cuda, graph, plain", zoned(Mode::Graph, false), None),
            ]
        } else {
            &[("cpu, fused", on(BackendChoice::Cpu, Mode::Eager, true), Some("cpu, plain"))]
        };

    let mut broken = Vec::new();
    print(&format!(
        "{}: {} positions against the plain plan on the CPU ({} cache)\n",
        model.path().display(),
        tokens.len(),
        kv.name()
    ))?;
    // The run before: all that any candidate is compared with in every bit.
    let mut before = reference.clone();
    for (name, options, same_as) in candidates {
        let found = run(name, options)?;
        let difference = Difference::between(&reference.0.logits, &found.0.logits);
        print(&format!("{name:<20} {difference}\n"))?;
        broken.extend(difference.broken().map(|what| format!("{name}: {what}")));
        if let Some(other) = same_as {
            print(&format!("{name} = {other}, bit for bit:\n"))?;
            for (kind, a, b) in
                [("given tokens", &before.0, &found.0), ("own tokens", &before.1, &found.1)]
            {
                let differences = a.differences(b).join(", ");
                let verdict = if differences.is_empty() { "yes" } else { "NO" };
                print(&format!("  {kind:<13} {verdict}: {}\n", b.extent()))?;
                broken.extend((!differences.is_empty()).then(|| {
                    format!("{name} differs from {other} on {kind}: first at {differences}")
                }));
            }
        }
        before = found;
    }
    if broken.is_empty() {
        return print("verified\n").map(|()| Outcome::Done);
    }
    Err(Error::Verification(broken.join("; ")))
}

/// The first step at which the device departs from the reference.
fn bisect(
    model: &Checkpoint,
    cuda: bool,
    base: SessionOptions,
    tokens: &[u32],
    environment: &Environment,
) -> Result<Outcome> {
    if !cuda {
        let what = "--bisect looks for what a device computes wrongly; here is only the reference";
        return Err(Error::Usage(what.to_owned()));
    }
    let on = |backend| SessionOptions { backend, ..base.clone() };
    let mut device = load::open(model, &on(BackendChoice::Cuda), environment)?;
    let mut reference = load::open(model, &on(BackendChoice::Cpu), environment)?;
    let Some(d) = first_departure(&mut device, &mut reference, tokens, NMSE)? else {
        let n = tokens.len();
        print(&format!(
            "no step departs from the reference by NMSE {NMSE:.0e} in {n} positions\n"
        ))?;
        return Ok(Outcome::Done);
    };
    Err(Error::Verification(format!(
        "position {}: {} ({}) is the first step that departs from the reference: {}, NMSE {:.2e}, \
         max error {:.2e}; {} of {} steps compared",
        d.position,
        d.label,
        d.op,
        d.what,
        d.nmse,
        d.max_error,
        d.tries,
        device.plan().steps.len()
    )))
}

/// Ids spread over the vocabulary, the same in every run (Weyl sequence of the golden ratio).
fn tokens(n: u32, vocab: u32) -> Vec<u32> {
    (1..=n).map(|i| i.wrapping_mul(0x9E37_79B9) % vocab.max(1)).collect()
}

/// How far logits are from the reference's.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Difference {
    positions: usize,
    /// Positions where the same token comes first.
    top1: usize,
    /// Positions where another one does, against a clear lead.
    wrong: usize,
    nmse: f64,
    mean_divergence: f64,
}

impl Difference {
    fn between(reference: &Logits, found: &Logits) -> Self {
        let mut d =
            Self { positions: reference.len(), top1: 0, wrong: 0, nmse: 0.0, mean_divergence: 0.0 };
        for (r, x) in reference.iter().zip(found) {
            let power: f64 = r.iter().map(|&v| f64::from(v).powi(2)).sum();
            let error: f64 = r.iter().zip(x).map(|(&a, &b)| f64::from(b - a).powi(2)).sum();
            let nmse = error / power.max(f64::MIN_POSITIVE);
            // Not a number is as wrong as can be; `max` would drop it.
            d.nmse = if nmse.is_nan() { f64::INFINITY } else { d.nmse.max(nmse) };
            d.mean_divergence += divergence(r, x) / reference.len() as f64;
            let (first, here) = (top(r, 1), top(x, 1));
            let (Some(&(best, largest)), Some(&(other, _))) = (first.first(), here.first()) else {
                continue;
            };
            let lead = f64::from(largest - r[other as usize]);
            let rms = (power / r.len() as f64).sqrt();
            d.top1 += usize::from(best == other);
            d.wrong += usize::from(best != other && lead > LEAD * rms);
        }
        d
    }

    /// The bounds that do not hold.
    fn broken(&self) -> impl Iterator<Item = String> {
        let d = *self;
        let broken = |ok: bool, what: String| (!ok).then_some(what);
        [
            broken(d.nmse <= NMSE, format!("NMSE {:.1e} is above {NMSE:.0e}", d.nmse)),
            broken(
                d.mean_divergence <= DIVERGENCE,
                format!("KL divergence {:.1e} is above {DIVERGENCE:.0e}", d.mean_divergence),
            ),
            broken(d.wrong == 0, format!("{} positions choose another token", d.wrong)),
        ]
        .into_iter()
        .flatten()
    }
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { positions, top1, nmse, mean_divergence, .. } = self;
        write!(f, "NMSE ≤ {nmse:.2e}, mean KL {mean_divergence:.2e}, top-1 {top1}/{positions}")
    }
}

/// Σ p log(p / q) of the distributions that two logit vectors make, nats.
fn divergence(p: &[f32], q: &[f32]) -> f64 {
    let (lp, lq) = (logsumexp(p), logsumexp(q));
    let term = |(&p, &q): (&f32, &f32)| {
        let (log_p, log_q) = (f64::from(p) - lp, f64::from(q) - lq);
        log_p.exp() * (log_p - log_q)
    };
    p.iter().zip(q).map(term).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(reference: &[f32], found: &[f32]) -> usize {
        Difference::between(&vec![reference.to_vec()], &vec![found.to_vec()]).broken().count()
    }

    #[test]
    fn equal_logits_break_nothing_and_nan_breaks_everything_it_can() {
        assert_eq!(broken(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), 0);
        assert!(broken(&[1.0, 2.0, 3.0], &[1.0, f32::NAN, 3.0]) >= 2);
    }

    #[test]
    fn another_first_token_counts_only_against_a_clear_lead() {
        assert_eq!(broken(&[1.0, 3.0, 3.0001], &[1.0, 3.0001, 3.0]), 0);
        assert_eq!(broken(&[1.0, 2.0, 3.0], &[1.0, 3.0, 2.0]), 3);
    }

    #[test]
    fn divergence_is_zero_for_shifted_logits_and_positive_otherwise() {
        assert!(divergence(&[1.0, 2.0], &[11.0, 12.0]).abs() < 1e-12);
        // p = (1/2, 1/2), q = (1/4, 3/4): log 2 − log 3 / 2.
        let kl = divergence(&[0.0, 0.0], &[0.0, 3f32.ln()]);
        assert!((kl - (2f64.ln() - 3f64.ln() / 2.0)).abs() < 1e-6, "{kl}");
    }
}
