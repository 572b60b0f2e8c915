//! A profile as trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

use super::Profile;
use serde_json::{Value, json};

/// The timeline of `profile` in the Trace Event Format: a track of tokens above one of steps, times
/// in microseconds; `ceiling` is the device's read ceiling, GB/s.
///
/// Source: Google, "Trace Event Format", complete events (`ph` X) and metadata (`ph` M).
pub fn chrome_trace(profile: &Profile, model: &str, ceiling: Option<f64>) -> Value {
    const TOKENS: u32 = 1;
    const STEPS: u32 = 2;
    let named = |what: &str, track: u32, name: &str| json!({"ph": "M", "pid": 1, "tid": track, "name": what, "args": {"name": name}});
    let mut events = vec![
        named("process_name", TOKENS, &format!("decode-bench: {model}")),
        named("thread_name", TOKENS, "token"),
        named("thread_name", STEPS, "step"),
    ];
    let event = |track: u32, name: &str, start: f64, us: f64, args: Value| {
        json!({
            "ph": "X", "pid": 1, "tid": track, "name": name, "cat": "decode",
            "ts": start, "dur": us, "args": args,
        })
    };
    let tokens = profile.timeline.last().map_or(0, |s| s.token + 1);
    for token in 0..tokens {
        let mut spans = profile.timeline.iter().filter(|s| s.token == token);
        if let Some(first) = spans.next() {
            let last = spans.next_back().unwrap_or(first);
            let us = last.start_us + last.us - first.start_us;
            events.push(event(TOKENS, "token", first.start_us, us, json!({"index": token})));
        }
    }
    for span in &profile.timeline {
        let Some(step) = profile.steps.get(span.step) else { continue };
        let speed = step.gb_per_s();
        let args = json!({
            "kernel": step.kernel,
            "bytes": step.bytes,
            "mean_us": step.time_us,
            "gb_per_s": speed,
            "percent_of_ceiling": speed.zip(ceiling).map(|(speed, c)| 100.0 * speed / c),
        });
        events.push(event(STEPS, &step.label, span.start_us, span.us, args));
    }
    json!({"traceEvents": events, "displayTimeUnit": "ns"})
}
