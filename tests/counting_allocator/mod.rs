//! How many bytes a thread holds at most, and how long it takes: the two bounds of hostile input.

#![allow(unsafe_code, reason = "an allocator is")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

struct Counting;

fn count(bytes: i64) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

/// What the system refused is not held.
fn given(at: *mut u8, layout: Layout) -> *mut u8 {
    if !at.is_null() {
        count(layout.size() as i64);
    }
    at
}

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        given(unsafe { System.alloc(layout) }, layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        given(unsafe { System.alloc_zeroed(layout) }, layout)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `f` gives; the most bytes that this thread held more than before; the time.
pub(crate) fn measured<T>(f: impl FnOnce() -> T) -> (T, u64, Duration) {
    let before = LIVE.get();
    PEAK.set(before);
    let start = Instant::now();
    let made = f();
    let took = start.elapsed();
    (made, u64::try_from(PEAK.get() - before).unwrap_or(0), took)
}

/// As `f`, within the bounds that are promised of an input of `bytes` bytes: 64 MiB beyond its size,
/// and 50 ms (the best of three: a machine may be busy with something else).
pub(crate) fn bounded<T>(what: &str, bytes: usize, f: impl Fn() -> T) -> T {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        let (made, peak, took) = measured(&f);
        assert!(peak <= bytes as u64 + (64 << 20), "{what}: {peak} bytes for {bytes}");
        fastest = fastest.min(took);
        if fastest < Duration::from_millis(50) {
            return made;
        }
    }
    panic!("{what}: took {fastest:?}");
}
