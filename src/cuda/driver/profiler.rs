//! The range that nsys and ncu record when told to wait for cudaProfilerStart.

use super::api;
use super::context::Context;
use crate::error::Result;

/// Opens the recorded range.
///
/// # Errors
///
/// [`Error::Driver`](crate::error::Error::Driver) when the driver refuses.
pub fn start(context: &Context) -> Result<()> {
    context.enter_outside_capture("profiler start")?;
    // SAFETY: no conditions.
    let code = unsafe { api::cuProfilerStart() };
    context.check("profiler", "cuProfilerStart", code)
}

/// Closes the recorded range.
///
/// # Errors
///
/// [`Error::Driver`](crate::error::Error::Driver) when the driver refuses.
pub fn stop(context: &Context) -> Result<()> {
    context.enter_outside_capture("profiler stop")?;
    // SAFETY: no conditions.
    let code = unsafe { api::cuProfilerStop() };
    context.check("profiler", "cuProfilerStop", code)
}
