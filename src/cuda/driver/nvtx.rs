//! NVTX: named ranges of what the host does, for the time line of nsys and the filters of ncu.
//!
//! NVIDIA's library for this is looked up once, by name, and nothing of it is needed at build time.
//! Where it is not there, a range costs a comparison and shows nothing. It comes with the CUDA
//! toolkit, or as `libnvtx3interop.so.1` in the Python package `nvidia-nvtx`.
//!
//! Ranges stand around phases of the host only: one inside a capture would show the capture, not
//! the replays (NVIDIA/cccl issue 1674). Kernels are told by their names.
//!
//! Source: NVTX 3, `nvToolsExt.h`.

use core::ffi::{CStr, c_char, c_int};
use core::marker::PhantomData;

use once_cell::sync::OnceCell;

/// Where the functions are, newest first: the second is that of CUDA 12 and before.
const LIBRARIES: [&str; 2] = ["libnvtx3interop.so.1", "libnvToolsExt.so.1"];

#[derive(Clone, Copy)]
struct Functions {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
}

static FUNCTIONS: OnceCell<Option<Functions>> = OnceCell::new();

fn bind() -> Option<Functions> {
    let open = |name: &&str| {
        // SAFETY: loading NVTX runs no code but the loader's; a profiler that it finds later is the
        // user's.
        unsafe { libloading::Library::new(*name) }.ok()
    };
    let library = LIBRARIES.iter().find_map(open)?;
    // SAFETY: the prototype is that of nvToolsExt.h.
    let push = *unsafe { library.get(c"nvtxRangePushA".to_bytes_with_nul()) }.ok()?;
    // SAFETY: as above.
    let pop = *unsafe { library.get(c"nvtxRangePop".to_bytes_with_nul()) }.ok()?;
    // The functions stay as long as the process.
    core::mem::forget(library);
    Some(Functions { push, pop })
}

/// A range of this thread, from where it was made to where it is dropped.
#[must_use]
pub struct Range {
    functions: Option<Functions>,
    /// Ranges are a stack of their thread.
    not_send: PhantomData<*const ()>,
}

/// Opens the range `name` inside those of this thread that are open.
pub fn range(name: &CStr) -> Range {
    Range::open(*FUNCTIONS.get_or_init(bind), name)
}

impl Range {
    fn open(functions: Option<Functions>, name: &CStr) -> Self {
        if let Some(f) = functions {
            // SAFETY: NUL-terminated text, which NVTX copies or hands to the profiler before it
            // returns.
            unsafe { (f.push)(name.as_ptr()) };
        }
        Self { functions, not_send: PhantomData }
    }
}

impl Drop for Range {
    fn drop(&mut self) {
        if let Some(f) = self.functions {
            // SAFETY: no conditions; this thread pushed the range.
            unsafe { (f.pop)() };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    thread_local! {
        static SEEN: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
    }

    unsafe extern "C" fn push(name: *const c_char) -> c_int {
        // SAFETY: what `Range::open` passes.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        SEEN.with_borrow_mut(|seen| seen.push(name));
        0
    }

    unsafe extern "C" fn pop() -> c_int {
        SEEN.with_borrow_mut(|seen| seen.push("end".to_owned()));
        0
    }

    #[test]
    fn ranges_nest_and_end_where_they_are_dropped_also_on_the_way_out_of_an_error() {
        let functions = Some(Functions { push, pop });
        let inner = || -> Result<(), ()> {
            let _range = Range::open(functions, c"capture");
            Err(())
        };
        {
            let _range = Range::open(functions, c"load");
            assert!(inner().is_err());
        }
        drop(Range::open(None, c"nobody looks"));
        let seen = SEEN.with_borrow(Clone::clone);
        assert_eq!(seen, ["load", "capture", "end", "end"]);
    }
}
