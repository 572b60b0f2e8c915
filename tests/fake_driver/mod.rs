//! A driver for tests without a device: host memory for device memory, kernels run by the CPU
//! references, the rules of capture enforced, every call logged, faults by script.
//!
//! | file | what |
//! |---|---|
//! | `state` | memory, streams, captures, graphs, faults: what a driver knows |
//! | `table` | the entry points, each a few lines over the state |
//! | `kernels` | **one arm of `run` a kernel**: a new kernel gets its arm there |
//! | `compute`, `step` | parameters as operands of an op, its reference run on them; the end of a step |
//! | `plants` | known failures, built in on demand |
//! | `tiles` | the device layout of weights taken back to the file's bytes |
//!
//! What is not as on a device: a launch has run when the call returns, so nothing is found that
//! depends on two kernels or on host and device running at the same time; the kernels' own code is
//! not run, only what it must compute, unless a runner has it (`host_shim`). Device addresses are never valid host addresses, and are never
//! used twice: a stale one is a fault, not another buffer's contents.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code, reason = "the driver's C interface")]

mod compute;
mod kernels;
mod plants;
mod state;
mod step;
mod table;
mod tiles;

pub(crate) use plants::Plant;
pub(crate) use state::{Fault, Live, Runner};

use decode_graph::cuda::driver::api::{self, Driver};
use parking_lot::{Mutex, MutexGuard};
use state::STATE;
use std::sync::Once;

/// The driver of this process, for one test at a time.
pub(crate) struct Fake {
    _alone: MutexGuard<'static, ()>,
}

impl Fake {
    /// A driver as at the start of a process, for as long as this lives.
    pub(crate) fn new() -> Self {
        Self::over(table::driver())
    }

    /// As [`Self::new`], with these entry points: all tests of a process give the same.
    pub(crate) fn over(entries: Driver) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            // SAFETY: the entries keep their namesakes' contracts, and the first test that gets
            // here is before all others' use of the driver.
            let installed = unsafe { api::install(entries) };
            assert!(installed, "the driver was used before");
        });
        let fake = Self { _alone: ALONE.lock() };
        fake.restart();
        fake
    }

    /// What a new process would find.
    pub(crate) fn restart(&self) {
        STATE.lock().restart();
    }

    /// Adds to the script.
    pub(crate) fn inject(&self, fault: Fault) {
        STATE.lock().faults.push(fault);
    }

    /// Ends the script; what has happened stays.
    pub(crate) fn calm(&self) {
        STATE.lock().faults.clear();
    }

    /// Builds `plant` into the kernels, or the driver.
    pub(crate) fn plant(&self, plant: Option<Plant>) {
        STATE.lock().plant = plant;
    }

    /// Has kernels run by `runner`, or by the references again.
    pub(crate) fn run_kernels_by(&self, runner: Option<Runner>) {
        STATE.lock().runner = runner;
    }

    /// Names of the entry points called since the last [`take_log`](Self::take_log).
    pub(crate) fn take_log(&self) -> Vec<&'static str> {
        std::mem::take(&mut STATE.lock().log)
    }

    /// What is allocated or open.
    pub(crate) fn live(&self) -> Live {
        STATE.lock().live()
    }

    /// Whether a stream is capturing, or in a capture that was invalidated.
    pub(crate) fn is_capturing(&self) -> bool {
        STATE.lock().is_capturing()
    }

    /// Kernels and graphs launched outside a capture so far.
    pub(crate) fn launches(&self) -> usize {
        STATE.lock().launches
    }

    /// Calls that a real driver would not have come back from.
    pub(crate) fn endless_waits(&self) -> u32 {
        STATE.lock().endless_waits
    }

    /// Device memory that may be used, bytes.
    pub(crate) fn set_memory(&self, bytes: usize) {
        STATE.lock().memory_bytes = bytes;
    }

    /// What device memory holds, by address.
    pub(crate) fn contents(&self) -> Vec<(u64, Vec<u8>)> {
        STATE.lock().contents()
    }

    /// Compute capability.
    pub(crate) fn set_compute(&self, compute: (i32, i32)) {
        STATE.lock().compute = compute;
    }

    /// CUDA version, 1000 × major + 10 × minor.
    pub(crate) fn set_version(&self, version: i32) {
        STATE.lock().version = version;
    }

    /// Multiprocessors.
    pub(crate) fn set_multiprocessors(&self, multiprocessors: i32) {
        STATE.lock().multiprocessors = multiprocessors;
    }

    /// Devices.
    pub(crate) fn set_devices(&self, devices: i32) {
        STATE.lock().devices = devices;
    }

    /// The entry points themselves, for a test of the driver's rules.
    pub(crate) fn entries(&self) -> Driver {
        table::driver()
    }
}

/// The entry points, for a test that takes some of them away.
pub(crate) fn entries() -> Driver {
    table::driver()
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.run_kernels_by(None);
        self.restart();
    }
}
