//! A result row and its columns: the one description that every format prints from.
//!
//! Names, order and types are those of llama-bench (llama.cpp 0.5.0), so that its scripts read
//! our files; the last two stood in older programs and are what older scripts ask for. What
//! has no meaning here holds llama-bench's default, never nothing: scripts join rows on it.
//!
//! What is ours stands under `x`; what is not known is null.
//!
//! | key | what |
//! |---|---|
//! | `test` `backend` `mode` | the test as tables name it; `cuda` or `cpu`; `graph`, `eager` or `reference` |
//! | `capacity` | positions of the cache |
//! | `clock` | whose clock the gaps are on: `device` or `host` |
//! | `latency` | `n` gaps between tokens: their mean, p50, p90, p95, p99 (from 100 gaps on) and max, ms; how many are outliers |
//! | `bytes_per_token` | weights and cache that a token moves at least, mean over the test's positions |
//! | `gb_per_s` `ceiling_gb_per_s` `percent_of_ceiling` | these bytes by the mean speed; the read speed measured in the same run; the one in % of the other |
//! | `joules_per_token` | of the board, where a repetition lasts half a second or more |
//! | `load` | seconds for `weights_s`, `kernels_s` (the driver's compilation) and `capture_s`: in no sample |
//! | `memory` | bytes on the device: `weights`, `kv`, `workspace`, `other`, `planned` (their sum), `taken` (by how much the driver's free memory fell while the session was made), and `excess_percent` of the one over the other |
//! | `overhead` | of a run of its own of `tokens` tokens: `host_us`, the issuing thread's time a token without what it polls for one; `relaunch_us`, from the end of a token's graph to the begin of the next one's |
//! | `ttft_ms` | prompt in, first token out, on the host's clock, median |
//! | `warmup` | `rounds`, `tokens` and `seconds` until `stable` |
//! | `noise_percent` | half the 95 % bootstrap interval of the median, % of it |
//! | `pair` | `ratio` of the medians a token `against` the other mode, its interval (`low`, `high`, `level`), `pairs` |
//! | `outliers` | each with `repetition`, `position`, `ms`, `at_ms`, the clock `sm_mhz` and `throttle` reasons then |
//! | `telemetry` | clocks, temperature, power, energy and throttling in all, and every reading by repetition |
//! | `first_token_ns` `token_gaps_ns` | by repetition: until the first step's token; every gap between two tokens |

use super::bootstrap;
use super::compare::{LEVEL, Ratio};
use super::measure::{Measurement, Outlier, Test};
use super::model::ModelFacts;
use super::roofline;
use super::stats::{Sorted, Summary, mean, standard_deviation};
use crate::plan::DecodePlan;
use crate::session::{EngineStats, MemoryUse, Overhead};
use serde_json::{Value, json};

/// Type of a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// Integer.
    Integer,
    /// Boolean: `true` in JSON, 0 or 1 elsewhere.
    Bool,
    /// Floating point.
    Real,
}

/// A column.
pub struct Field {
    /// Name in files.
    pub name: &'static str,
    /// Type.
    pub kind: Kind,
    /// The row's value, of type `kind`.
    pub value: fn(&Record) -> Value,
}

/// What is the same for all rows of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The model.
    pub model: ModelFacts,
    /// `cuda` or `cpu`.
    pub backend: String,
    /// `graph`, `eager` or `reference`.
    pub mode: String,
    /// Name of the processor.
    pub cpu: String,
    /// Name of the GPU; empty on the CPU.
    pub gpu: String,
    /// Device ordinal.
    pub device: u32,
    /// Threads of the CPU reference, and of loading.
    pub threads: usize,
    /// Element type of the key/value cache.
    pub kv: String,
    /// Positions of the cache.
    pub capacity: u32,
    /// Measured read speed of the memory, GB/s.
    pub ceiling_gb_s: Option<f64>,
    /// Times of loading, apart from everything that is measured.
    pub load: EngineStats,
}

/// A row's mode against another one's, their repetitions interleaved.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The other mode.
    pub against: String,
    /// This one's median time a token over the other's, pair by pair: the median of the ratios.
    pub ratio: Ratio,
    /// Pairs.
    pub n: usize,
}

impl Pair {
    /// `new` against `base`, the repetitions of which were measured in turn.
    pub fn of(against: &str, base: &Measurement, new: &Measurement) -> Self {
        let pairs = base.medians_ms().into_iter().zip(new.medians_ms());
        let ratios: Vec<f64> = pairs.map(|(base, new)| new / base).collect();
        let value = Sorted::new(ratios.iter().copied()).median().unwrap_or(f64::NAN);
        let interval = bootstrap::of_median(&ratios, LEVEL);
        let (against, n) = (against.to_owned(), ratios.len());
        Self { against, ratio: Ratio { value, interval }, n }
    }
}

/// A measured test with all that a row says.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// The run.
    pub setup: Setup,
    /// When the test ended, `2025-04-24T11:57:10Z`.
    pub test_time: String,
    /// The samples.
    pub measurement: Measurement,
    /// Bytes a token to and from device memory, mean over the test's positions.
    pub bytes_per_token: f64,
    /// Against the other mode, where both were asked for.
    pub pair: Option<Pair>,
    /// What a token costs beside its kernels.
    pub overhead: Option<Overhead>,
}

impl Record {
    /// The row of a measurement that ends now.
    pub fn new(
        setup: Setup,
        plan: &DecodePlan,
        measurement: Measurement,
        pair: Option<Pair>,
        overhead: Option<Overhead>,
    ) -> Self {
        let Test { depth, .. } = measurement.test;
        Self {
            test_time: utc(std::time::SystemTime::now()),
            bytes_per_token: roofline::bytes_per_token(plan, depth, measurement.test.steps()),
            pair,
            overhead,
            setup,
            measurement,
        }
    }

    /// Whether the GPU did it.
    pub fn on_gpu(&self) -> bool {
        self.setup.backend == "cuda"
    }

    /// Mean tokens a second over the repetitions.
    pub fn tokens_per_second(&self) -> f64 {
        mean(&self.measurement.tokens_per_second())
    }

    /// Of the tokens' times, ms.
    pub fn latency(&self) -> Option<Summary> {
        Summary::of(&self.measurement.token_ms())
    }

    /// Bandwidth that the mean speed amounts to, GB/s.
    pub fn gigabytes_per_second(&self) -> f64 {
        roofline::gigabytes_per_second(self.bytes_per_token, self.tokens_per_second())
    }

    /// Of the measured read ceiling, %.
    pub fn percent_of_ceiling(&self) -> Option<f64> {
        self.setup.ceiling_gb_s.map(|ceiling| 100.0 * self.gigabytes_per_second() / ceiling)
    }

    /// Energy a token, J; `None` without a sensor, and for repetitions too short for its counter.
    pub fn joules_per_token(&self) -> Option<f64> {
        let tokens = self.measurement.repetitions.len() as f64;
        let tokens = tokens * f64::from(self.measurement.test.steps());
        self.measurement.conditions()?.joules.map(|joules| joules / tokens)
    }

    /// Median time to first token, ms: prompt in, first token out, on the host's clock.
    pub fn ttft_ms(&self) -> Option<f64> {
        let all = self.measurement.repetitions.iter().map(|r| r.ttft_ns as f64 / 1e6);
        Sorted::new(all).median()
    }

    fn repetition_ns(&self) -> Vec<f64> {
        self.measurement.repetitions.iter().map(|r| r.ns as f64).collect()
    }

    /// The row as llama-bench's JSON has it: the columns, the samples a repetition, then what is
    /// ours under `x`.
    pub fn json(&self) -> Value {
        let columns = FIELDS.iter().map(|f| (f.name.to_owned(), (f.value)(self)));
        let mut row: serde_json::Map<_, _> = columns.collect();
        let repetitions = &self.measurement.repetitions;
        let ns: Vec<u64> = repetitions.iter().map(|r| r.ns).collect();
        row.insert("samples_ns".to_owned(), json!(ns));
        row.insert("samples_ts".to_owned(), json!(self.measurement.tokens_per_second()));
        row.insert("x".to_owned(), self.extension());
        Value::Object(row)
    }

    fn extension(&self) -> Value {
        let latency = self.latency().map(|s| {
            json!({
                "n": s.n, "mean_ms": s.mean, "p50_ms": s.p50, "p90_ms": s.p90, "p95_ms": s.p95,
                "p99_ms": s.p99, "max_ms": s.max, "outliers": s.outliers,
            })
        });
        let warmup = self.measurement.warmup.map(|w| {
            json!({
                "rounds": w.rounds, "tokens": w.tokens, "seconds": w.seconds, "stable": w.stable,
            })
        });
        let m = &self.measurement;
        let gaps: Vec<&[u64]> = m.repetitions.iter().map(|r| r.gaps_ns.as_slice()).collect();
        let first: Vec<u64> = m.repetitions.iter().map(|r| r.first_ns).collect();
        let load = &self.setup.load;
        let pair = self.pair.as_ref().map(|p| {
            json!({
                "against": p.against, "ratio": p.ratio.value, "low": p.ratio.interval.0,
                "high": p.ratio.interval.1, "level": LEVEL, "pairs": p.n,
            })
        });
        json!({
            "test": self.measurement.test.to_string(),
            "backend": self.setup.backend,
            "mode": self.setup.mode,
            "capacity": self.setup.capacity,
            "clock": if self.measurement.device_clock { "device" } else { "host" },
            "latency": latency,
            "bytes_per_token": self.bytes_per_token,
            "gb_per_s": self.gigabytes_per_second(),
            "ceiling_gb_per_s": self.setup.ceiling_gb_s,
            "percent_of_ceiling": self.percent_of_ceiling(),
            "joules_per_token": self.joules_per_token(),
            "load": {
                "weights_s": load.load_seconds, "kernels_s": load.jit_seconds,
                "capture_s": load.capture_seconds,
            },
            "memory": load.memory.map(|m| memory(&m)),
            "overhead": self.overhead.map(|o| {
                json!({"tokens": o.tokens, "host_us": o.host_us, "relaunch_us": o.relaunch_us})
            }),
            "ttft_ms": self.ttft_ms(),
            "warmup": warmup,
            "noise_percent": m.noise_percent(),
            "pair": pair,
            "outliers": m.outliers().iter().map(outlier).collect::<Vec<_>>(),
            "telemetry": m.conditions().map(|c| c.json(m.spans())),
            "first_token_ns": first,
            "token_gaps_ns": gaps,
        })
    }
}

fn memory(m: &MemoryUse) -> Value {
    json!({
        "weights": m.weights, "kv": m.kv, "workspace": m.workspace, "other": m.other,
        "planned": m.planned(), "taken": m.taken, "excess_percent": m.excess_percent(),
    })
}

fn outlier(o: &Outlier) -> Value {
    json!({
        "repetition": o.repetition, "position": o.position, "ms": o.ms, "at_ms": o.at_ms,
        "sm_mhz": o.reading.and_then(|r| r.sm_mhz),
        "throttle": o.reading.map(|r| r.throttle.reasons()),
    })
}

macro_rules! fields {
    ($($name:ident: $kind:ident = $value:expr;)*) => {
        [$(Field { name: stringify!($name), kind: Kind::$kind, value: $value }),*]
    };
}

/// The columns, in llama-bench's order.
pub const FIELDS: [Field; 44] = fields! {
    build_commit: Text = |_| json!(BUILD_COMMIT);
    build_number: Integer = |_| json!(0);
    cpu_info: Text = |r| json!(r.setup.cpu);
    gpu_info: Text = |r| json!(r.setup.gpu);
    backends: Text = |r| json!(r.setup.backend.to_uppercase());
    model_filename: Text = |r| json!(r.setup.model.filename);
    model_type: Text = |r| json!(r.setup.model.kind);
    model_size: Integer = |r| json!(r.setup.model.bytes);
    model_n_params: Integer = |r| json!(r.setup.model.parameters);
    n_batch: Integer = |_| json!(1);
    n_ubatch: Integer = |_| json!(1);
    n_threads: Integer = |r| json!(r.setup.threads);
    cpu_mask: Text = |_| json!("0x0");
    cpu_strict: Bool = |_| json!(false);
    poll: Integer = |_| json!(50);
    type_k: Text = |r| json!(r.setup.kv);
    type_v: Text = |r| json!(r.setup.kv);
    n_gpu_layers: Integer = |r| json!(if r.on_gpu() { 99 } else { 0 });
    n_cpu_moe: Integer = |_| json!(0);
    split_mode: Text = |_| json!("none");
    main_gpu: Integer = |r| json!(r.setup.device);
    no_kv_offload: Bool = |_| json!(false);
    flash_attn: Integer = |_| json!(1);
    devices: Text = |_| json!("auto");
    tensor_split: Text = |_| json!("0.00");
    tensor_buft_overrides: Text = |_| json!("none");
    load_mode: Text = |_| json!("none");
    lazy_mode: Text = |_| json!("off");
    embeddings: Bool = |_| json!(false);
    no_op_offload: Integer = |_| json!(0);
    no_host: Bool = |_| json!(false);
    repack: Bool = |_| json!(true);
    fit_target: Integer = |_| json!(0);
    fit_min_ctx: Integer = |_| json!(0);
    n_prompt: Integer = |r| json!(r.measurement.test.n_prompt);
    n_gen: Integer = |r| json!(r.measurement.test.n_gen);
    n_depth: Integer = |r| json!(r.measurement.test.depth);
    test_time: Text = |r| json!(r.test_time);
    avg_ns: Integer = |r| json!(mean(&r.repetition_ns()) as u64);
    stddev_ns: Integer = |r| json!(standard_deviation(&r.repetition_ns()) as u64);
    avg_ts: Real = |r| json!(r.tokens_per_second());
    stddev_ts: Real = |r| json!(standard_deviation(&r.measurement.tokens_per_second()));
    use_mmap: Bool = |_| json!(false);
    use_direct_io: Bool = |_| json!(false);
};

/// The first eight letters of the commit that was built (`build.rs`), eight others where it is not
/// known: scripts want commits of one length.
pub const BUILD_COMMIT: &str = match option_env!("DECODE_GRAPH_COMMIT") {
    Some(commit) => commit,
    None => "unknown0",
};

/// A time as `2025-04-24T11:57:10Z`.
fn utc(time: std::time::SystemTime) -> String {
    let seconds = time.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, so that a leap day ends a year; eras of 400 years are all alike
    // (Howard Hinnant, "chrono-compatible low-level date algorithms").
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day_of_month:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::utc;
    use crate::bench::report::tests::record;
    use std::time::{Duration, UNIX_EPOCH};

    #[test]
    fn every_key_of_ours_is_explained() {
        let rows = include_str!("fields.rs").lines().filter(|l| l.starts_with("//! | `"));
        let keys = rows.filter_map(|row| row.split(" | ").nth(1)).flat_map(|keys| keys.split(' '));
        let mut named: Vec<&str> = keys.map(|key| key.trim_matches('`')).collect();
        let x = record().extension();
        let mut keys: Vec<&str> = x.as_object().unwrap().keys().map(String::as_str).collect();
        named.sort_unstable();
        keys.sort_unstable();
        assert_eq!(named, keys);
    }

    #[test]
    fn times_are_written_in_utc() {
        let at = |s| utc(UNIX_EPOCH + Duration::from_secs(s));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        let before = UNIX_EPOCH - Duration::from_secs(86_400);
        assert_eq!(utc(before), at(0), "a clock that was set back before time began");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_745_495_830), "2025-04-24T11:57:10Z");
    }
}
