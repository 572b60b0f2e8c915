//! Forks: a child has its parent's memory but not its driver, which serves the process that it was
//! initialised in. What the parent opened is refused in the child before the driver is asked.

use core::sync::atomic::{AtomicBool, Ordering};
use std::sync::Once;

use crate::error::{Error, Result};

/// Whether this process was forked from one that had initialised the driver.
static FORKED: AtomicBool = AtomicBool::new(false);

#[cfg(unix)]
unsafe extern "C" {
    fn pthread_atfork(
        prepare: Option<extern "C" fn()>,
        parent: Option<extern "C" fn()>,
        child: Option<extern "C" fn()>,
    ) -> core::ffi::c_int;
}

extern "C" fn in_the_child() {
    FORKED.store(true, Ordering::Relaxed);
}

/// Called when the driver is initialised: children from here on are told apart.
pub(super) fn watch() {
    static WATCHED: Once = Once::new();
    WATCHED.call_once(|| {
        #[cfg(unix)]
        {
            // SAFETY: the handler sets a flag, as one may in the child of a process with threads.
            // Without memory for the handler (its only failure) a child is not told apart.
            let _ = unsafe { pthread_atfork(None, None, Some(in_the_child)) };
        }
        #[cfg(not(unix))]
        let _ = in_the_child;
    });
}

/// An error in a child of the process that initialised the driver. Costs a load and no call.
#[inline]
pub(super) fn refuse() -> Result<()> {
    if FORKED.load(Ordering::Relaxed) { Err(forked()) } else { Ok(()) }
}

#[cold]
fn forked() -> Error {
    let why = "this process was forked from the one that opened the device, and the driver serves \
               only that one: open it after the fork, or start a program of its own";
    Error::NoDevice(why.to_owned())
}
