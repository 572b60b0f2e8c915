//! `profile`: where a token's time goes, step by step, reconciled with the plain replay.

use crate::Outcome;
use crate::args::{ProfileArgs, ProfileFormat};
use crate::environment::Environment;
use crate::load;
use crate::output::print;
use decode_graph::bench::measure::{Repeat, Test, Watch, measure};
use decode_graph::bench::profile::Profile;
use decode_graph::bench::stats::Sorted;
use decode_graph::error::Result;
use decode_graph::session::SessionOptions;
use serde_json::json;
use std::fmt::Write;
use std::time::Duration;

pub(crate) fn run(args: &ProfileArgs, environment: &Environment) -> Result<Outcome> {
    let model = load::required(&args.model)?;
    let capacity = args.depth + args.n_gen.max(args.tokens) + 1;
    // Only the persistent kernel can look at its own steps.
    let base =
        SessionOptions { persistent: true, ..load::options(&args.engine, capacity, environment)? };
    let test = Test { n_prompt: 0, n_gen: args.n_gen, depth: args.depth };
    let repeat = Repeat { times: 3, max_noise: None, most: 3, warmup: true, delay: Duration::ZERO };
    let plain = {
        let mut session = load::open(&model, &base, environment)?;
        let mut watch =
            Watch { stop: &crate::interrupt::requested, progress: &mut || (), monitor: None };
        let all = measure(&mut [&mut session], test, repeat, &mut watch)?;
        let times = all.iter().flat_map(|m| m.token_ms());
        Sorted::new(times).median().unwrap_or(0.0) * 1e3
    };
    let mut session = load::open(&model, &SessionOptions { trace: true, ..base }, environment)?;
    session.seek(args.depth, 1)?;
    let profile = Profile::take(&mut session, 1, args.tokens)?;
    let ceiling = decode_graph::bench::ceiling(session.backend(), args.engine.device)?;
    print(&match args.output {
        ProfileFormat::Md => table(&profile, plain, ceiling),
        ProfileFormat::Json => format!("{:#}\n", value(&profile, plain, ceiling)),
    })?;
    Ok(Outcome::Done)
}

/// GB/s of `bytes` in `us`.
fn rate(bytes: u64, us: f64) -> f64 {
    if us > 0.0 { bytes as f64 / us / 1e3 } else { 0.0 }
}

fn table(profile: &Profile, plain: f64, ceiling: Option<f64>) -> String {
    let mut out = String::from(
        "| op | steps | us each | us | share % | GB/s | % ceiling | cycles staged | first | rest | starved | asking |\n\
         |---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
    );
    let mut sum = 0.0;
    for (n, s) in profile.by_op() {
        let gb_s = rate(s.bytes, s.time_us);
        sum += s.time_us;
        let _ = writeln!(
            out,
            "| {} | {n} | {:.2} | {:.1} | {:.1} | {gb_s:.0} | {:.1} | {:.0} | {:.0} | {:.0} | {:.0} | {:.0} |",
            s.op,
            s.time_us / n as f64,
            s.time_us,
            100.0 * s.time_us / profile.token_us,
            ceiling.map_or(0.0, |c| 100.0 * gb_s / c),
            s.staged,
            s.first,
            s.rest,
            s.starved,
            s.asking
        );
    }
    let _ = writeln!(
        out,
        "\nsum of steps {sum:.1} us, profiled token {:.1} us, plain replay p50 {plain:.1} us ({:+.1}%)",
        profile.token_us,
        100.0 * (profile.token_us / plain - 1.0)
    );
    out
}

fn value(profile: &Profile, plain: f64, ceiling: Option<f64>) -> serde_json::Value {
    let steps: Vec<_> = profile
        .steps
        .iter()
        .map(|s| {
            json!({
                "label": s.label, "kernel": s.op, "time_us": s.time_us, "bytes": s.bytes,
                "gb_s": rate(s.bytes, s.time_us),
                "cycles": {"staged": s.staged, "first": s.first, "rest": s.rest, "starved": s.starved, "asking": s.asking},
            })
        })
        .collect();
    json!({
        "steps": steps, "tokens": profile.tokens, "token_us": profile.token_us,
        "replay_p50_us": plain, "ceiling_gb_s": ceiling,
    })
}
