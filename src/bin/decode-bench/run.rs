//! `run`: the latency of decode at each depth.

use crate::Outcome;
use crate::args::{Backend, ModeArg, ReportFormat, RunArgs};
use crate::environment::Environment;
use crate::lists::List;
use crate::output::{failed, note};
use crate::progress::Progress;
use crate::{doctor, interrupt, load};
use decode_graph::bench::fields::{Pair, Record, Setup};
use decode_graph::bench::measure::{Decoder, Measurement, Outlier, Repeat, Test, Watch, measure};
use decode_graph::bench::model::ModelFacts;
use decode_graph::bench::report::{Format, Report};
use decode_graph::bench::telemetry::Monitor;
use decode_graph::bench::{baseline, ceiling, nvml};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::session::{
    BackendChoice, DebugLevel, DecodeSession, EngineStats, Overhead, SessionOptions,
};
use std::io::{self, Write};
use std::time::Duration;

/// Tokens that host time and relaunch gap are measured on, at most.
const OVERHEAD_TOKENS: u32 = 256;
/// Input of the first of them.
const FIRST: u32 = 1;

pub(crate) fn run(args: &RunArgs, environment: &Environment) -> Result<Outcome> {
    if args.list_devices {
        return doctor::list_devices();
    }
    let tests = tests(args)?;
    let repeat = repeat(args)?;
    if let Some(name) = &args.save_baseline {
        // A bad name is told before the work, not after it.
        baseline::path(&args.baselines, name)?;
    }
    let capacity = tests.iter().map(Test::capacity).max().unwrap_or(1);
    if tests.iter().any(|t| t.n_prompt > 0) {
        note("note: a prompt is processed token by token, one decode step each");
    }
    let (checkpoint, mut sessions) = sessions(args, capacity, environment)?;
    let setups = setups(&checkpoint, &sessions, args)?;
    let monitor = monitor(&sessions);

    let mut doubtful = false;
    // Before the first byte of the report: what is begun is ended.
    interrupt::watch();
    let mut reports = Reports::new(args)?;
    for (i, &test) in tests.iter().enumerate() {
        if args.progress {
            note(&format!("{}/{}: {test}", i + 1, tests.len()));
        }
        let before: Vec<EngineStats> = sessions.iter().map(DecodeSession::stats).collect();
        let measured = one(&mut sessions, test, repeat, monitor.as_ref(), environment);
        let (tokens, measurements) = match measured {
            // What was measured before is whole; its end is still to be printed.
            Err(Error::Interrupted) => break,
            other => other?,
        };
        let cut = measurements[0].repetitions.len() < repeat.times as usize;
        for m in &measurements {
            doubtful |= remarks(args, repeat, m);
        }
        if args.verbose {
            for (session, before) in sessions.iter().zip(&before) {
                remark_engine(test, tokens / sessions.len() as u64, *before, session.stats());
            }
        }
        let base = measurements[0].clone();
        for ((setup, session), m) in setups.iter().zip(&mut sessions).zip(measurements) {
            let pair = (setup.mode != setups[0].mode).then(|| Pair::of(&setups[0].mode, &base, &m));
            let beside =
                if cut || interrupt::requested() { None } else { overhead(session, test)? };
            reports.row(&Record::new(setup.clone(), session.plan(), m, pair, beside))?;
        }
        if cut {
            break;
        }
    }
    reports.end()?;
    if interrupt::requested() {
        return Ok(Outcome::Interrupted);
    }
    if doubtful {
        return Ok(Outcome::TooNoisy);
    }
    if let Some(name) = &args.save_baseline {
        let file = baseline::save(&args.baselines, name, &reports.kept)?;
        note(&format!("note: saved as {}", file.display()));
    }
    Ok(Outcome::Done)
}

fn repeat(args: &RunArgs) -> Result<Repeat> {
    if args.max_noise.is_some_and(|noise| !(noise.is_finite() && noise > 0.0)) {
        return Err(Error::Usage("--max-noise is a percentage above 0".to_owned()));
    }
    Ok(Repeat {
        times: args.repetitions,
        max_noise: args.max_noise,
        most: args.max_repetitions,
        warmup: !args.no_warmup,
        delay: Duration::from_secs(args.delay.into()),
    })
}

/// The session to measure; with `--mode both` that of the graph, then that of eager.
fn sessions(
    args: &RunArgs,
    capacity: u32,
    environment: &Environment,
) -> Result<(Checkpoint, Vec<DecodeSession>)> {
    let model = load::named(&args.model)?;
    let mut engine = args.engine.clone();
    let both = engine.mode == ModeArg::Both && environment.debug == DebugLevel::Off;
    if both {
        if engine.backend == Backend::Cpu {
            return Err(Error::Usage("the CPU reference has one mode, not both".to_owned()));
        }
        engine.mode = ModeArg::Graph;
    }
    let (checkpoint, first) = load::session(model, &engine, capacity, environment)?;
    let on_gpu = first.backend() == "cuda";
    let mut sessions = vec![first];
    if both && on_gpu {
        engine.mode = ModeArg::Eager;
        let options = load::options(&engine, capacity, environment)?;
        let options = SessionOptions { backend: BackendChoice::Cuda, ..options };
        sessions.push(load::open(&checkpoint, &options, environment)?);
    } else if both {
        note("note: the CPU reference has one mode: it is measured once");
    }
    Ok((checkpoint, sessions))
}

/// Reads the GPU while it is measured, if its driver's library is there.
fn monitor(sessions: &[DecodeSession]) -> Option<Monitor> {
    let device = sessions.first().filter(|s| s.backend() == "cuda")?.device();
    match nvml::sensor(&device.pci_bus_id) {
        Ok(sensor) => Some(Monitor::start(sensor)),
        Err(why) => {
            note(&format!("note: no clocks, throttling, power: NVML does not answer: {why}"));
            None
        }
    }
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

/// Measures a test on every session; also gives the tokens that it took, warm-up included.
fn one(
    sessions: &mut [DecodeSession],
    test: Test,
    repeat: Repeat,
    monitor: Option<&Monitor>,
    environment: &Environment,
) -> Result<(u64, Vec<Measurement>)> {
    let total = u64::from(test.steps()) * u64::from(repeat.times) * sessions.len() as u64;
    let bar = Progress::tokens(test.to_string(), environment, total);
    let mut tokens = 0;
    let mut progress = |is_measured| {
        tokens += 1;
        if is_measured {
            bar.step();
        }
    };
    let mut watch = Watch { stop: &interrupt::requested, progress: &mut progress, monitor };
    let mut decoders: Vec<&mut dyn Decoder> =
        sessions.iter_mut().map(|s| s as &mut dyn Decoder).collect();
    let measurements = measure(&mut decoders, test, repeat, &mut watch)?;
    Ok((tokens, measurements))
}

/// What a token of `test` costs beside its kernels, measured after it: nothing of it is in its times.
pub(crate) fn overhead(session: &mut DecodeSession, test: Test) -> Result<Option<Overhead>> {
    let tokens = test.steps().min(OVERHEAD_TOKENS);
    let measured = session.seek(test.depth, 0).and_then(|()| session.overhead(FIRST, tokens));
    match measured {
        Err(e) if !matches!(e, Error::Driver { fatal: true, .. }) => {
            // The test's own times are good all the same.
            note(&format!("warning: {test}: host time and relaunch gap are not known: {e}"));
            Ok(None)
        }
        measured => measured,
    }
}

/// What the rows say of each session.
fn setups(
    checkpoint: &Checkpoint,
    sessions: &[DecodeSession],
    args: &RunArgs,
) -> Result<Vec<Setup>> {
    let model = ModelFacts::of(checkpoint)?;
    let backend = sessions.first().map_or("", DecodeSession::backend);
    let ceiling = ceiling(backend, args.engine.device)?;
    let setup = |session: &DecodeSession| Setup {
        model: model.clone(),
        backend: backend.to_owned(),
        mode: session.mode().to_owned(),
        cpu: doctor::cpu_name(),
        gpu: if backend == "cuda" { session.device().name.clone() } else { String::new() },
        device: args.engine.device,
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        kv: session.plan().cache.kind.name().to_owned(),
        capacity: session.capacity(),
        ceiling_gb_s: ceiling,
        load: session.stats(),
    };
    Ok(sessions.iter().map(setup).collect())
}

/// Tells what a reader of the table must know, or with `-v` may; whether any of it is what the
/// user wants to be stopped by.
fn remarks(args: &RunArgs, repeat: Repeat, m: &Measurement) -> bool {
    let mut doubtful = false;
    let mut warn = |counts: bool, what: String| {
        note(&format!("warning: {}: {what}", m.test));
        doubtful |= counts;
    };
    if let Some(w) = m.warmup {
        let took = format!("{} warm-up rounds ({} tokens, {:.2} s)", w.rounds, w.tokens, w.seconds);
        if !w.stable {
            warn(args.strict, format!("not yet stable after {took}: expect wide spreads"));
        } else if args.verbose {
            note(&format!("{}: stable after {took}", m.test));
        }
    }
    if let Some(most) = repeat.max_noise {
        let n = m.repetitions.len();
        match m.noise_percent() {
            Some(noise) if noise <= most => {}
            Some(noise) => {
                let known = format!("known to ±{noise:.2} %, not {most} %");
                warn(true, format!("median {known}, after {n} repetitions"));
            }
            None => warn(true, format!("{n} repetitions are too few to know the noise")),
        }
    }
    if let Some(conditions) = m.conditions() {
        conditions.remarks().into_iter().for_each(|what| warn(args.strict, what));
    }
    if args.verbose {
        for o in m.outliers() {
            note(&format!("{}: outlier: {}", m.test, outlier(&o)));
        }
    }
    doubtful
}

fn outlier(o: &Outlier) -> String {
    let mut text =
        format!("{:.3} ms, repetition {}, position {}", o.ms, o.repetition + 1, o.position);
    if let Some(reading) = o.reading {
        let clock = reading.sm_mhz.map_or_else(|| "-".to_owned(), |mhz| format!("{mhz} MHz"));
        text.push_str(&format!(", {clock} {}", reading.throttle.reasons().join(", ")));
    }
    text
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

/// Where a report goes.
#[derive(Clone, Copy)]
enum Sink {
    Stdout,
    Stderr,
    /// Kept, to be saved as a baseline.
    Kept,
}

/// The report on stdout, and those on stderr and for a baseline where they were asked for.
struct Reports {
    reports: Vec<(Box<dyn Report>, Sink)>,
    kept: Vec<u8>,
}

impl Reports {
    fn new(args: &RunArgs) -> Result<Self> {
        let mut reports = vec![(args.output.format().report(), Sink::Stdout)];
        reports.extend(args.output_err.map(|format| (format.format().report(), Sink::Stderr)));
        if args.save_baseline.is_some() {
            reports.push((Format::Json.report(), Sink::Kept));
        }
        let mut new = Self { reports, kept: Vec::new() };
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
        for (report, sink) in &mut self.reports {
            // A row is written in one go: an interrupt leaves no half of it.
            let mut text = Vec::new();
            print(report.as_mut(), &mut text).map_err(failed)?;
            match sink {
                Sink::Stdout => {
                    let mut out = io::stdout().lock();
                    out.write_all(&text).and_then(|()| out.flush()).map_err(failed)?;
                }
                Sink::Stderr => drop(io::stderr().write_all(&text)),
                Sink::Kept => self.kept.extend(text),
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
