//! The environment: the only place that reads it.

use decode_graph::error::{Error, Result};
use decode_graph::session::DebugLevel;

/// What the environment asks for. RUST_LOG goes to the logger, CUDA_VISIBLE_DEVICES to the driver.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Environment {
    /// `GPU_DEBUG`.
    pub(crate) debug: DebugLevel,
    /// Whether colours are allowed: `NO_COLOR` is absent or empty.
    pub(crate) color: bool,
}

impl Environment {
    /// Reads it and starts the logger.
    pub(crate) fn read() -> Result<Self> {
        env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
            .format_timestamp(None)
            .init();
        let debug = parse_debug(std::env::var_os("GPU_DEBUG").as_deref())?;
        let color = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Ok(Self { debug, color })
    }
}

fn parse_debug(value: Option<&std::ffi::OsStr>) -> Result<DebugLevel> {
    match value.map(|v| v.to_string_lossy()).as_deref() {
        None | Some("" | "0") => Ok(DebugLevel::Off),
        Some("1") => Ok(DebugLevel::Print),
        Some("2") => Ok(DebugLevel::Compare),
        Some(other) => Err(Error::Usage(format!(
            "GPU_DEBUG={other:?} is unknown; it is 0 (off), 1 (print each step) or 2 (also \
             compare it with the reference)"
        ))),
    }
}
