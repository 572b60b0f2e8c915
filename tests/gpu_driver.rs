//! The driver layer on a real device: PTX, memory, launches, capture, replay, and what fails.
//!
//! Each test prints `skipped: no CUDA device` and passes where none answers.

#![allow(unsafe_code)]

use std::process::Command;
use std::sync::Arc;

use decode_graph::cuda::driver::{
    Attributes, Context, Device, DeviceMemory, Edge, Event, Function, MappedMemory, Module,
    NodeKind, Owner, PinnedMemory, Stream, attribute, calls, launch, profiler,
};
use decode_graph::error::{Error, Result};

/// `increment`: counter[0] += 1. `add_vectors`: y[i] += x[i], i < n. `.version 7.0` is CUDA 11.0's.
const PTX: &str = "
.version 7.0
.target sm_80
.address_size 64

.visible .entry increment(.param .u64 param_counter)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd1, [param_counter];
    cvta.to.global.u64 %rd2, %rd1;
    ld.global.u32 %r1, [%rd2];
    add.u32 %r2, %r1, 1;
    st.global.u32 [%rd2], %r2;
    ret;
}

.visible .entry add_vectors(.param .u64 param_x, .param .u64 param_y, .param .u32 param_n)
{
    .reg .pred %p<2>;
    .reg .f32 %f<4>;
    .reg .b32 %r<6>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [param_x];
    ld.param.u64 %rd2, [param_y];
    ld.param.u32 %r1, [param_n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r5, %r2, %r3, %r4;
    setp.ge.u32 %p1, %r5, %r1;
    @%p1 bra DONE;
    cvta.to.global.u64 %rd3, %rd1;
    cvta.to.global.u64 %rd4, %rd2;
    mul.wide.u32 %rd5, %r5, 4;
    add.u64 %rd6, %rd3, %rd5;
    add.u64 %rd7, %rd4, %rd5;
    ld.global.f32 %f1, [%rd6];
    ld.global.f32 %f2, [%rd7];
    add.f32 %f3, %f1, %f2;
    st.global.f32 [%rd7], %f3;
DONE:
    ret;
}
";

/// Length of the vectors; no multiple of the block, so that the bound matters.
const N: u32 = 1000;

fn context() -> Option<Context> {
    match Device::get(0).and_then(Context::new) {
        Ok(context) => Some(context),
        Err(Error::NoDevice(why)) => {
            eprintln!("skipped: no CUDA device ({why})");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// Everything that the two kernels use, as a graph would own it.
struct Bench {
    stream: Stream,
    increment: Function,
    add: Function,
    counter: Arc<DeviceMemory>,
    x: Arc<DeviceMemory>,
    y: Arc<DeviceMemory>,
}

impl Bench {
    fn new(context: &Context) -> Result<Self> {
        let module = Module::load(context, "two kernels", PTX)?;
        let bench = Self {
            stream: Stream::new(context)?,
            increment: module.function("increment")?,
            add: module.function("add_vectors")?,
            counter: Arc::new(DeviceMemory::alloc(context, "counter", 4)?),
            x: Arc::new(DeviceMemory::alloc(context, "x", u64::from(N) * 4)?),
            y: Arc::new(DeviceMemory::alloc(context, "y", u64::from(N) * 4)?),
        };
        bench.counter.fill(&bench.stream, 0)?;
        bench.y.fill(&bench.stream, 0)?;
        let x: Vec<f32> = (0..N).map(|i| i as f32).collect();
        bench.x.upload(&bench.stream, 0, &x)?;
        Ok(bench)
    }

    /// Both kernels; the second with `attributes`.
    fn step(&self, attributes: Attributes) -> Result<()> {
        let plain = Attributes::default();
        let args = &mut [self.counter.address()];
        // SAFETY: one u64 address of one u32 that `self` keeps.
        unsafe { launch(&self.stream, &self.increment, [1; 3], [1; 3], 0, args, plain)? };
        let args = &mut [self.x.address(), self.y.address(), u64::from(N)];
        let grid = [N.div_ceil(256), 1, 1];
        // SAFETY: two addresses of N f32 that `self` keeps, and N.
        unsafe { launch(&self.stream, &self.add, grid, [256, 1, 1], 0, args, attributes) }
    }

    fn owners(&self) -> Vec<Owner> {
        vec![
            self.counter.clone(),
            self.x.clone(),
            self.y.clone(),
            Arc::new(self.increment.clone()),
            Arc::new(self.add.clone()),
        ]
    }

    fn count(&self) -> Result<u32> {
        let mut count = [0u32];
        self.counter.download(&self.stream, 0, &mut count)?;
        Ok(count[0])
    }

    fn sums(&self) -> Result<Vec<f32>> {
        let mut y = vec![0f32; N as usize];
        self.y.download(&self.stream, 0, &mut y)?;
        Ok(y)
    }
}

#[test]
fn eager_launches_and_replays_of_the_capture_compute_the_same() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    bench.step(Attributes::default()).unwrap();
    assert_eq!(bench.count().unwrap(), 1);

    let before = calls::snapshot();
    let graph = bench.stream.capture(|| bench.step(Attributes::default())).unwrap();
    assert_eq!((calls::snapshot() - before).captures, 1);
    assert_eq!(bench.count().unwrap(), 1, "captured work does not run");

    let nodes = graph.nodes().unwrap();
    assert_eq!(nodes.len(), 2);
    assert!(nodes.iter().all(|n| n.kind == NodeKind::Kernel));
    let kernels: Vec<_> = nodes.iter().filter_map(|n| n.kernel.clone()).collect();
    assert_eq!(kernels.len(), 2, "kernel parameters are told from CUDA 12.0 on");
    assert_eq!((kernels[1].grid, kernels[1].block), ([4, 1, 1], [256, 1, 1]));
    let names: Vec<_> = kernels.into_iter().filter_map(|k| k.name).collect();
    assert!(names.is_empty() || names == ["increment", "add_vectors"], "{names:?}");
    let edges = graph.edges().unwrap();
    assert!(matches!(edges[..], [Edge { from: 0, to: 1, programmatic: None | Some(false) }]));

    let mut exec = graph.instantiate(bench.owners()).unwrap();
    drop(graph);
    exec.upload(&bench.stream).unwrap();
    let (start, end) = (Event::new(&context).unwrap(), Event::new(&context).unwrap());
    let frozen = context.freeze();
    start.record(&bench.stream).unwrap();
    let before = calls::snapshot();
    for _ in 0..100 {
        exec.launch(&bench.stream).unwrap();
    }
    let spent = calls::snapshot() - before;
    assert_eq!((spent.driver, spent.allocations, spent.captures), (100, 0, 0));
    end.record(&bench.stream).unwrap();
    end.synchronize().unwrap();
    drop(frozen);
    let ms = end.milliseconds_since(&start).unwrap();
    eprintln!("100 replays of two kernels: {:.2} us each", f64::from(ms) * 10.0);
    assert!(ms > 0.0);
    assert_eq!(bench.count().unwrap(), 101);
    assert!(bench.sums().unwrap().iter().zip(0..).all(|(y, i)| *y == 101.0 * i as f32));
}

#[test]
fn a_programmatic_launch_is_captured_as_a_programmatic_edge() {
    let Some(context) = context() else { return };
    if context.device().attribute(attribute::COMPUTE_CAPABILITY_MAJOR).unwrap() < 9 {
        eprintln!("skipped: programmatic launch needs compute capability 9.0");
        return;
    }
    let bench = Bench::new(&context).unwrap();
    let attributes = Attributes { programmatic: true, ..Attributes::default() };
    // Captured only: these kernels have no griddepcontrol.wait.
    let graph = bench.stream.capture(|| bench.step(attributes)).unwrap();
    let edges = graph.edges().unwrap();
    assert_eq!(edges.len(), 1);
    assert_ne!(edges[0].programmatic, Some(false));
}

#[test]
fn a_capture_that_fails_or_panics_leaves_the_stream_usable() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    let plain = Attributes::default();
    let refused = |graph: Result<_>| -> String {
        assert!(!bench.stream.is_capturing().unwrap());
        graph.map(|_: decode_graph::cuda::driver::Graph| ()).unwrap_err().to_string()
    };

    let own = bench.stream.capture(|| {
        bench.step(plain)?;
        Err(Error::Usage("the recorder gave up".to_owned()))
    });
    assert!(refused(own).contains("gave up"));

    // Refused by this crate before the driver is asked.
    let sync = bench.stream.capture(|| bench.stream.synchronize());
    assert!(refused(sync).contains("while a graph is being captured"));
    let nested = bench.stream.capture(|| bench.stream.capture(|| Ok(())).map(drop));
    assert!(refused(nested).contains("inside a capture"));
    let before = calls::snapshot();
    let alloc = bench.stream.capture(|| DeviceMemory::alloc(&context, "late", 256).map(drop));
    assert!(refused(alloc).contains("late while a graph is being captured"));
    assert_eq!((calls::snapshot() - before).allocations, 0);

    // Refused by the driver: no block has 4096 threads.
    let driver = bench.stream.capture(|| {
        let args = &mut [bench.counter.address()];
        // SAFETY: one address that `bench` keeps.
        unsafe { launch(&bench.stream, &bench.increment, [1; 3], [4096, 1, 1], 0, args, plain) }
    });
    assert!(refused(driver).contains("increment: cuLaunchKernel failed"));

    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        bench.stream.capture(|| panic!("in the recorder")).map(drop)
    }));
    assert!(panicked.is_err());
    assert!(!bench.stream.is_capturing().unwrap());

    bench.step(plain).unwrap();
    assert_eq!(bench.count().unwrap(), 1, "eager still works, nothing of the captures ran");
    let graph = bench.stream.capture(|| bench.step(plain)).unwrap();
    graph.instantiate(bench.owners()).unwrap().launch(&bench.stream).unwrap();
    assert_eq!(bench.count().unwrap(), 2, "and so does capture");
    assert_eq!(context.lost(), None);
}

#[test]
fn other_threads_do_not_disturb_a_capture() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let stream = Stream::new(&context).unwrap();
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    let memory = DeviceMemory::alloc(&context, "other", 4096).unwrap();
                    memory.upload(&stream, 0, &[1u8; 4096]).unwrap();
                }
            });
        }
        let captured: Result<()> = (0..200)
            .try_for_each(|_| bench.stream.capture(|| bench.step(Attributes::default())).map(drop));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        captured.unwrap();
    });
}

#[test]
fn what_a_kernel_writes_to_mapped_memory_the_host_reads() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    let mapped = MappedMemory::alloc(&context, "token ring", 64).unwrap();
    mapped.write_u32(8, 41).unwrap();
    let args = &mut [mapped.device_address() + 8];
    let plain = Attributes::default();
    // SAFETY: one address of one u32 that outlives the synchronize below.
    unsafe { launch(&bench.stream, &bench.increment, [1; 3], [1; 3], 0, args, plain) }.unwrap();
    bench.stream.synchronize().unwrap();
    assert_eq!(mapped.read_u32(8).unwrap(), 42);
    assert_eq!(mapped.read_u64(0).unwrap(), 0);
    assert!(mapped.read_u32(64).is_err(), "out of bounds");
    assert!(mapped.read_u64(4).is_err(), "misaligned");
}

#[test]
fn memory_cannot_be_had_after_freeze_nor_beyond_the_device() {
    let Some(context) = context() else { return };
    let (_, total) = context.memory().unwrap();
    match DeviceMemory::alloc(&context, "too much", total * 2) {
        Err(Error::OutOfMemory { need, free, .. }) => {
            assert_eq!(need, total * 2);
            assert!(free > 0 && free <= total);
        }
        other => panic!("{other:?}"),
    }
    let frozen = context.freeze();
    let before = calls::snapshot();
    assert!(matches!(DeviceMemory::alloc(&context, "late", 4), Err(Error::Internal(_))));
    assert!(matches!(PinnedMemory::alloc(&context, "late", 4), Err(Error::Internal(_))));
    assert!(matches!(MappedMemory::alloc(&context, "late", 4), Err(Error::Internal(_))));
    assert_eq!(calls::snapshot(), before, "the driver was not asked");
    drop(frozen);
    assert!(DeviceMemory::alloc(&context, "in time", 4).is_ok());
}

#[test]
fn copies_keep_to_their_bounds_and_bring_back_what_was_sent() {
    let Some(context) = context() else { return };
    let stream = Stream::new(&context).unwrap();
    let memory = DeviceMemory::alloc(&context, "sixteen", 16).unwrap();
    memory.fill(&stream, 0xA5).unwrap();
    memory.upload(&stream, 4, &[1u32, 2]).unwrap();
    let mut back = [0u32; 4];
    memory.download(&stream, 0, &mut back).unwrap();
    assert_eq!(back, [0xA5A5_A5A5, 1, 2, 0xA5A5_A5A5]);
    assert!(memory.upload(&stream, 12, &[1u32, 2]).is_err());
    assert!(memory.download(&stream, 4, &mut back).is_err());
    assert!(memory.typed::<u32>(2, 1).is_err(), "misaligned");

    let mut pinned = PinnedMemory::alloc(&context, "staging", 16).unwrap();
    pinned.as_mut_slice().fill(7);
    // SAFETY: `pinned` is unchanged until the download below has waited for the stream.
    unsafe { memory.upload_async(&stream, 0, pinned.as_slice()) }.unwrap();
    memory.download(&stream, 0, &mut back).unwrap();
    assert_eq!(back, [0x0707_0707; 4]);
}

#[test]
fn code_that_does_not_compile_is_reported_with_the_compilers_words() {
    let Some(context) = context() else { return };
    let broken = PTX.replace("mad.lo.u32", "mad.low.u32");
    let text = Module::load(&context, "broken.ptx", &broken).unwrap_err().to_string();
    assert!(text.contains("broken.ptx") && text.contains("compiler log"), "{text}");
    let too_new = PTX.replace(".version 7.0", ".version 99.9");
    assert!(Module::load(&context, "new.ptx", &too_new).is_err());
    let module = Module::load(&context, "two kernels", PTX).unwrap();
    let text = module.function("subtract").unwrap_err().to_string();
    assert!(text.contains("two kernels: subtract: cuModuleGetFunction failed"), "{text}");
    let used = module.function("add_vectors").unwrap().attributes().unwrap();
    assert!(used.registers > 0 && used.local_bytes == 0 && used.max_threads >= 256, "{used:?}");
    assert_eq!(context.lost(), None);
}

#[test]
fn a_device_tells_what_a_report_needs() {
    let Some(context) = context() else { return };
    let info = context.device().info().unwrap();
    eprintln!("{info:?}");
    assert!(!info.name.is_empty() && info.pci_bus_id.contains(':'));
    assert!(info.compute_capability.0 >= 7 && info.sm_count > 0 && info.l2_bytes > 0);
    assert!(matches!(Device::get(9999), Err(Error::NoDevice(why)) if why.contains("9999")));
    let add = Module::load(&context, "two kernels", PTX).unwrap().function("add_vectors").unwrap();
    add.set_max_dynamic_shared(info.shared_optin_bytes).unwrap();
    assert!(add.set_max_dynamic_shared(info.shared_optin_bytes + 1).is_err());
    profiler::start(&context).unwrap();
    profiler::stop(&context).unwrap();
}

#[test]
fn the_captured_graph_is_written_as_dot() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    let graph = bench.stream.capture(|| bench.step(Attributes::default())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("graph.dot");
    graph.write_dot(&path).unwrap();
    assert!(std::fs::read_to_string(path).unwrap().contains("digraph"));
}

#[test]
fn a_fault_is_reported_once_and_nothing_is_asked_after() {
    if context().is_none() {
        return;
    }
    // A fault takes the whole process's context with it.
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_faulting_kernel", "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{text}");
}

#[test]
#[ignore = "loses the context of its process: run by a_fault_is_reported_once_and_nothing_is_asked_after"]
fn a_faulting_kernel() {
    let Some(context) = context() else { return };
    let bench = Bench::new(&context).unwrap();
    let plain = Attributes::default();
    let nowhere = &mut [0x10];
    // SAFETY: none: the fault is the point; the device reports it, the host is not touched.
    unsafe { launch(&bench.stream, &bench.increment, [1; 3], [1; 3], 0, nowhere, plain) }.unwrap();
    let error = bench.stream.synchronize().unwrap_err();
    assert!(matches!(error, Error::Driver { fatal: true, .. }), "{error}");
    assert_eq!(error.exit_code(), 7);
    assert!(context.lost().is_some());
    let before = calls::snapshot();
    let later = bench.step(plain).unwrap_err();
    assert!(matches!(later, Error::Driver { fatal: true, .. }), "{later}");
    // The names of the code are asked for the message; nothing is launched.
    assert!((calls::snapshot() - before).driver <= 2);
    let before = calls::snapshot();
    drop(bench);
    assert_eq!(calls::snapshot(), before, "nothing is freed in a lost context");
}
