//! Streams and events. The default stream is never used: it cannot be captured.

use core::cell::Cell;
use core::marker::PhantomData;

use super::abi::Handle;
use super::context::Context;
use super::{api, status};
use crate::error::{Error, Result};

/// CU_STREAM_NON_BLOCKING: no hidden ordering with the default stream. `cust` strips this flag.
const NON_BLOCKING: u32 = 1;

pub(super) fn non_null(what: &str, raw: super::abi::Raw) -> Result<Handle> {
    Handle::new(raw).ok_or_else(|| Error::Internal(format!("{what}: the driver returned null")))
}

/// A queue of work on the device, in order, independent of all other queues.
///
/// Not shared between threads: another thread's copy would be recorded by a capture under way.
#[derive(Debug)]
pub struct Stream {
    context: Context,
    handle: Handle,
    not_sync: PhantomData<Cell<()>>,
}

impl Stream {
    /// A stream that does not wait for the default stream.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses.
    pub fn new(context: &Context) -> Result<Self> {
        context.enter_outside_capture("stream creation")?;
        let mut raw = core::ptr::null_mut();
        // SAFETY: `raw` is a place to write to.
        let code = unsafe { api::cuStreamCreateWithPriority(&raw mut raw, NON_BLOCKING, 0) };
        context.check("stream", "cuStreamCreateWithPriority", code)?;
        let handle = non_null("stream", raw)?;
        Ok(Self { context: context.clone(), handle, not_sync: PhantomData })
    }

    /// The context.
    pub fn context(&self) -> &Context {
        &self.context
    }

    pub(super) fn raw(&self) -> super::abi::Raw {
        self.handle.raw()
    }

    /// Waits until all work queued so far is done.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`], fatal when queued work faulted; [`Error::Internal`] during a capture.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter_outside_capture("synchronize")?;
        // SAFETY: the stream is live.
        let code = unsafe { api::cuStreamSynchronize(self.raw()) };
        self.context.check("stream", "cuStreamSynchronize", code)
    }

    /// Whether all work queued so far is done; does not wait.
    ///
    /// # Errors
    ///
    /// As [`Self::synchronize`].
    pub fn is_done(&self) -> Result<bool> {
        self.context.enter_outside_capture("stream query")?;
        // SAFETY: the stream is live.
        match unsafe { api::cuStreamQuery(self.raw()) } {
            status::NOT_READY => Ok(false),
            code => self.context.check("stream", "cuStreamQuery", code).map(|()| true),
        }
    }

    /// Lets work queued from now on wait for `event`.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses.
    pub fn wait(&self, event: &Event) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both are live.
        let code = unsafe { api::cuStreamWaitEvent(self.raw(), event.handle.raw(), 0) };
        self.context.check("stream", "cuStreamWaitEvent", code)
    }

    /// Whether the stream is recording a graph, or in a capture that was invalidated.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver does not answer.
    pub fn is_capturing(&self) -> Result<bool> {
        self.context.enter()?;
        let mut state = 0;
        // SAFETY: `state` is a place to write to; the stream is live.
        let code = unsafe { api::cuStreamIsCapturing(self.raw(), &raw mut state) };
        self.context.check("stream", "cuStreamIsCapturing", code)?;
        Ok(state != 0)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: created in `new`, destroyed only here; queued work still completes.
            let _ = unsafe { api::cuStreamDestroy_v2(self.raw()) };
        }
    }
}

/// A point in a stream, with its time.
#[derive(Debug)]
pub struct Event {
    context: Context,
    handle: Handle,
}

impl Event {
    /// An event that records the device's time, resolution about 0.5 µs.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses.
    pub fn new(context: &Context) -> Result<Self> {
        context.enter_outside_capture("event creation")?;
        let mut raw = core::ptr::null_mut();
        // SAFETY: `raw` is a place to write to.
        let code = unsafe { api::cuEventCreate(&raw mut raw, 0) };
        context.check("event", "cuEventCreate", code)?;
        Ok(Self { context: context.clone(), handle: non_null("event", raw)? })
    }

    /// Marks the point after the work queued on `stream` so far.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.context.enter()?;
        // SAFETY: both are live.
        let code = unsafe { api::cuEventRecord(self.handle.raw(), stream.raw()) };
        self.context.check("event", "cuEventRecord", code)
    }

    /// Waits for the recorded point.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`], fatal when the work before it faulted.
    pub fn synchronize(&self) -> Result<()> {
        self.context.enter_outside_capture("synchronize")?;
        // SAFETY: the event is live.
        let code = unsafe { api::cuEventSynchronize(self.handle.raw()) };
        self.context.check("event", "cuEventSynchronize", code)
    }

    /// Whether the recorded point was reached; does not wait.
    ///
    /// # Errors
    ///
    /// As [`Self::synchronize`].
    pub fn is_done(&self) -> Result<bool> {
        self.context.enter_outside_capture("event query")?;
        // SAFETY: the event is live.
        match unsafe { api::cuEventQuery(self.handle.raw()) } {
            status::NOT_READY => Ok(false),
            code => self.context.check("event", "cuEventQuery", code).map(|()| true),
        }
    }

    /// Device time from `start` to this event, milliseconds. Both must be reached.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when one was not recorded or not reached.
    pub fn milliseconds_since(&self, start: &Self) -> Result<f32> {
        self.context.enter_outside_capture("event time")?;
        let mut ms = 0.0;
        // SAFETY: `ms` is a place to write to; both events are live.
        let code =
            unsafe { api::cuEventElapsedTime(&raw mut ms, start.handle.raw(), self.handle.raw()) };
        self.context.check("event", "cuEventElapsedTime", code)?;
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: created in `new`, destroyed only here.
            let _ = unsafe { api::cuEventDestroy_v2(self.handle.raw()) };
        }
    }
}
