//! What the device was doing while it was measured: clocks, throttling, temperature, power.
//!
//! A [`Sensor`] is read by a thread of its own every [`EVERY`]; a repetition takes its part of the
//! readings as a [`Span`]. Without a sensor there are no spans, and nothing else changes.

use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Time between two readings: rare enough that reading disturbs nothing that is measured.
pub const EVERY: Duration = Duration::from_millis(20);
/// Energy is told of spans that are at least so long: its counter moves about ten times a second.
const ENERGY_SPAN: Duration = Duration::from_millis(500);
/// (highest − lowest) / highest clock beyond which a run is called drifting.
const DRIFT: f64 = 0.03;

/// Why the device holds its clocks down: bits, as NVML's `clocksEventReasons` has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttle(pub u64);

impl Throttle {
    /// Reasons that slow a run down against the same run on a cool, unlimited device. What is not
    /// here is no event: idling, and limits that someone has set.
    const REASONS: [(u64, &str); 6] = [
        (0x04, "power cap"),
        (0x08, "hardware slowdown"),
        (0x10, "sync boost"),
        (0x20, "thermal (software)"),
        (0x40, "thermal (hardware)"),
        (0x80, "power brake"),
    ];

    /// The reasons that count, in words.
    pub fn reasons(self) -> Vec<&'static str> {
        Self::REASONS.iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, name)| *name).collect()
    }

    /// Whether any counts.
    pub fn is_active(self) -> bool {
        !self.reasons().is_empty()
    }
}

/// The device at one moment; `None` is what it does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Reading {
    /// Clock of the multiprocessors, MHz.
    pub sm_mhz: Option<u32>,
    /// Clock of the memory, MHz.
    pub memory_mhz: Option<u32>,
    /// Temperature of the GPU, °C.
    pub celsius: Option<u32>,
    /// Power of the board, W.
    pub watts: Option<f64>,
    /// Energy since the driver was loaded, J.
    pub joules: Option<f64>,
    /// Why clocks are held down.
    pub throttle: Throttle,
}

/// What can be read; a table in tests.
pub trait Sensor: Send {
    /// The device now.
    fn read(&mut self) -> Reading;
}

/// A reading and when it was taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Since the span began; negative before it.
    pub at_ms: f64,
    /// The reading.
    pub reading: Reading,
}

/// The readings of one repetition.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Span {
    /// Those between its begin and its end; the nearest one where none is.
    pub samples: Vec<Sample>,
    /// Energy from begin to end, J, by interpolating the counter; `None` for a short span.
    pub joules: Option<f64>,
}

impl Span {
    /// The reading nearest to `at_ms` after the begin.
    pub fn nearest(&self, at_ms: f64) -> Option<&Sample> {
        let far = |s: &&Sample| (s.at_ms - at_ms).abs();
        self.samples.iter().min_by(|a, b| far(a).total_cmp(&far(b)))
    }

    /// Mean clock of the multiprocessors, MHz.
    pub fn sm_mhz(&self) -> Option<f64> {
        let clocks: Vec<f64> =
            self.samples.iter().filter_map(|s| s.reading.sm_mhz).map(f64::from).collect();
        (!clocks.is_empty()).then(|| super::stats::mean(&clocks))
    }

    fn json(&self) -> Value {
        let column = |of: fn(&Reading) -> Value| -> Vec<Value> {
            self.samples.iter().map(|s| of(&s.reading)).collect()
        };
        json!({
            "at_ms": self.samples.iter().map(|s| s.at_ms).collect::<Vec<_>>(),
            "sm_mhz": column(|r| json!(r.sm_mhz)),
            "memory_mhz": column(|r| json!(r.memory_mhz)),
            "celsius": column(|r| json!(r.celsius)),
            "watts": column(|r| json!(r.watts)),
            "throttle": column(|r| json!(r.throttle.reasons())),
            "joules": self.joules,
        })
    }
}

/// What the spans of a test say together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditions {
    /// Lowest, mean and highest clock of the multiprocessors, MHz.
    pub sm_mhz: Option<(f64, f64, f64)>,
    /// Highest temperature, °C.
    pub celsius: Option<u32>,
    /// Mean power, W.
    pub watts: Option<f64>,
    /// Energy of all spans, J; `None` unless every span has its own.
    pub joules: Option<f64>,
    /// Every reason to throttle that was seen.
    pub throttle: Throttle,
}

impl Conditions {
    /// Sums up `spans`; `None` where there is none.
    pub fn of<'a>(spans: impl Iterator<Item = &'a Span> + Clone) -> Option<Self> {
        spans.clone().next()?;
        let readings = || spans.clone().flat_map(|s| &s.samples).map(|s| &s.reading);
        let clocks: Vec<f64> = readings().filter_map(|r| r.sm_mhz).map(f64::from).collect();
        let lowest = clocks.iter().copied().reduce(f64::min);
        let highest = clocks.iter().copied().reduce(f64::max);
        let watts: Vec<f64> = readings().filter_map(|r| r.watts).collect();
        let joules: Option<Vec<f64>> = spans.clone().map(|s| s.joules).collect();
        Some(Self {
            sm_mhz: lowest.zip(highest).map(|(l, h)| (l, super::stats::mean(&clocks), h)),
            celsius: readings().filter_map(|r| r.celsius).max(),
            watts: (!watts.is_empty()).then(|| super::stats::mean(&watts)),
            joules: joules.map(|j| j.iter().sum()),
            throttle: Throttle(readings().fold(0, |bits, r| bits | r.throttle.0)),
        })
    }

    /// Whether the clock moved by more than 3 % while it was measured.
    pub fn drifts(&self) -> bool {
        self.sm_mhz.is_some_and(|(lowest, _, highest)| highest - lowest > DRIFT * highest)
    }

    /// What a reader must know before trusting the figures, in words; empty when all is well.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = Vec::new();
        if self.throttle.is_active() {
            remarks.push(format!("throttled ({})", self.throttle.reasons().join(", ")));
        }
        if let (true, Some((lowest, _, highest))) = (self.drifts(), self.sm_mhz) {
            remarks.push(format!("clock drifted from {highest:.0} to {lowest:.0} MHz"));
        }
        remarks
    }

    /// As a result row has it, with the readings of each repetition.
    pub fn json<'a>(&self, spans: impl Iterator<Item = &'a Span>) -> Value {
        let (lowest, mean, highest) = match self.sm_mhz {
            Some((l, m, h)) => (Some(l), Some(m), Some(h)),
            None => (None, None, None),
        };
        json!({
            "sm_mhz_min": lowest, "sm_mhz_mean": mean, "sm_mhz_max": highest,
            "celsius_max": self.celsius, "watts_mean": self.watts, "joules": self.joules,
            "throttle": self.throttle.reasons(), "drifting": self.drifts(),
            "repetitions": spans.map(Span::json).collect::<Vec<_>>(),
        })
    }
}

type Log = Arc<Mutex<Vec<(Instant, Reading)>>>;

/// A thread that reads a sensor until it is dropped.
pub struct Monitor {
    log: Log,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Begins to read `sensor`; the first reading is there when this returns.
    pub fn start(mut sensor: Box<dyn Sensor>) -> Self {
        let log: Log = Arc::new(Mutex::new(vec![(Instant::now(), sensor.read())]));
        let (stop, stopped) = mpsc::channel();
        let writer = log.clone();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                let reading = sensor.read();
                writer.lock().push((Instant::now(), reading));
            }
        });
        Self { log, stop: Some(stop), thread: Some(thread) }
    }

    /// The readings from `from` to `to`. What was read before `from` is forgotten.
    pub fn span(&self, from: Instant, to: Instant) -> Span {
        // The counter's value at `to` lies between two readings: wait for the second.
        // Naps are counted, not timed: the clock may have gone back.
        for _ in 0..50 {
            if self.log.lock().last().is_none_or(|(at, _)| *at >= to) {
                break;
            }
            std::thread::sleep(EVERY / 10);
        }
        let mut log = self.log.lock();
        let span = span(&log, from, to);
        let keep = log.partition_point(|(at, _)| *at < from).saturating_sub(1);
        log.drain(..keep);
        span
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A sensor that panicked has told so on stderr.
            let _ = thread.join();
        }
    }
}

fn span(log: &[(Instant, Reading)], from: Instant, to: Instant) -> Span {
    let ms = |at: Instant| match at.checked_duration_since(from) {
        Some(after) => after.as_secs_f64() * 1e3,
        None => -(from - at).as_secs_f64() * 1e3,
    };
    let all: Vec<Sample> =
        log.iter().map(|(at, reading)| Sample { at_ms: ms(*at), reading: *reading }).collect();
    let length = ms(to);
    let mut samples: Vec<Sample> =
        all.iter().filter(|s| (0.0..=length).contains(&s.at_ms)).copied().collect();
    if samples.is_empty() {
        let middle = Span { samples: all.clone(), joules: None };
        samples.extend(middle.nearest(length / 2.0));
    }
    let long = to.saturating_duration_since(from) >= ENERGY_SPAN;
    let energy = |at| interpolate(&all, at);
    let joules = if long { energy(length).zip(energy(0.0)).map(|(e, b)| e - b) } else { None };
    Span { samples, joules }
}

/// The energy counter at `at_ms`, on the line between the readings next to it.
fn interpolate(samples: &[Sample], at_ms: f64) -> Option<f64> {
    let (before, after): (Vec<&Sample>, Vec<&Sample>) =
        samples.iter().partition(|s| s.at_ms <= at_ms);
    let (a, b) = (before.last()?, after.first()?);
    let (from, to) = (a.reading.joules?, b.reading.joules?);
    Some(from + (to - from) * (at_ms - a.at_ms) / (b.at_ms - a.at_ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(sm_mhz: u32, joules: f64) -> Reading {
        Reading { sm_mhz: Some(sm_mhz), joules: Some(joules), ..Reading::default() }
    }

    /// A reading every 20 ms, 10 J apart.
    fn log(begin: Instant, clocks: &[u32]) -> Vec<(Instant, Reading)> {
        let at = |i: usize| begin + EVERY * i as u32;
        (0..).zip(clocks).map(|(i, c)| (at(i), reading(*c, 10.0 * i as f64))).collect()
    }

    #[test]
    fn a_span_holds_its_readings_and_the_energy_between_its_ends() {
        let begin = Instant::now();
        let log = log(begin, &[1000; 40]);
        let from = begin + Duration::from_millis(30);
        let s = span(&log, from, from + Duration::from_millis(605));
        assert_eq!((s.samples.len(), s.samples[0].at_ms.round()), (30, 10.0));
        assert!((s.joules.unwrap() - 302.5).abs() < 1e-6, "{s:?}");
        let short = span(&log, from, from + Duration::from_millis(5));
        assert_eq!((short.samples.len(), short.joules), (1, None), "the nearest reading stands in");
    }

    #[test]
    fn a_throttled_or_drifting_run_is_marked_and_a_quiet_one_is_not() {
        let begin = Instant::now();
        let to = begin + EVERY * 9;
        let remarks = |log: &[(Instant, Reading)]| {
            let spans = [span(log, begin, to)];
            Conditions::of(spans.iter()).unwrap().remarks()
        };
        let quiet = log(begin, &[1980, 1980, 1965, 1980]);
        assert_eq!(remarks(&quiet), [""; 0]);
        assert_eq!(remarks(&log(begin, &[1980, 1700])), ["clock drifted from 1980 to 1700 MHz"]);
        let mut hot = quiet;
        // Idle is no reason that counts.
        hot[1].1.throttle = Throttle(0x01);
        hot[2].1.throttle = Throttle(0x20);
        assert_eq!(remarks(&hot), ["throttled (thermal (software))"]);
        assert_eq!(Conditions::of([].iter()), None);
    }

    struct Counting(u32);

    impl Sensor for Counting {
        fn read(&mut self) -> Reading {
            self.0 += 1;
            reading(self.0, 0.0)
        }
    }

    #[test]
    fn a_monitor_reads_until_it_is_dropped() {
        let monitor = Monitor::start(Box::new(Counting(0)));
        let from = Instant::now();
        std::thread::sleep(EVERY * 4);
        let span = monitor.span(from, Instant::now());
        let clocks: Vec<_> = span.samples.iter().map(|s| s.reading.sm_mhz.unwrap()).collect();
        assert!(clocks.windows(2).all(|w| w[1] == w[0] + 1) && !clocks.is_empty(), "{clocks:?}");
        let log = monitor.log.clone();
        drop(monitor);
        assert_eq!(Arc::strong_count(&log), 1, "the thread is gone");
    }
}
