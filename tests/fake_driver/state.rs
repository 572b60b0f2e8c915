//! What the driver knows: memory, streams, captures, graphs, and the script of faults.

use super::compute;
use super::kernels;
use super::plants::{self, Plant};
use decode_graph::plan::program::SLOTS;
use parking_lot::Mutex;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::ops::Range;
use std::sync::{Arc, LazyLock};

/// Result codes that the driver gives by itself.
pub(super) mod code {
    pub(crate) const INVALID_VALUE: u32 = 1;
    pub(crate) const OUT_OF_MEMORY: u32 = 2;
    pub(crate) const NO_DEVICE: u32 = 100;
    pub(crate) const INVALID_DEVICE: u32 = 101;
    pub(crate) const INVALID_CONTEXT: u32 = 201;
    pub(crate) const INVALID_PTX: u32 = 218;
    pub(crate) const UNSUPPORTED_PTX_VERSION: u32 = 222;
    pub(crate) const INVALID_HANDLE: u32 = 400;
    pub(crate) const NOT_FOUND: u32 = 500;
    pub(crate) const NOT_READY: u32 = 600;
    pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
    pub(crate) const LAUNCH_FAILED: u32 = 719;
    pub(crate) const COOPERATIVE_LAUNCH_TOO_LARGE: u32 = 720;
    pub(crate) const CAPTURE_UNSUPPORTED: u32 = 900;
    pub(crate) const CAPTURE_INVALIDATED: u32 = 901;
    pub(crate) const CAPTURE_IMPLICIT: u32 = 906;
    pub(crate) const CAPTURE_WRONG_THREAD: u32 = 908;
}

/// What goes wrong, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// Call `index` of the process (counted from 0) returns `code` and has no effect.
    At { index: usize, code: u32 },
    /// The `nth` call (from 0) of the entry point `call` returns `code` and has no effect.
    Nth { call: &'static str, nth: usize, code: u32 },
    /// The `nth` kernel or graph launch outside a capture (from 0) is accepted and faults while it
    /// runs: every later call returns `code`.
    Later { nth: usize, code: u32 },
    /// From the `nth` launch on nothing completes.
    Hang { nth: usize },
    /// Before the `nth` launch the device's clock goes back to half.
    ClockBack { nth: usize },
}

/// What is allocated or open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Live {
    pub(crate) device_bytes: usize,
    pub(crate) host_bytes: usize,
    pub(crate) streams: usize,
    pub(crate) events: usize,
    pub(crate) modules: usize,
    pub(crate) graphs: usize,
    pub(crate) executables: usize,
    pub(crate) contexts: usize,
}

/// An allocation: `bytes` at a device address, and where they really are.
pub(super) struct Memory {
    bytes: usize,
    words: Box<[u64]>,
    /// Handed out to the host as well.
    pub(super) pinned: bool,
}

impl Memory {
    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }

    pub(super) fn host(&mut self) -> *mut u64 {
        self.words.as_mut_ptr()
    }
}

pub(super) struct Function {
    pub(super) name: CString,
    /// Bytes of each parameter.
    pub(super) parameters: Arc<[usize]>,
}

/// Runs a kernel: name; blocks, threads, bytes of shared memory, whether all blocks run at the same
/// time; parameters, with addresses of the host. Its result is 0, or the driver's business; `None`
/// where it does not have the kernel.
pub(crate) type Runner =
    Arc<dyn Fn(&str, (u32, u32, u32, bool), &[u64]) -> Option<i32> + Send + Sync>;

/// One step of a persistent kernel's program, at an address as its type asks for.
#[derive(Clone, Copy)]
#[repr(align(128))]
pub(super) struct Row([u64; SLOTS]);

/// A kernel with its parameters **copied**, as a launch or a graph holds it.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) function: u64,
    pub(super) grid: [u32; 3],
    pub(super) block: [u32; 3],
    pub(super) shared_bytes: u32,
    pub(super) programmatic: bool,
    pub(super) cooperative: bool,
    pub(super) args: Vec<u64>,
}

#[derive(Default)]
pub(super) struct Capture {
    pub(super) nodes: Vec<Node>,
    pub(super) invalidated: bool,
}

#[derive(Default)]
pub(super) struct StreamState {
    pub(super) capture: Option<Capture>,
    /// Another thread may not end it.
    thread: Option<std::thread::ThreadId>,
}

pub(super) struct State {
    next: u64,
    next_address: u64,
    pub(super) memory: BTreeMap<u64, Memory>,
    pub(super) streams: HashMap<u64, StreamState>,
    pub(super) events: HashMap<u64, Option<u64>>,
    /// PTX text.
    pub(super) modules: HashMap<u64, String>,
    pub(super) functions: HashMap<u64, Function>,
    pub(super) graphs: HashMap<u64, Vec<(u64, Node)>>,
    pub(super) executables: HashMap<u64, Vec<Node>>,
    pub(super) contexts: usize,
    pub(super) unpacked: compute::Unpacked,
    /// Bytes of each parameter, by length of the PTX text and entry.
    pub(super) signatures: HashMap<(usize, CString), Arc<[usize]>>,
    pub(super) plant: Option<Plant>,
    /// Runs kernels in the place of the references.
    pub(super) runner: Option<Runner>,
    pub(super) memories: plants::Remembered,
    pub(super) faults: Vec<Fault>,
    pub(super) log: Vec<&'static str>,
    calls: usize,
    calls_of: HashMap<&'static str, usize>,
    pub(super) launches: usize,
    /// The fault that lost the context, which every call returns.
    pub(super) lost: Option<u32>,
    pub(super) hung: bool,
    pub(super) endless_waits: u32,
    /// Whether a stream was destroyed while it captured.
    pub(super) abandoned: bool,
    pub(super) clock: u64,
    pub(super) memory_bytes: usize,
    pub(super) compute: (i32, i32),
    pub(super) multiprocessors: i32,
    pub(super) devices: i32,
    /// CUDA version, 1000 × major + 10 × minor.
    pub(super) version: i32,
}

pub(super) static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| Mutex::new(State::new()));

thread_local! {
    /// The context that is current on this thread.
    pub(super) static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// The one context's handle.
pub(super) const CONTEXT: usize = 0xC0;

impl State {
    fn new() -> Self {
        Self {
            next: 0x1000,
            next_address: 0x7A00_0000_0000,
            memory: BTreeMap::new(),
            streams: HashMap::new(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            graphs: HashMap::new(),
            executables: HashMap::new(),
            contexts: 0,
            unpacked: compute::Unpacked::default(),
            signatures: HashMap::new(),
            plant: None,
            runner: None,
            memories: plants::Remembered::default(),
            faults: Vec::new(),
            log: Vec::new(),
            calls: 0,
            calls_of: HashMap::new(),
            launches: 0,
            lost: None,
            hung: false,
            endless_waits: 0,
            abandoned: false,
            clock: 0,
            memory_bytes: 1 << 30,
            compute: (9, 0),
            multiprocessors: 4,
            devices: 1,
            version: 13_000,
        }
    }

    /// What a new process would find. Host memory that is still handed out stays where it is: in a
    /// lost context it is not given back, and its owner may still look at it.
    pub(super) fn restart(&mut self) {
        let old = std::mem::replace(self, Self::new());
        self.next = old.next;
        self.next_address = old.next_address;
        self.unpacked = old.unpacked;
        self.signatures = old.signatures;
        self.runner = old.runner;
        for memory in old.memory.into_values().filter(|m| m.pinned) {
            std::mem::forget(memory);
        }
    }

    pub(super) fn handle(&mut self) -> u64 {
        self.next += 0x10;
        self.next
    }

    /// Takes note of a call: its result if the script or the lost context has one.
    pub(super) fn enter(&mut self, call: &'static str) -> Result<(), u32> {
        let (index, of_call) = (self.calls, self.calls_of.entry(call).or_default());
        let nth = std::mem::replace(of_call, *of_call + 1);
        self.calls += 1;
        self.log.push(call);
        // What only describes a code works in any state.
        if call.starts_with("cuGetError") {
            return Ok(());
        }
        let result = self.scripted(call, index, nth);
        if result.is_err() && call == "cuStreamEndCapture" {
            // Whatever it says, the capture is over.
            self.streams.values_mut().for_each(|s| s.capture = None);
        }
        result
    }

    fn scripted(&mut self, call: &'static str, index: usize, nth: usize) -> Result<(), u32> {
        if let Some(code) = self.lost {
            return Err(code);
        }
        let hit = self.faults.iter().find_map(|fault| match *fault {
            Fault::At { index: i, code } if i == index => Some(code),
            Fault::Nth { call: c, nth: n, code } if c == call && n == nth => Some(code),
            _ => None,
        });
        match hit {
            None => Ok(()),
            Some(code) => Err(self.fail(code)),
        }
    }

    /// A code of the driver's own: a fatal one stays.
    pub(super) fn fail(&mut self, code: u32) -> u32 {
        use decode_graph::cuda::driver::{Class, classify};
        match classify(code) {
            Class::Fatal => self.lost = Some(code),
            Class::Capture => self.invalidate(),
            Class::Recoverable => {}
        }
        code
    }

    pub(super) fn live(&self) -> Live {
        let sum =
            |pinned| self.memory.values().filter(move |m| m.pinned == pinned).map(|m| m.bytes);
        Live {
            device_bytes: sum(false).sum(),
            host_bytes: sum(true).sum(),
            streams: self.streams.len(),
            events: self.events.len(),
            modules: self.modules.len(),
            graphs: self.graphs.len(),
            executables: self.executables.len(),
            contexts: self.contexts,
        }
    }

    // --- Memory ------------------------------------------------------------------------------

    pub(super) fn allocate(&mut self, bytes: usize, pinned: bool) -> Result<u64, u32> {
        if bytes == 0 {
            return Err(code::INVALID_VALUE);
        }
        let used = self.live().device_bytes;
        if !pinned && used.saturating_add(bytes) > self.memory_bytes {
            return Err(code::OUT_OF_MEMORY);
        }
        let address = self.next_address;
        // A red zone behind each: nothing is ever mapped there.
        self.next_address += (bytes as u64 + 4096).next_multiple_of(4096);
        let mut words = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        // What nobody wrote is not zero.
        bytemuck::cast_slice_mut::<_, u8>(&mut words).fill(0xCD);
        self.memory.insert(address, Memory { bytes, words, pinned });
        Ok(address)
    }

    /// The allocation that holds all of `bytes` bytes at `address`, and where in it.
    fn find(&self, address: u64, bytes: usize) -> Result<(u64, Range<usize>), u32> {
        let (base, memory) =
            self.memory.range(..=address).next_back().ok_or(code::ILLEGAL_ADDRESS)?;
        let from = (address - base) as usize;
        match from.checked_add(bytes) {
            Some(end) if end <= memory.bytes => Ok((*base, from..end)),
            _ => Err(code::ILLEGAL_ADDRESS),
        }
    }

    pub(super) fn read(&self, address: u64, bytes: usize) -> Result<&[u8], u32> {
        let (base, range) = self.find(address, bytes)?;
        Ok(&self.memory[&base].bytes()[range])
    }

    pub(super) fn write(&mut self, address: u64, data: &[u8]) -> Result<(), u32> {
        self.target(address, data.len())?.copy_from_slice(data);
        Ok(())
    }

    /// `bytes` bytes at `address`, to be written.
    pub(super) fn target(&mut self, address: u64, bytes: usize) -> Result<&mut [u8], u32> {
        let (base, range) = self.find(address, bytes)?;
        let memory = self.memory.get_mut(&base).ok_or(code::ILLEGAL_ADDRESS)?;
        Ok(&mut memory.bytes_mut()[range])
    }

    /// Where an address really is; what is none stays as it is.
    pub(super) fn on_host(&mut self, address: u64) -> u64 {
        let Ok((base, range)) = self.find(address, 1) else { return address };
        let memory = self.memory.get_mut(&base).map(|m| m.host() as u64);
        memory.map_or(address, |host| host + range.start as u64)
    }

    pub(super) fn contents(&self) -> Vec<(u64, Vec<u8>)> {
        let on_device = self.memory.iter().filter(|(_, m)| !m.pinned);
        on_device.map(|(address, m)| (*address, m.bytes().to_vec())).collect()
    }

    /// The `rows` of a persistent kernel's program at `address`, with addresses of the host.
    pub(super) fn program_on_host(&mut self, address: u64, rows: usize) -> Result<Vec<Row>, u32> {
        let mut program = vec![Row([0; SLOTS]); rows];
        let bytes = self.read(address, size_of_val(program.as_slice()))?.to_vec();
        let slots = program.iter_mut().flat_map(|row| &mut row.0);
        for (slot, bytes) in slots.zip(bytes.chunks_exact(8)) {
            let mut word = [0; 8];
            word.copy_from_slice(bytes);
            *slot = self.on_host(u64::from_le_bytes(word));
        }
        Ok(program)
    }

    /// Gives the allocation at `base` another address.
    pub(super) fn move_away(&mut self, base: u64) {
        if let Some(memory) = self.memory.remove(&base) {
            let address = self.next_address;
            self.next_address += (memory.bytes as u64 + 4096).next_multiple_of(4096);
            self.memory.insert(address, memory);
        }
    }

    /// Start of the allocation that `address` is in.
    pub(super) fn base(&self, address: u64) -> Result<u64, u32> {
        Ok(self.find(address, 1)?.0)
    }

    // --- Capture -----------------------------------------------------------------------------

    pub(super) fn is_capturing(&self) -> bool {
        self.abandoned || self.streams.values().any(|s| s.capture.is_some())
    }

    /// Spoils every capture of this thread.
    pub(super) fn invalidate(&mut self) {
        let me = Some(std::thread::current().id());
        for stream in self.streams.values_mut().filter(|s| s.thread == me) {
            if let Some(capture) = &mut stream.capture {
                capture.invalidated = true;
            }
        }
    }

    /// Refuses what may not be called on a thread that captures (mode thread-local): the capture is
    /// spoiled.
    pub(super) fn unsafe_in_capture(&mut self) -> Result<(), u32> {
        let me = Some(std::thread::current().id());
        if self.streams.values().any(|s| s.thread == me && s.capture.is_some()) {
            return Err(self.fail(code::CAPTURE_UNSUPPORTED));
        }
        Ok(())
    }

    /// Refuses to wait for, or ask about, a stream that captures.
    pub(super) fn settled(&mut self, stream: u64) -> Result<(), u32> {
        let stream = self.streams.get(&stream).ok_or(code::INVALID_HANDLE)?;
        if stream.capture.is_some() {
            return Err(self.fail(code::CAPTURE_UNSUPPORTED));
        }
        Ok(())
    }

    pub(super) fn begin_capture(&mut self, stream: u64) -> Result<(), u32> {
        let stream = self.streams.get_mut(&stream).ok_or(code::INVALID_HANDLE)?;
        if stream.capture.is_some() {
            return Err(code::INVALID_VALUE);
        }
        stream.capture = Some(Capture::default());
        stream.thread = Some(std::thread::current().id());
        Ok(())
    }

    /// Ends the capture whatever comes of it: a graph, unless it was spoiled.
    pub(super) fn end_capture(&mut self, stream: u64) -> Result<u64, u32> {
        let state = self.streams.get_mut(&stream).ok_or(code::INVALID_HANDLE)?;
        if state.capture.is_some() && state.thread != Some(std::thread::current().id()) {
            return Err(code::CAPTURE_WRONG_THREAD);
        }
        let capture = state.capture.take().ok_or(code::INVALID_VALUE)?;
        state.thread = None;
        if capture.invalidated {
            return Err(code::CAPTURE_INVALIDATED);
        }
        let mut nodes = capture.nodes;
        plants::plant_in_capture(self.plant, &mut nodes);
        let nodes = nodes.into_iter().map(|n| (self.handle(), n)).collect();
        let graph = self.handle();
        self.graphs.insert(graph, nodes);
        Ok(graph)
    }

    // --- Work --------------------------------------------------------------------------------

    /// Runs or records a kernel.
    pub(super) fn launch(&mut self, stream: u64, node: Node) -> Result<(), u32> {
        if stream == 0 {
            // The legacy stream waits for all others: not while one of them captures.
            if self.is_capturing() {
                return Err(self.fail(code::CAPTURE_IMPLICIT));
            }
            return self.run(&[node]);
        }
        let state = self.streams.get_mut(&stream).ok_or(code::INVALID_HANDLE)?;
        let third = state.capture.as_ref().is_some_and(|c| c.nodes.len() == 3);
        if third && self.plant == Some(Plant::OtherStream) && !self.memories.strayed {
            self.memories.strayed = true;
            return self.run(&[node]);
        }
        match &mut state.capture {
            Some(capture) if capture.invalidated => Err(code::CAPTURE_INVALIDATED),
            Some(capture) => {
                capture.nodes.push(node);
                Ok(())
            }
            None => self.run(&[node]),
        }
    }

    /// Runs kernels one after another. A fault in one is told by the calls after this one.
    pub(super) fn run(&mut self, nodes: &[Node]) -> Result<(), u32> {
        let nth = self.launches;
        self.launches += 1;
        for fault in self.faults.clone() {
            match fault {
                Fault::Later { nth: n, code } if n == nth => {
                    self.lost = Some(code);
                    return Ok(());
                }
                Fault::Hang { nth: n } if nth >= n => self.hung = true,
                Fault::ClockBack { nth: n } if n == nth => self.clock /= 2,
                _ => {}
            }
        }
        if self.hung {
            return Ok(());
        }
        let last = nodes.len().saturating_sub(1);
        for (i, node) in nodes.iter().enumerate() {
            self.clock += 1000;
            if let Err(code) = kernels::run(self, node, (i, last)) {
                self.lost = Some(code);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Waits until everything is done.
    pub(super) fn wait(&mut self) -> Result<(), u32> {
        if self.hung {
            self.endless_waits += 1;
            return Err(code::NOT_READY);
        }
        Ok(())
    }
}
