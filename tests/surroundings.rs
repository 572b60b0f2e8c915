//! What comes to a process from outside: a fork, another library's context, a signal while a model is
//! loaded, clocks that go back. Each is an error that says so, and none is a wrong figure or a hang.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(unsafe_code, reason = "entry points of the C library, and one that stands in for one")]

mod command_line;
mod fake_driver;
mod small_model;

use command_line::command;
use decode_graph::bench::measure::{Measurement, Repeat, Test, Watch, measure};
use decode_graph::bench::profile::Profile;
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use fake_driver::{Fake, Fault, Live};
use small_model::SmallModel;
use std::cell::Cell;
use std::ffi::{c_int, c_long, c_uint};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(child: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(code: c_int) -> !;
    fn alarm(seconds: c_uint) -> c_uint;
    fn syscall(number: c_long, ...) -> c_long;
}

fn small() -> Checkpoint {
    SmallModel::new("llama", QuantFormat::Q8_0).open(tempfile::tempdir().unwrap().path())
}

fn on(backend: BackendChoice) -> SessionOptions {
    SessionOptions { backend, capacity: 24, ..SessionOptions::default() }
}

fn session(checkpoint: &Checkpoint, options: &SessionOptions) -> Result<DecodeSession> {
    DecodeSession::new(checkpoint, options, &mut |_, _| {})
}

// ---------------------------------------------------------------------------- forks and contexts

/// What `work` says in a child of this process; a panic there is told as one.
fn in_a_child(work: impl FnOnce() -> String) -> String {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    // SAFETY: the child runs `work` on the one thread that it has, and leaves by `_exit`.
    let child = unsafe { fork() };
    if child == 0 {
        // SAFETY: always sound; ends a child that hangs.
        unsafe { alarm(20) };
        let work = std::panic::AssertUnwindSafe(work);
        let text = std::panic::catch_unwind(work).unwrap_or_else(|_| "a panic".to_owned());
        let _ = std::fs::write(&said, text);
        // SAFETY: always sound; nothing of the parent's is run or flushed.
        unsafe { _exit(0) };
    }
    assert!(child > 0, "{}", std::io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: `status` is a place to write to.
    assert_eq!(unsafe { waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0, "the child did not end by itself");
    std::fs::read_to_string(said).unwrap()
}

#[test]
fn a_forked_child_is_refused_without_a_driver_call_and_its_parent_goes_on() {
    let fake = Fake::new();
    let checkpoint = small();
    let mut expected = session(&checkpoint, &on(BackendChoice::Cpu)).unwrap();
    let mut held = Some(session(&checkpoint, &on(BackendChoice::Cuda)).unwrap());
    assert_eq!(held.as_mut().unwrap().feed(5).unwrap(), expected.feed(5).unwrap());
    fake.take_log();
    let said = in_a_child(|| {
        let mut session = held.take().unwrap();
        let mut errors: Vec<Error> = vec![
            session.feed(9).unwrap_err(),
            session.logits().unwrap_err(),
            session.reset().and_then(|()| session.feed(9)).unwrap_err(),
        ];
        drop(session);
        // Nor is another one to be had.
        errors.push(self::session(&checkpoint, &on(BackendChoice::Cuda)).err().unwrap());
        let codes: Vec<u8> = errors.iter().map(Error::exit_code).collect();
        assert!(errors.iter().all(|e| e.to_string().contains("forked")), "{errors:?}");
        format!("{codes:?} after {:?}", fake.take_log())
    });
    assert_eq!(said, "[5, 5, 5, 5] after []");
    let mut session = held.unwrap();
    assert_eq!(session.feed(9).unwrap(), expected.feed(9).unwrap());
    drop(session);
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_context_that_other_code_made_current_is_an_error_once() {
    let fake = Fake::new();
    let checkpoint = small();
    let mut expected = session(&checkpoint, &on(BackendChoice::Cpu)).unwrap();
    let mut session = session(&checkpoint, &on(BackendChoice::Cuda)).unwrap();
    assert_eq!(session.feed(5).unwrap(), expected.feed(5).unwrap());
    let set = fake.entries().cuCtxSetCurrent.unwrap();
    // SAFETY: no context is a context that may be current.
    assert_eq!(unsafe { set(std::ptr::null_mut()) }, 0);
    let error = session.feed(9).unwrap_err();
    assert!(matches!(error, Error::Driver { code: 201, fatal: false, .. }), "{error}");
    assert_eq!(session.feed(9).unwrap(), expected.feed(9).unwrap());
}

// -------------------------------------------------------------------------------------- signals

/// Resident memory of a process, KiB; 0 when it is gone.
fn resident(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn sigterm_while_a_model_is_loaded_ends_the_program_at_once_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    // Takes seconds to load, and gigabytes.
    let child = command("run --synthetic llama-3.2-1b:f16 --backend cpu -n 1 --save-baseline none")
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while resident(child.id()) < 60 << 10 {
        assert!(start.elapsed() < Duration::from_secs(60), "it was not seen to load");
        std::thread::sleep(Duration::from_millis(1));
    }
    let told = Instant::now();
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
    let output = child.wait_with_output().unwrap();
    let took = told.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}: {output:?}");
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output:?}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "something is left");
}

// --------------------------------------------------------------------------------------- clocks

thread_local! {
    /// Readings of this thread's clocks until they go back, and by how many seconds they do.
    static BACK: Cell<Option<(u32, i64)>> = const { Cell::new(None) };
}

#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

/// In place of the C library's, which the standard library's clocks ask.
///
/// # Safety
///
/// `to` is a place to write to.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: c_int, to: *mut Timespec) -> c_int {
    const NUMBER: c_long = if cfg!(target_arch = "x86_64") { 228 } else { 113 };
    // SAFETY: the system call of the same contract.
    let code = unsafe { syscall(NUMBER, c_long::from(clock), to) } as c_int;
    if let (0, Some((left, seconds))) = (code, BACK.get()) {
        BACK.set(Some((left.saturating_sub(1), seconds)));
        if left == 0 {
            // SAFETY: the system call has written there.
            unsafe { (*to).seconds -= seconds };
        }
    }
    code
}

const TEST: Test = Test { n_prompt: 0, n_gen: 12, depth: 0 };

fn measured(session: &mut DecodeSession) -> Result<Measurement> {
    let delay = Duration::ZERO;
    let repeat = Repeat { times: 2, max_noise: None, most: 2, warmup: false, delay };
    let mut watch = Watch { stop: &|| false, progress: &mut |_| (), monitor: None };
    measure(&mut [session], TEST, repeat, &mut watch).map(|mut all| all.remove(0))
}

#[test]
fn a_host_clock_that_goes_back_is_told_and_never_a_figure() {
    let checkpoint = small();
    let mut session = session(&checkpoint, &on(BackendChoice::Cpu)).unwrap();
    let (mut told, mut whole) = (0, 0);
    for readings in 0..60 {
        BACK.set(Some((readings, 3600)));
        let outcome = measured(&mut session);
        let reached = BACK.take() == Some((0, 3600));
        match outcome {
            Err(Error::Verification(what)) => {
                assert!(reached && what.contains("clock went back"), "{readings}: {what}");
                told += 1;
            }
            Err(other) => panic!("{readings}: {other}"),
            Ok(m) => {
                // Between two repetitions it does no harm.
                assert!(m.repetitions.iter().all(|r| r.ns > 0 && !r.gaps_ns.contains(&0)), "{m:?}");
                whole += 1;
            }
        }
    }
    println!("{told} told, {whole} not touched");
    assert!(told >= 2 * 12 && whole > 20, "{told} told, {whole} not touched");
}

#[test]
fn a_device_clock_that_goes_back_gives_way_to_the_hosts_and_a_profile_leaves_the_token_out() {
    let fake = Fake::new();
    let checkpoint = small();
    let mut plain = session(&checkpoint, &on(BackendChoice::Cuda)).unwrap();
    let before = fake.launches();
    assert!(measured(&mut plain).unwrap().device_clock);
    let each = fake.launches() - before;
    // In the first repetition, and in the second.
    for back in [6, each - 3] {
        fake.inject(Fault::ClockBack { nth: fake.launches() + back });
        let m = measured(&mut plain).unwrap();
        let zero = m.repetitions.iter().any(|r| r.gaps_ns.contains(&0));
        assert!(!m.device_clock && !zero, "{back} of {each}: {m:?}");
    }
    let stamped = SessionOptions { trace: true, ..on(BackendChoice::Cuda) };
    let mut stamped = session(&checkpoint, &stamped).unwrap();
    let good = Profile::take(&mut stamped, 5, 0, 16).unwrap();
    let first = fake.launches();
    // Of sixteen tokens after as many to warm up.
    fake.inject(Fault::ClockBack { nth: first + 16 + 7 });
    let found = Profile::take(&mut stamped, 5, 0, 16).unwrap();
    let times = |p: &Profile| p.steps.iter().map(|s| s.raw_us).collect::<Vec<_>>();
    assert_eq!(times(&found), times(&good), "the other tokens tell the same");
    assert_eq!(found.timeline.len() % found.steps.len(), 0);
    assert!(found.timeline.iter().all(|span| span.us > 0.0), "{:?}", found.timeline);
    // In every token.
    let first = fake.launches() + 16;
    (0..20).for_each(|n| fake.inject(Fault::ClockBack { nth: first + n }));
    let error = Profile::take(&mut stamped, 5, 0, 16).unwrap_err();
    assert!(error.to_string().contains("clock went back in every token"), "{error}");
}
