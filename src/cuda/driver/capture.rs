//! A stream's work recorded as a graph; the capture ends on every path.

use parking_lot::Mutex;

use super::abi::Raw;
use super::context::Capturing;
use super::graph::Graph;
use super::stream::Stream;
use super::{api, calls};
use crate::error::{Error, Result};

/// CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what other threads call does not invalidate the capture.
const THREAD_LOCAL: u32 = 1;

/// One capture in the process at a time.
static CAPTURE: Mutex<()> = Mutex::new(());

/// An open capture; ends it and destroys what was recorded, unless [`Open::end`] is called.
struct Open<'a> {
    stream: &'a Stream,
    open: bool,
}

impl Open<'_> {
    fn end_raw(&mut self) -> (u32, Raw) {
        self.open = false;
        let mut raw = core::ptr::null_mut();
        // SAFETY: `raw` is a place to write to; the stream is live and capturing.
        let code = unsafe { api::cuStreamEndCapture(self.stream.raw(), &raw mut raw) };
        (code, raw)
    }

    fn end(mut self) -> Result<Graph> {
        let (code, raw) = self.end_raw();
        let graph = Graph::own(self.stream.context(), raw);
        self.stream.context().check("capture", "cuStreamEndCapture", code)?;
        graph.ok_or_else(|| Error::Internal("the capture yielded no graph".to_owned()))
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if self.open {
            let (_, raw) = self.end_raw();
            drop(Graph::own(self.stream.context(), raw));
        }
    }
}

impl Stream {
    /// Records what `record` queues on this stream as a graph, instead of running it.
    ///
    /// Captures are serialised over the process. While `record` runs, this thread cannot allocate,
    /// copy, load code or synchronise through this crate: such a call is an error, and the driver
    /// is not asked. Nothing owned by this module may be dropped in `record`. When `record` fails
    /// or panics, the capture is ended, its graph destroyed, and the stream usable as before.
    ///
    /// # Errors
    ///
    /// The error of `record`; [`Error::Driver`] when the driver refuses or has invalidated the
    /// capture; [`Error::Internal`] inside another capture.
    pub fn capture(&self, record: impl FnOnce() -> Result<()>) -> Result<Graph> {
        // Before the lock, which this thread would hold already.
        let _capturing = Capturing::begin()
            .ok_or_else(|| Error::Internal("a capture was begun inside a capture".to_owned()))?;
        let _one_at_a_time = CAPTURE.lock();
        self.context().enter()?;
        calls::count_capture();
        // SAFETY: the stream is live.
        let code = unsafe { api::cuStreamBeginCapture_v2(self.raw(), THREAD_LOCAL) };
        self.context().check("capture", "cuStreamBeginCapture_v2", code)?;
        let open = Open { stream: self, open: true };
        record()?;
        open.end()
    }
}
