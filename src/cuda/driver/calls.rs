//! Counts of driver calls, captures and allocations, per thread.
//!
//! A replayed token promises at most 3 driver calls and no allocation; `run -v` prints these
//! counts and tests assert them. Counts are of the calling thread, so they are exact whatever
//! other threads do, and cost one add each. Calls made by `cust` (initialisation, device names,
//! the primary context) are not among them.

use core::cell::Cell;
use core::ops::Sub;

/// Counts since the thread began; subtract two to know what happened between.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Entries into the driver, of any kind.
    pub driver: u64,
    /// Captures begun.
    pub captures: u64,
    /// Allocations asked of the driver: device, pinned and mapped memory.
    pub allocations: u64,
}

impl Sub for Calls {
    type Output = Self;

    fn sub(self, earlier: Self) -> Self {
        Self {
            driver: self.driver.wrapping_sub(earlier.driver),
            captures: self.captures.wrapping_sub(earlier.captures),
            allocations: self.allocations.wrapping_sub(earlier.allocations),
        }
    }
}

thread_local! {
    static DRIVER: Cell<u64> = const { Cell::new(0) };
    static CAPTURES: Cell<u64> = const { Cell::new(0) };
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The calling thread's counts.
pub fn snapshot() -> Calls {
    Calls { driver: DRIVER.get(), captures: CAPTURES.get(), allocations: ALLOCATIONS.get() }
}

#[inline]
pub(super) fn count_call() {
    DRIVER.set(DRIVER.get().wrapping_add(1));
}

pub(super) fn count_capture() {
    CAPTURES.set(CAPTURES.get().wrapping_add(1));
}

pub(super) fn count_allocation() {
    ALLOCATIONS.set(ALLOCATIONS.get().wrapping_add(1));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_exact_and_of_this_thread_only() {
        let before = snapshot();
        count_call();
        count_call();
        count_capture();
        std::thread::spawn(|| {
            count_call();
            count_allocation();
        })
        .join()
        .unwrap();
        assert_eq!(snapshot() - before, Calls { driver: 2, captures: 1, allocations: 0 });
    }
}
