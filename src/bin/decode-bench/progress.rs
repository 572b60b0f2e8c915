//! A progress bar on stderr; nothing where stderr is no terminal.

use crate::environment::Environment;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar that vanishes when it is done or dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Of bytes.
    pub(crate) fn bytes(what: &'static str, environment: &Environment) -> Self {
        Self::new(what, environment, 0, "{bytes}/{total_bytes} {eta}")
    }

    /// Of `tokens`.
    pub(crate) fn tokens(what: String, environment: &Environment, tokens: u64) -> Self {
        Self::new(what, environment, tokens, "{pos}/{len} tokens, {eta} left")
    }

    fn new(
        what: impl Into<std::borrow::Cow<'static, str>>,
        environment: &Environment,
        length: u64,
        unit: &str,
    ) -> Self {
        // Ten frames a second: drawing must not disturb what is measured.
        let target = ProgressDrawTarget::stderr_with_hz(10);
        let bar = ProgressBar::with_draw_target(Some(length), target).with_message(what);
        let color = if environment.color { ".cyan" } else { "" };
        let style = format!("{{msg}} [{{bar:30{color}}}] {unit}");
        if let Ok(style) = ProgressStyle::with_template(&style) {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// So much of the total is done.
    pub(crate) fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    /// One more, of more than was expected if need be.
    pub(crate) fn step(&self) {
        if self.0.position() == 0 {
            // What came before, a warm-up, says nothing of what is left.
            self.0.reset_eta();
        }
        self.0.inc(1);
        if self.0.length().is_some_and(|length| length < self.0.position()) {
            self.0.set_length(self.0.position());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
