//! `run`: the latency of decode at each depth.

use crate::Outcome;
use crate::args::{ReportFormat, RunArgs};
use crate::environment::Environment;
use crate::lists::List;
use crate::output::{failed, note};
use crate::progress::Progress;
use crate::{doctor, interrupt, load};
use decode_graph::bench::ceiling;
use decode_graph::bench::fields::{Record, Setup};
use decode_graph::bench::measure::{Measurement, Repeat, Test, measure};
use decode_graph::bench::model::ModelFacts;
use decode_graph::bench::report::{Format, Report};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::session::{DecodeSession, EngineStats};
use std::io::{self, Write};
use std::time::Duration;

pub(crate) fn run(args: &RunArgs, environment: &Environment) -> Result<Outcome> {
    if args.list_devices {
        return doctor::list_devices();
    }
    let tests = tests(args)?;
    let capacity = tests.iter().map(Test::capacity).max().unwrap_or(1);
    if tests.iter().any(|t| t.n_prompt > 0) {
        note("note: a prompt is processed token by token, one decode step each");
    }
    let model = load::named(&args.model)?;
    let (checkpoint, mut session) = load::session(model, &args.engine, capacity, environment)?;
    let setup = setup(&checkpoint, &session, args)?;
    let repeat = Repeat {
        times: args.repetitions,
        warmup: !args.no_warmup,
        delay: Duration::from_secs(args.delay.into()),
    };

    // Before the first byte of the report: what is begun is ended.
    interrupt::watch();
    let mut reports = Reports::new(args)?;
    for (i, &test) in tests.iter().enumerate() {
        if args.progress {
            note(&format!("{}/{}: {test}", i + 1, tests.len()));
        }
        let before = session.stats();
        let (tokens, measurement) = match one(&mut session, test, repeat, environment) {
            // What was measured before is whole; its end is still to be printed.
            Err(Error::Interrupted) => break,
            other => other?,
        };
        let cut = measurement.repetitions.len() < repeat.times as usize;
        remark_warmup(args, &measurement);
        if args.verbose {
            remark_engine(test, tokens, before, session.stats());
        }
        reports.row(&Record::new(setup.clone(), session.plan(), measurement))?;
        if cut {
            break;
        }
    }
    reports.end()?;
    Ok(if interrupt::requested() { Outcome::Interrupted } else { Outcome::Done })
}

/// llama-bench's order: at each depth all prompts, then all generations, then both together.
fn tests(args: &RunArgs) -> Result<Vec<Test>> {
    let mut pairs: Vec<(u32, u32)> = Vec::new();
    pairs.extend(List::all(&args.n_prompt).into_iter().map(|p| (p, 0)));
    pairs.extend(List::all(&args.n_gen).into_iter().map(|n| (0, n)));
    for list in &args.prompt_gen {
        let &[p, n] = list.values() else {
            return Err(Error::Usage("-pg takes two numbers: -pg 512,128".to_owned()));
        };
        pairs.push((p, n));
    }
    pairs.retain(|&(p, n)| (p, n) != (0, 0));
    let depths = List::all(&args.n_depth);
    let at = |depth| pairs.iter().map(move |&(n_prompt, n_gen)| Test { n_prompt, n_gen, depth });
    let tests: Vec<Test> = depths.into_iter().flat_map(at).collect();
    if tests.is_empty() {
        return Err(Error::Usage("no test: give -n, -p or -pg a number above 0".to_owned()));
    }
    if let Some(test) = tests.iter().find(|t| t.capacity() == u32::MAX) {
        return Err(Error::Usage(format!("{test} needs more positions than can be counted")));
    }
    Ok(tests)
}

/// Measures a test; also gives the tokens that it took, warm-up included.
fn one(
    session: &mut DecodeSession,
    test: Test,
    repeat: Repeat,
    environment: &Environment,
) -> Result<(u64, Measurement)> {
    let total = u64::from(test.steps()) * u64::from(repeat.times);
    let bar = Progress::tokens(test.to_string(), environment, total);
    let mut tokens = 0;
    let measurement = measure(session, test, repeat, &interrupt::requested, &mut || {
        tokens += 1;
        bar.step();
    })?;
    Ok((tokens, measurement))
}

fn setup(checkpoint: &Checkpoint, session: &DecodeSession, args: &RunArgs) -> Result<Setup> {
    let on_gpu = session.backend() == "cuda";
    Ok(Setup {
        model: ModelFacts::of(checkpoint)?,
        backend: session.backend().to_owned(),
        mode: session.mode().to_owned(),
        cpu: doctor::cpu_name(),
        gpu: if on_gpu { session.device().name.clone() } else { String::new() },
        device: args.engine.device,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        kv: session.plan().cache.kind.name().to_owned(),
        capacity: session.capacity(),
        ceiling_gb_s: ceiling(session.backend(), args.engine.device)?,
    })
}

/// Whether the warm-up reached its end: what a reader of the table must know, or with `-v` may.
fn remark_warmup(args: &RunArgs, m: &Measurement) {
    let Some(w) = m.warmup else { return };
    let took = format!("{} warm-up rounds ({} tokens, {:.2} s)", w.rounds, w.tokens, w.seconds);
    if !w.stable {
        note(&format!("warning: {}: not yet stable after {took}: expect wide spreads", m.test));
    } else if args.verbose {
        note(&format!("{}: stable after {took}", m.test));
    }
}

/// What the engine did for a test's `tokens`.
fn remark_engine(test: Test, tokens: u64, before: EngineStats, after: EngineStats) {
    let calls = after.driver_calls - before.driver_calls;
    note(&format!(
        "{test}: {} captures in all, {:.2} driver calls a token, {} allocations after freeze; \
         load {:.2} s, JIT {:.2} s, capture {:.3} s",
        after.captures,
        calls as f64 / tokens.max(1) as f64,
        after.allocations_after_freeze,
        after.load_seconds,
        after.jit_seconds,
        after.capture_seconds
    ));
}

/// The report on stdout, and the one on stderr if it was asked for.
struct Reports(Vec<(Box<dyn Report>, bool)>);

impl Reports {
    fn new(args: &RunArgs) -> Result<Self> {
        let mut reports = vec![(args.output.format().report(), true)];
        reports.extend(args.output_err.map(|format| (format.format().report(), false)));
        let mut new = Self(reports);
        new.each(|report, out| report.begin(out))?;
        Ok(new)
    }

    fn row(&mut self, record: &Record) -> Result<()> {
        self.each(|report, out| report.row(out, record))
    }

    fn end(&mut self) -> Result<()> {
        self.each(|report, out| report.end(out))
    }

    fn each(
        &mut self,
        print: impl Fn(&mut dyn Report, &mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        for (report, to_stdout) in &mut self.0 {
            // A row is written in one go: an interrupt leaves no half of it.
            let mut text = Vec::new();
            print(report.as_mut(), &mut text).map_err(failed)?;
            if *to_stdout {
                let mut out = io::stdout().lock();
                out.write_all(&text).and_then(|()| out.flush()).map_err(failed)?;
            } else {
                let _ = io::stderr().write_all(&text);
            }
        }
        Ok(())
    }
}

impl ReportFormat {
    fn format(self) -> Format {
        match self {
            Self::Md => Format::Md,
            Self::Json => Format::Json,
            Self::Jsonl => Format::Jsonl,
            Self::Csv => Format::Csv,
            Self::Sql => Format::Sql,
        }
    }
}
