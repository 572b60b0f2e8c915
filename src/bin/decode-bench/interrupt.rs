//! Ctrl-C: a measurement stops at its next token and prints what it has; anything else, and a
//! second Ctrl-C, ends at once.

use decode_graph::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
/// Whether someone asks [`requested`] in time.
static WATCHED: AtomicBool = AtomicBool::new(false);

/// Takes over SIGINT and SIGTERM.
pub(crate) fn install() -> Result<()> {
    ctrlc::set_handler(|| {
        let again = REQUESTED.swap(true, Ordering::SeqCst);
        if again || !WATCHED.load(Ordering::SeqCst) {
            std::process::exit(130);
        }
    })
    .map_err(|e| Error::Internal(format!("cannot handle Ctrl-C: {e}")))
}

/// From here on the caller asks [`requested`] after each token.
pub(crate) fn watch() {
    WATCHED.store(true, Ordering::SeqCst);
}

/// What `work` makes. A signal ends the program at once meanwhile, since `work` asks nobody: it must
/// leave nothing half done.
pub(crate) fn at_once<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let watched = WATCHED.swap(false, Ordering::SeqCst);
    if requested() {
        return Err(Error::Interrupted);
    }
    let made = work();
    WATCHED.store(watched, Ordering::SeqCst);
    made
}

/// Whether the user wants an end.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_asks_nobody_is_not_begun_after_a_signal_and_not_waited_for() {
        watch();
        let seen = at_once(|| Ok(WATCHED.load(Ordering::SeqCst)));
        assert!(!seen.unwrap(), "a signal would wait for the work");
        assert!(WATCHED.load(Ordering::SeqCst), "as before");
        REQUESTED.store(true, Ordering::SeqCst);
        assert!(matches!(at_once(|| -> Result<()> { panic!("begun") }), Err(Error::Interrupted)));
        REQUESTED.store(false, Ordering::SeqCst);
    }
}
