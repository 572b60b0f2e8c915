//! What breaks a capture. A `Stream` cannot be used by two threads, which is so by its type; that a
//! thread which captures does not synchronise, allocate, copy or load code is so at run time: each such
//! call of the driver layer is an error, and the driver is not asked. What would get past that is
//! spoiled by the fake driver as by a real one, and told.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(unsafe_code, reason = "entry points are called as C calls them")]

mod fake_driver;

use decode_graph::cuda::driver::api::{Driver, Raw};
use decode_graph::cuda::driver::{
    Context, Device, DeviceMemory, Event, Graph, MappedMemory, Module, PinnedMemory, Stream, calls,
};
use decode_graph::cuda::kernels;
use decode_graph::error::{Error, Result};
use fake_driver::{Fake, Live};

/// `<T as IsSync<_>>::MARK` is ambiguous, and does not compile, where `T` is `Sync`.
trait IsSync<Which> {
    const MARK: () = ();
}
impl<T: ?Sized> IsSync<()> for T {}
impl<T: ?Sized + Sync> IsSync<u8> for T {}

// Another thread's work on a stream would be recorded by a capture under way; the driver does not
// lock its graphs.
const _: () = <Stream as IsSync<_>>::MARK;
const _: () = <Graph as IsSync<_>>::MARK;

fn context() -> Context {
    Device::get(0).and_then(Context::new).unwrap()
}

#[test]
fn what_breaks_a_capture_is_an_error_and_the_driver_is_not_asked() {
    let fake = Fake::new();
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let other = Stream::new(&context).unwrap();
    let memory = DeviceMemory::alloc(&context, "early", 64).unwrap();
    let (event, earlier) = (Event::new(&context).unwrap(), Event::new(&context).unwrap());
    let text = kernels::ptx("elementwise", (9, 0)).unwrap();
    let module = Module::load(&context, "elementwise", text).unwrap();
    let function = module.function("add").unwrap();
    let graph = stream.capture(|| Ok(())).unwrap();
    let executable = std::cell::RefCell::new(graph.instantiate(Vec::new()).unwrap());

    type Call<'a> = &'a dyn Fn() -> Result<()>;
    let refused: [(&str, Call<'_>); 26] = [
        ("synchronize", &|| stream.synchronize()),
        ("synchronize another", &|| other.synchronize()),
        ("query", &|| stream.is_done().map(drop)),
        ("event synchronize", &|| event.synchronize()),
        ("event query", &|| event.is_done().map(drop)),
        ("event time", &|| event.milliseconds_since(&earlier).map(drop)),
        ("allocation", &|| DeviceMemory::alloc(&context, "late", 64).map(drop)),
        ("pinned allocation", &|| PinnedMemory::alloc(&context, "late", 64).map(drop)),
        ("mapped allocation", &|| MappedMemory::alloc(&context, "late", 64).map(drop)),
        ("stream creation", &|| Stream::new(&context).map(drop)),
        ("event creation", &|| Event::new(&context).map(drop)),
        ("upload", &|| memory.upload(&stream, 0, &[1u8])),
        ("upload elsewhere", &|| memory.upload(&other, 0, &[1u8])),
        // SAFETY: what is static stays as it is.
        ("queued upload", &|| unsafe { memory.upload_async(&stream, 0, b"a") }),
        ("download", &|| memory.download(&stream, 0, &mut [0u8])),
        ("fill", &|| memory.fill(&stream, 0)),
        ("fill of a part", &|| memory.fill_range(&stream, 8, 8, 0)),
        ("module", &|| Module::load(&context, "late", text).map(drop)),
        ("function", &|| module.function("add").map(drop)),
        ("shared memory", &|| function.set_max_dynamic_shared(64)),
        ("carve-out", &|| function.set_shared_carveout(100)),
        ("attributes", &|| function.attributes().map(drop)),
        ("capture", &|| other.capture(|| Ok(())).map(drop)),
        ("instantiation", &|| graph.instantiate(Vec::new()).map(drop)),
        ("graph upload", &|| executable.borrow_mut().upload(&stream)),
        ("replay", &|| executable.borrow_mut().launch(&stream)),
    ];
    for (what, call) in refused {
        let captured = stream.capture(|| {
            let before = calls::snapshot();
            let error = call().unwrap_err();
            assert_eq!(calls::snapshot(), before, "{what}: the driver was asked");
            let said = error.to_string();
            assert!(matches!(error, Error::Internal(_)), "{what}: {said}");
            assert!(said.contains("captur"), "{what}: {said}");
            Ok(())
        });
        // Who does not pass the error on has a good capture all the same.
        assert!(captured.is_ok() && !fake.is_capturing(), "{what}: {captured:?}");
        let failed = stream.capture(call);
        assert!(matches!(failed, Err(Error::Internal(_))) && !fake.is_capturing(), "{what}");
    }
    // Each is served again outside: it was the capture that was in the way.
    event.record(&stream).and_then(|()| earlier.record(&stream)).unwrap();
    for (what, call) in refused {
        assert!(call().is_ok(), "{what}: {:?}", call());
    }
    drop((executable, graph, function, module, event, earlier, memory, stream, other, context));
    assert_eq!(fake.live(), Live::default());
}

#[test]
fn a_drop_inside_a_capture_spoils_it_and_is_told() {
    let fake = Fake::new();
    let context = context();
    let stream = Stream::new(&context).unwrap();
    let memory = DeviceMemory::alloc(&context, "early", 64).unwrap();
    let error = stream.capture(|| {
        drop(memory);
        Ok(())
    });
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Driver { code: 901, fatal: false, .. }), "{error}");
    assert!(!fake.is_capturing());
    assert!(stream.capture(|| Ok(())).is_ok(), "the next one is good");
}

/// A stream of the driver's own, which knows nothing of what the crate's layer refuses.
struct RawStream<'a> {
    entries: &'a Driver,
    stream: Raw,
}

impl RawStream<'_> {
    fn begin(&self) {
        // SAFETY: a live stream; mode thread-local.
        assert_eq!(unsafe { self.entries.cuStreamBeginCapture_v2.unwrap()(self.stream, 1) }, 0);
    }

    /// The result, and whether there is a graph, which is destroyed.
    fn end(&self) -> (u32, bool) {
        let mut graph = std::ptr::null_mut();
        // SAFETY: a live stream, and a place to write to.
        let code = unsafe { self.entries.cuStreamEndCapture.unwrap()(self.stream, &raw mut graph) };
        if !graph.is_null() {
            // SAFETY: made just now.
            assert_eq!(unsafe { self.entries.cuGraphDestroy.unwrap()(graph) }, 0);
        }
        (code, !graph.is_null())
    }
}

/// The rules that a real driver keeps of a thread that captures, asked of the entry points: what the
/// crate's own layer refuses before does not get here.
#[test]
fn the_fake_keeps_the_rules_of_capture() {
    let fake = Fake::new();
    let context = context();
    let entries = fake.entries();
    let mut made = std::ptr::null_mut();
    // SAFETY: a place to write to.
    assert_eq!(unsafe { entries.cuStreamCreateWithPriority.unwrap()(&raw mut made, 1, 0) }, 0);
    let own = RawStream { entries: &entries, stream: made };
    let memory = DeviceMemory::alloc(&context, "early", 64).unwrap();
    let text = std::ffi::CString::new(kernels::ptx("elementwise", (9, 0)).unwrap()).unwrap();
    let load = |module: *mut Raw| {
        let (none, image) = (std::ptr::null_mut(), text.as_ptr().cast());
        // SAFETY: a place to write to, text that ends with NUL, no options.
        unsafe { entries.cuModuleLoadDataEx.unwrap()(module, image, 0, none, none.cast()) }
    };
    let (mut module, mut function) = (std::ptr::null_mut(), std::ptr::null_mut());
    assert_eq!(load(&raw mut module), 0);
    // SAFETY: a place to write to, a live module, a name that ends with NUL.
    let found =
        unsafe { entries.cuModuleGetFunction.unwrap()(&raw mut function, module, c"add".as_ptr()) };
    assert_eq!(found, 0);
    let launch = |stream: Raw| {
        let mut zero = 0u64;
        let mut args = [(&raw mut zero).cast(); 16];
        let (args, none) = (args.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: a live function, more parameters than it has, each of 8 bytes.
        unsafe {
            entries.cuLaunchKernel.unwrap()(function, 1, 1, 1, 32, 1, 1, 0, stream, args, none)
        }
    };
    let (mut address, mut spare) = (0, std::ptr::null_mut::<std::ffi::c_void>());
    let (address, spare) = (&raw mut address, &raw mut spare);
    let legacy = std::ptr::null_mut();
    type Call<'a> = &'a dyn Fn() -> u32;
    let rules: [(&str, u32, Call<'_>); 7] = [
        // SAFETY: places to write to.
        ("allocation", 900, &|| unsafe { entries.cuMemAlloc_v2.unwrap()(address, 64) }),
        // SAFETY: as above.
        ("pinned", 900, &|| unsafe { entries.cuMemHostAlloc.unwrap()(spare.cast(), 64, 1) }),
        // SAFETY: not freed: the call is refused.
        ("free", 900, &|| unsafe { entries.cuMemFree_v2.unwrap()(memory.address()) }),
        // SAFETY: a live stream.
        ("synchronize", 900, &|| unsafe { entries.cuStreamSynchronize.unwrap()(own.stream) }),
        // SAFETY: as above.
        ("query", 900, &|| unsafe { entries.cuStreamQuery.unwrap()(own.stream) }),
        ("module", 900, &|| load(spare.cast())),
        ("legacy stream", 906, &|| launch(legacy)),
    ];
    for (what, expected, call) in rules {
        own.begin();
        assert_eq!(call(), expected, "{what}");
        assert_eq!(launch(own.stream), 901, "{what}: nothing is recorded after it");
        assert_eq!(own.end(), (901, false), "{what}");
        assert!(!fake.is_capturing(), "{what}");
    }
    // A launch is recorded, and another thread may neither end the capture nor disturb it.
    own.begin();
    assert_eq!(launch(own.stream), 0);
    let (stream, other) = (own.stream.addr(), context.clone());
    let there = std::thread::spawn(move || {
        // Freed there too: what a thread gives back may be dropped by this one.
        drop(DeviceMemory::alloc(&other, "elsewhere", 64).unwrap());
        let stream = std::ptr::without_provenance_mut(stream);
        RawStream { entries: &entries, stream }.end()
    });
    assert_eq!(there.join().unwrap(), (908, false));
    assert_eq!(own.end(), (0, true));
    // SAFETY: live, and not used again.
    assert_eq!(unsafe { entries.cuStreamDestroy_v2.unwrap()(own.stream) }, 0);
    // SAFETY: as above.
    assert_eq!(unsafe { entries.cuModuleUnload.unwrap()(module) }, 0);
    drop((memory, context));
    assert_eq!(fake.live(), Live::default());
}
