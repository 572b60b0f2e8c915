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

/// Whether the user wants an end.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}
