//! What the driver layer does when the driver fails, proven without a device: a table of stand-ins
//! takes the place of libcuda, also under `cust`. Faults are per thread, so tests do not meet.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::{c_int, c_uint};
use std::sync::Once;

use decode_graph::cuda::driver::api::{self, DevicePtr, Driver, Raw};
use decode_graph::cuda::driver::{Context, Device, DeviceMemory, Graph, Stream, calls};
use decode_graph::error::{Error, Result};

thread_local! {
    static ALLOC: Cell<u32> = const { Cell::new(0) };
    static SYNC: Cell<u32> = const { Cell::new(0) };
    static END: Cell<u32> = const { Cell::new(0) };
    static RECORDING: Cell<bool> = const { Cell::new(false) };
    static LIVE_BYTES_AND_GRAPHS: Cell<(usize, i32)> = const { Cell::new((0, 0)) };
}

const HANDLE: usize = 0x10;
/// Of `END`: success, and no graph.
const NO_GRAPH: u32 = u32::MAX;

unsafe extern "C" fn init(_: c_uint) -> u32 {
    0
}
unsafe extern "C" fn count(count: *mut c_int) -> u32 {
    // SAFETY: the driver's contract: a place to write to.
    unsafe { count.write(1) };
    0
}
unsafe extern "C" fn device(device: *mut c_int, ordinal: c_int) -> u32 {
    // SAFETY: as above.
    unsafe { device.write(ordinal) };
    0
}
unsafe extern "C" fn retain(context: *mut Raw, _: c_int) -> u32 {
    // SAFETY: as above.
    unsafe { context.write(std::ptr::without_provenance_mut(HANDLE)) };
    0
}
unsafe extern "C" fn release(_: c_int) -> u32 {
    0
}
unsafe extern "C" fn with_handle(_: Raw) -> u32 {
    0
}
unsafe extern "C" fn alloc(address: *mut DevicePtr, bytes: usize) -> u32 {
    let code = ALLOC.get();
    if code == 0 {
        let (live, graphs) = LIVE_BYTES_AND_GRAPHS.get();
        LIVE_BYTES_AND_GRAPHS.set((live + bytes, graphs));
        // SAFETY: as above. The address carries the size, for `free`.
        unsafe { address.write(bytes as u64) };
    }
    code
}
unsafe extern "C" fn free(address: DevicePtr) -> u32 {
    let (live, graphs) = LIVE_BYTES_AND_GRAPHS.get();
    LIVE_BYTES_AND_GRAPHS.set((live - address as usize, graphs));
    0
}
unsafe extern "C" fn memory(free: *mut usize, total: *mut usize) -> u32 {
    // SAFETY: as above.
    unsafe { free.write(1 << 20) };
    // SAFETY: as above.
    unsafe { total.write(1 << 30) };
    0
}
unsafe extern "C" fn stream(stream: *mut Raw, flags: c_uint, _: c_int) -> u32 {
    assert_eq!(flags, 1, "non-blocking");
    // SAFETY: as above.
    unsafe { stream.write(std::ptr::without_provenance_mut(HANDLE)) };
    0
}
unsafe extern "C" fn synchronize(_: Raw) -> u32 {
    SYNC.get()
}
unsafe extern "C" fn begin(_: Raw, mode: c_uint) -> u32 {
    assert_eq!(mode, 1, "thread-local mode");
    assert!(!RECORDING.replace(true));
    0
}
unsafe extern "C" fn end(_: Raw, graph: *mut Raw) -> u32 {
    assert!(RECORDING.replace(false));
    if END.get() == NO_GRAPH {
        // SAFETY: as above.
        unsafe { graph.write(std::ptr::null_mut()) };
        return 0;
    }
    if END.get() == 0 {
        let (live, graphs) = LIVE_BYTES_AND_GRAPHS.get();
        LIVE_BYTES_AND_GRAPHS.set((live, graphs + 1));
        // SAFETY: as above.
        unsafe { graph.write(std::ptr::without_provenance_mut(HANDLE)) };
    }
    END.get()
}
unsafe extern "C" fn destroy_graph(_: Raw) -> u32 {
    let (live, graphs) = LIVE_BYTES_AND_GRAPHS.get();
    LIVE_BYTES_AND_GRAPHS.set((live, graphs - 1));
    0
}

fn context() -> Context {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        let table = Driver {
            cuInit: Some(init),
            cuDeviceGetCount: Some(count),
            cuDeviceGet: Some(device),
            cuDevicePrimaryCtxRetain: Some(retain),
            cuDevicePrimaryCtxRelease_v2: Some(release),
            cuCtxSetCurrent: Some(with_handle),
            cuMemAlloc_v2: Some(alloc),
            cuMemFree_v2: Some(free),
            cuMemGetInfo_v2: Some(memory),
            cuStreamCreateWithPriority: Some(stream),
            cuStreamDestroy_v2: Some(with_handle),
            cuStreamSynchronize: Some(synchronize),
            cuStreamBeginCapture_v2: Some(begin),
            cuStreamEndCapture: Some(end),
            cuGraphDestroy: Some(destroy_graph),
            ..Driver::default()
        };
        // SAFETY: each entry keeps as much of its namesake's contract as these tests use.
        assert!(unsafe { api::install(table) });
    });
    Device::get(0).and_then(Context::new).expect("the stand-ins answer")
}

#[test]
fn a_capture_ends_and_leaks_nothing_on_every_path() {
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let clean = || !RECORDING.get() && LIVE_BYTES_AND_GRAPHS.get() == (0, 0);

    let failed: Result<Graph> = stream.capture(|| Err(Error::Usage("given up".to_owned())));
    assert!(failed.is_err() && clean());

    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        stream.capture(|| panic!("in the recorder")).map(drop)
    }));
    assert!(panicked.is_err() && clean());

    END.set(901);
    let error = stream.capture(|| Ok(())).unwrap_err();
    assert!(matches!(error, Error::Driver { code: 901, fatal: false, .. }), "{error}");
    assert!(clean());
    END.set(NO_GRAPH);
    let error = stream.capture(|| Ok(())).unwrap_err().to_string();
    assert!(error.contains("the capture yielded no graph") && clean(), "{error}");
    END.set(0);

    let nested = stream.capture(|| stream.capture(|| Ok(())).map(drop));
    assert!(nested.is_err() && clean());
    let sync = stream.capture(|| stream.synchronize());
    assert!(sync.is_err() && clean());

    let graph = stream.capture(|| Ok(())).unwrap();
    assert_eq!(LIVE_BYTES_AND_GRAPHS.get(), (0, 1));
    drop(graph);
    assert!(clean() && context.lost().is_none());
}

#[test]
fn out_of_memory_tells_what_is_needed_and_what_is_free() {
    let context = context();
    ALLOC.set(2);
    let error = DeviceMemory::alloc(&context, "KV cache", 5 << 20).unwrap_err();
    assert_eq!(error.exit_code(), 6);
    let text = error.to_string();
    assert!(text.contains("KV cache needs 5242880 bytes, 1048576 bytes are free"), "{text}");
}

#[test]
fn after_freeze_and_in_a_capture_the_driver_is_not_asked_for_memory() {
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let early = DeviceMemory::alloc(&context, "early", 64).unwrap();
    let frozen = context.freeze();
    let before = calls::snapshot();
    let late = DeviceMemory::alloc(&context, "late", 64);
    assert!(matches!(late, Err(Error::Internal(text)) if text.contains("late")));
    assert_eq!(calls::snapshot(), before);
    drop(frozen);
    let captured = stream.capture(|| DeviceMemory::alloc(&context, "late", 64).map(drop));
    assert!(matches!(captured, Err(Error::Internal(_))));
    assert_eq!((calls::snapshot() - before).allocations, 0);
    assert_eq!(LIVE_BYTES_AND_GRAPHS.get().0, 64);
    drop(early);
    assert_eq!(LIVE_BYTES_AND_GRAPHS.get().0, 0);
}

#[test]
fn after_a_fatal_fault_nothing_more_is_asked_and_the_first_cause_is_kept() {
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let memory = DeviceMemory::alloc(&context, "weights", 64).unwrap();
    SYNC.set(12345);
    let error = stream.synchronize().unwrap_err();
    assert!(matches!(error, Error::Driver { code: 12345, fatal: true, .. }), "{error}");
    assert_eq!(context.lost(), Some(12345), "a code that is not known is fatal");
    SYNC.set(0);
    let later = memory.fill(&stream, 0).unwrap_err();
    let text = later.to_string();
    assert!(text.contains("lost before, at stream: cuStreamSynchronize failed"), "{text}");
    assert_eq!(later.exit_code(), 7);
    let before = calls::snapshot();
    drop((memory, stream));
    assert_eq!(calls::snapshot(), before, "nothing is freed in a lost context");
}

#[test]
fn an_entry_that_the_driver_lacks_is_an_error_that_says_so() {
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let error = stream.is_done().unwrap_err();
    assert!(matches!(error, Error::Driver { code: 302, fatal: false, .. }), "{error}");
    assert!(error.to_string().contains("lacks the entry point"), "{error}");
}
