//! `profile`: where a token's time goes, kernel by kernel, reconciled with the plain replay.

use crate::Outcome;
use crate::args::{ProfileArgs, ProfileFormat};
use crate::environment::Environment;
use crate::load;
use crate::output::print;
use crate::run::overhead;
use crate::table::table;
use decode_graph::bench::measure::{Repeat, Test, Watch, measure};
use decode_graph::bench::profile::{Profile, StepProfile, chrome_trace};
use decode_graph::bench::stats::Sorted;
use decode_graph::cuda::driver::nvtx;
use decode_graph::error::Result;
use decode_graph::session::{DecodeSession, SessionOptions};
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Input of the first token.
const FIRST: u32 = 1;

pub(crate) fn run(args: &ProfileArgs, environment: &Environment) -> Result<Outcome> {
    let model = load::required(&args.model)?;
    let tokens = args.steps.unwrap_or(args.n_gen);
    let capacity = args.depth.saturating_add(tokens).saturating_add(2);
    let (model, mut session) = load::session(Some(model), &args.engine, capacity, environment)?;
    if let Some(steps) = args.steps {
        return bracket(&mut session, args.depth, steps);
    }
    let replay_us = plain(&mut session, args.depth, tokens)?;
    let test = Test { n_prompt: 0, n_gen: tokens, depth: args.depth };
    let overhead = overhead(&mut session, test)?;
    let (backend, kind) = (session.backend(), session.plan().cache.kind);
    drop(session);
    let traced = SessionOptions {
        trace: true,
        backend: load::named_backend(backend),
        kv: Some(kind),
        ..load::options(&args.engine, capacity, environment)?
    };
    let mut session = load::open(&model, &traced, environment)?;
    let mut profile = Profile::take(&mut session, FIRST, args.depth, tokens)?;
    let name = session.plan().model.clone();
    drop(session);
    profile.reconcile(replay_us, overhead.and_then(|o| o.relaunch_us));
    let found = Found {
        profile,
        replay_us,
        ceiling: decode_graph::bench::ceiling(backend, args.engine.device)?,
    };
    print(&match args.output {
        ProfileFormat::Md => found.text(!args.by_kernel),
        ProfileFormat::Json => format!("{:#}\n", found.json(&name)),
        ProfileFormat::Trace => {
            format!("{}\n", chrome_trace(&found.profile, &name, found.ceiling))
        }
    })?;
    Ok(Outcome::Done)
}

/// Median time a token of the replay without stamps, microseconds.
fn plain(session: &mut DecodeSession, depth: u32, n_gen: u32) -> Result<f64> {
    let test = Test { n_prompt: 0, n_gen, depth };
    let repeat = Repeat { times: 5, max_noise: None, most: 5, warmup: true, delay: Duration::ZERO };
    let mut watch =
        Watch { stop: &crate::interrupt::requested, progress: &mut |_| (), monitor: None };
    let all = measure(&mut [session], test, repeat, &mut watch)?;
    let times = all.iter().flat_map(|m| m.token_ms());
    Ok(Sorted::new(times).median().unwrap_or(0.0) * 1e3)
}

/// Replays `steps` tokens inside the range that nsys and ncu wait for, after as many outside it.
fn bracket(session: &mut DecodeSession, depth: u32, steps: u32) -> Result<Outcome> {
    let replay = |session: &mut DecodeSession| -> Result<Duration> {
        session.seek(depth, 0)?;
        let _range = nvtx::range(c"replays");
        let start = Instant::now();
        session.decode(&[FIRST], steps, &mut |_| ControlFlow::Continue(()))?;
        Ok(start.elapsed())
    };
    replay(session)?;
    session.profiler_range(true)?;
    let took = replay(session);
    session.profiler_range(false)?;
    let ms = took?.as_secs_f64() * 1e3 / f64::from(steps.max(1));
    print(&format!("{steps} tokens inside the profiler's range, {ms:.4} ms each\n"))?;
    Ok(Outcome::Done)
}

/// A profile and what it is held against.
struct Found {
    profile: Profile,
    /// Of the plain replay, microseconds a token.
    replay_us: f64,
    /// Of the device's memory, GB/s.
    ceiling: Option<f64>,
}

impl Found {
    fn cells(&self, s: &StepProfile) -> [String; 5] {
        let speed = s.gb_per_s();
        let whole = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.0}"));
        let tenths = |v: Option<f64>| v.map_or_else(|| "-".to_owned(), |v| format!("{v:.1}"));
        [
            format!("{:.2}", s.time_us),
            format!("{:.1}", 100.0 * s.time_us / self.profile.sum_us()),
            s.bytes.to_string(),
            whole(speed),
            tenths(speed.zip(self.ceiling).map(|(speed, c)| 100.0 * speed / c)),
        ]
    }

    /// Every step if `all`, then the kernels, then what the sums are held against.
    fn text(&self, all: bool) -> String {
        const FIGURES: [&str; 5] = ["us", "share %", "bytes", "GB/s", "% ceiling"];
        let mut out = String::new();
        if all {
            let titles: Vec<_> = ["label", "kernel"].into_iter().chain(FIGURES).collect();
            let rows = self.profile.steps.iter().map(|s| {
                [s.label.clone(), s.kernel.clone()].into_iter().chain(self.cells(s)).collect()
            });
            out.push_str(&table(&titles, &rows.collect::<Vec<_>>(), |i| i < 2));
            out.push('\n');
        }
        let by_kernel = self.profile.by_kernel();
        let cycles = by_kernel.iter().any(|(_, s)| s.cycles.is_some());
        let mut titles: Vec<&str> =
            ["kernel", "steps", "us each"].into_iter().chain(FIGURES).collect();
        if cycles {
            titles.extend(["cycles staged", "rest"]);
        }
        let row = |(n, s): &(usize, StepProfile)| {
            let each = format!("{:.2}", s.time_us / *n as f64);
            let mut row = vec![s.kernel.clone(), n.to_string(), each];
            row.extend(self.cells(s));
            if let Some(c) = &s.cycles {
                let cycles = [c.staged, c.rest];
                row.extend(cycles.map(|v| format!("{v:.0}")));
            }
            row
        };
        out.push_str(&table(&titles, &by_kernel.iter().map(row).collect::<Vec<_>>(), |i| i < 1));
        let p = &self.profile;
        let more = 100.0 * (p.token_us / self.replay_us - 1.0);
        let _ = writeln!(
            out,
            "\nsteps {:.1} us + between two tokens {:.1} us = {:.1} us; plain replay p50 {:.1} us\n\
             profiled token {:.1} us ({more:+.1} %, {:.3} us a stamp, taken off every step), \
             mean of {} tokens",
            p.sum_us() - p.between_us,
            p.between_us,
            p.sum_us(),
            self.replay_us,
            p.token_us,
            p.stamp_us,
            p.tokens,
        );
        if let Some(ceiling) = self.ceiling {
            let _ = writeln!(out, "ceiling: {ceiling:.0} GB/s, read in this run");
        }
        out
    }

    fn json(&self, model: &str) -> Value {
        let rows = self.profile.steps.iter().map(|s| {
            let speed = s.gb_per_s();
            let mut row = json!({
                "label": s.label,
                "kernel": s.kernel,
                "time_us": s.time_us,
                "raw_us": s.raw_us,
                "bytes": s.bytes,
                "gb_per_s": speed,
                "percent_of_ceiling": speed.zip(self.ceiling).map(|(speed, c)| 100.0 * speed / c),
            });
            if let Some(c) = &s.cycles {
                row["cycles"] = json!({
                    "staged": c.staged, "rest": c.rest,
                });
            }
            row
        });
        let p = &self.profile;
        json!({
            "model": model,
            "rows": rows.collect::<Vec<_>>(),
            "between_us": p.between_us,
            "sum_us": p.sum_us(),
            "replay_p50_us": self.replay_us,
            "profiled_token_us": p.token_us,
            "stamp_us": p.stamp_us,
            "tokens": p.tokens,
            "ceiling_gb_per_s": self.ceiling,
        })
    }
}
