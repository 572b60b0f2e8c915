//! The entry points: what they read and write through pointers, and which rules they keep.

use super::state::{CONTEXT, CURRENT, Function, Node, STATE, State, code};
use decode_graph::cuda::driver::api::{
    DevicePtr, Driver, EdgeData, KernelNodeParams, LaunchConfig, Raw,
};
use decode_graph::cuda::kernels::entry_parameters;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// Writes to a place that the caller gives.
macro_rules! put {
    ($place:expr, $value:expr) => {{
        let (place, value) = ($place, $value);
        if place.is_null() {
            return Err(code::INVALID_VALUE);
        }
        // SAFETY: the driver's contract: a place to write to.
        unsafe { place.write(value) }
    }};
}

macro_rules! entries {
    ($(fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$s:ident| $body:block)*) => {
        $(
            #[allow(non_snake_case, reason = "the driver's own names")]
            #[allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
            unsafe extern "C" fn $name($($arg: $ty),*) -> u32 {
                let mut state = STATE.lock();
                let $s: &mut State = &mut state;
                let entered = $s.enter(stringify!($name)).and_then(|()| in_context(stringify!($name)));
                #[allow(clippy::redundant_closure_call, reason = "`?` in the bodies")]
                match entered.and_then(|()| (|| $body)()) {
                    Ok(()) => 0,
                    Err(code) => code,
                }
            }
        )*

        /// All of them.
        pub(super) fn driver() -> Driver {
            Driver { $($name: Some($name),)* ..Driver::default() }
        }
    };
}

/// Refuses what needs a context on a thread that has none.
fn in_context(call: &str) -> Result<(), u32> {
    let free = ["cuInit", "cuDriver", "cuGetError", "cuDevice", "cuCtxSetCurrent"];
    let needed = !free.iter().any(|prefix| call.starts_with(prefix));
    if needed && CURRENT.get() != CONTEXT { Err(code::INVALID_CONTEXT) } else { Ok(()) }
}

fn raw(handle: u64) -> Raw {
    std::ptr::without_provenance_mut(handle as usize)
}

fn id(handle: Raw) -> u64 {
    handle.addr() as u64
}

/// Copies `text` with its NUL to `to`, which has room for `bytes`.
fn put_text(to: *mut c_char, bytes: c_int, text: &CStr) -> Result<(), u32> {
    let text = text.to_bytes_with_nul();
    let count = text.len().min(usize::try_from(bytes).unwrap_or(0));
    // SAFETY: the driver's contract: room for `bytes` bytes.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr().cast(), to, count) };
    Ok(())
}

/// Copies `items` to `to`, whose room is `*count`; with a null list gives their number.
fn put_list<T: Copy>(to: *mut T, count: *mut usize, items: &[T]) -> Result<(), u32> {
    if !to.is_null() {
        // SAFETY: the driver's contract: `count` holds the room of the list.
        let room = unsafe { count.read() };
        let n = room.min(items.len());
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), to, n) };
    }
    put!(count, items.len());
    Ok(())
}

/// Copies the parameters of a launch, as many and as wide as the PTX declares them.
fn parameters(function: &Function, args: *mut *mut c_void) -> Vec<u64> {
    let read = |(i, bytes): (usize, &usize)| {
        // SAFETY: the launch's contract: one pointer a parameter.
        let at = unsafe { args.add(i) };
        // SAFETY: as above.
        let at = unsafe { at.read() };
        let mut value = [0u8; 8];
        // SAFETY: each points at as many bytes as the parameter is wide, at most 8.
        unsafe { std::ptr::copy_nonoverlapping(at.cast(), value.as_mut_ptr(), *bytes) };
        u64::from_le_bytes(value)
    };
    function.parameters.iter().enumerate().map(read).collect()
}

#[allow(clippy::too_many_arguments, reason = "the driver's own signatures")]
fn launch(
    s: &mut State,
    function: Raw,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    stream: Raw,
    args: *mut *mut c_void,
    (programmatic, cooperative): (bool, bool),
) -> Result<(), u32> {
    let f = s.functions.get(&id(function)).ok_or(code::INVALID_HANDLE)?;
    let threads: u32 = block.iter().product();
    if grid.contains(&0) || threads == 0 || threads > 1024 || shared_bytes > SHARED_OPTIN as u32 {
        return Err(code::INVALID_VALUE);
    }
    // A block on every multiprocessor, none waits for another to end.
    if cooperative && grid.iter().product::<u32>() > s.multiprocessors as u32 {
        return Err(code::COOPERATIVE_LAUNCH_TOO_LARGE);
    }
    let args = parameters(f, args);
    let function = id(function);
    s.launch(
        id(stream),
        Node { function, grid, block, shared_bytes, programmatic, cooperative, args },
    )
}

fn node(s: &State, node: Raw) -> Result<&Node, u32> {
    let all = s.graphs.values().flatten();
    all.into_iter().find(|(n, _)| *n == id(node)).map(|(_, n)| n).ok_or(code::INVALID_HANDLE)
}

/// From, to, programmatic of every edge: one chain.
fn edges(s: &State, graph: Raw) -> Result<Vec<(Raw, Raw, EdgeData)>, u32> {
    let nodes = s.graphs.get(&id(graph)).ok_or(code::INVALID_HANDLE)?;
    let edge = |pair: &[(u64, Node)]| {
        let kind = u8::from(pair[1].1.programmatic);
        let data = EdgeData { from_port: kind, kind, ..EdgeData::default() };
        (raw(pair[0].0), raw(pair[1].0), data)
    };
    Ok(nodes.windows(2).map(edge).collect())
}

const SHARED_OPTIN: c_int = 232_448;

/// The newest PTX that a driver of this CUDA version compiles.
fn newest_ptx(driver: i32) -> (i32, i32) {
    match (driver / 1000, driver % 1000 / 10) {
        (12, minor) => (8, if minor > 5 { minor - 1 } else { minor }),
        (major, minor) => (major - 4, minor),
    }
}

entries! {
    fn cuInit(_flags: c_uint) |s| { if s.devices == 0 { Err(code::NO_DEVICE) } else { Ok(()) } }
    fn cuDriverGetVersion(version: *mut c_int) |s| { put!(version, s.version); Ok(()) }
    fn cuGetErrorName(code: u32, text: *mut *const c_char) |_s| {
        let name = match code {
            1 => c"CUDA_ERROR_INVALID_VALUE",
            700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            901 => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
            _ => return Err(super::state::code::INVALID_VALUE),
        };
        put!(text, name.as_ptr());
        Ok(())
    }
    fn cuGetErrorString(_code: u32, text: *mut *const c_char) |_s| {
        put!(text, c"as the script says".as_ptr());
        Ok(())
    }

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int) |s| {
        if ordinal >= s.devices {
            return Err(code::INVALID_DEVICE);
        }
        put!(device, ordinal);
        Ok(())
    }
    fn cuDeviceGetCount(count: *mut c_int) |s| { put!(count, s.devices); Ok(()) }
    fn cuDeviceGetName(text: *mut c_char, bytes: c_int, _device: c_int) |_s| {
        put_text(text, bytes, c"a fake of the tests")
    }
    fn cuDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, _device: c_int) |_s| {
        put_text(text, bytes, c"0000:00:00.0")
    }
    fn cuDeviceTotalMem_v2(bytes: *mut usize, _device: c_int) |s| {
        put!(bytes, s.memory_bytes);
        Ok(())
    }
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, _device: c_int) |s| {
        let answer = match attribute {
            1 => 1024,
            13 => 1_980_000,
            16 => s.multiprocessors,
            36 => 2_600_000,
            37 => 6144,
            38 => 50 << 20,
            39 => 2048,
            75 => s.compute.0,
            76 => s.compute.1,
            81 => 233_472,
            97 => SHARED_OPTIN,
            108 => 32 << 20,
            _ => return Err(code::INVALID_VALUE),
        };
        put!(value, answer);
        Ok(())
    }
    fn cuDevicePrimaryCtxRetain(context: *mut Raw, _device: c_int) |s| {
        s.contexts += 1;
        put!(context, raw(CONTEXT as u64));
        Ok(())
    }
    fn cuDevicePrimaryCtxRelease_v2(_device: c_int) |s| {
        s.contexts = s.contexts.checked_sub(1).ok_or(code::INVALID_CONTEXT)?;
        Ok(())
    }
    fn cuCtxSetCurrent(context: Raw) |s| {
        if !context.is_null() && s.contexts == 0 {
            return Err(code::INVALID_CONTEXT);
        }
        CURRENT.set(context.addr());
        Ok(())
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |s| {
        put!(free, s.memory_bytes - s.live().device_bytes.min(s.memory_bytes));
        put!(total, s.memory_bytes);
        Ok(())
    }
    fn cuMemAlloc_v2(address: *mut DevicePtr, bytes: usize) |s| {
        s.unsafe_in_capture()?;
        put!(address, s.allocate(bytes, false)?);
        Ok(())
    }
    fn cuMemFree_v2(address: DevicePtr) |s| {
        s.unsafe_in_capture()?;
        let known = s.memory.get(&address).is_some_and(|m| !m.pinned);
        if !known {
            return Err(code::INVALID_VALUE);
        }
        s.memory.remove(&address);
        s.wait()
    }
    fn cuMemHostAlloc(host: *mut *mut c_void, bytes: usize, _flags: c_uint) |s| {
        s.unsafe_in_capture()?;
        let address = s.allocate(bytes, true)?;
        let memory = s.memory.get_mut(&address).ok_or(code::INVALID_VALUE)?;
        put!(host, memory.host().cast());
        Ok(())
    }
    fn cuMemFreeHost(host: *mut c_void) |s| {
        s.unsafe_in_capture()?;
        let address = pinned(s, host)?;
        s.memory.remove(&address);
        s.wait()
    }
    fn cuMemHostGetDevicePointer_v2(to: *mut DevicePtr, host: *mut c_void, _flags: c_uint) |s| {
        put!(to, pinned(s, host)?);
        Ok(())
    }
    fn cuMemcpyHtoDAsync_v2(to: DevicePtr, from: *const c_void, bytes: usize, stream: Raw) |s| {
        // A real driver would record a copy: no plan has one.
        s.settled(id(stream))?;
        if s.hung {
            return Ok(());
        }
        let to = s.target(to, bytes).map_err(|_| code::INVALID_VALUE)?;
        // SAFETY: the copy's contract: `bytes` bytes to read.
        unsafe { std::ptr::copy_nonoverlapping(from.cast(), to.as_mut_ptr(), bytes) };
        Ok(())
    }
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: DevicePtr, bytes: usize, stream: Raw) |s| {
        s.settled(id(stream))?;
        if s.hung {
            return Ok(());
        }
        let from = s.read(from, bytes).map_err(|_| code::INVALID_VALUE)?;
        // SAFETY: the copy's contract: `bytes` bytes to write.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.cast(), bytes) };
        Ok(())
    }
    fn cuMemsetD8Async(to: DevicePtr, value: u8, bytes: usize, stream: Raw) |s| {
        s.settled(id(stream))?;
        s.target(to, bytes).map_err(|_| code::INVALID_VALUE)?.fill(value);
        Ok(())
    }

    fn cuStreamCreateWithPriority(stream: *mut Raw, flags: c_uint, _priority: c_int) |s| {
        if flags != 1 {
            return Err(code::INVALID_VALUE);
        }
        let handle = s.handle();
        s.streams.insert(handle, Default::default());
        put!(stream, raw(handle));
        Ok(())
    }
    fn cuStreamDestroy_v2(stream: Raw) |s| {
        let stream = s.streams.remove(&id(stream)).ok_or(code::INVALID_HANDLE)?;
        s.abandoned |= stream.capture.is_some();
        Ok(())
    }
    fn cuStreamSynchronize(stream: Raw) |s| {
        s.settled(id(stream))?;
        s.wait()
    }
    fn cuStreamQuery(stream: Raw) |s| {
        s.settled(id(stream))?;
        if s.hung { Err(code::NOT_READY) } else { Ok(()) }
    }
    fn cuStreamWaitEvent(stream: Raw, _event: Raw, _flags: c_uint) |s| { s.settled(id(stream)) }
    fn cuStreamBeginCapture_v2(stream: Raw, mode: c_uint) |s| {
        if mode != 1 {
            return Err(code::INVALID_VALUE);
        }
        s.begin_capture(id(stream))
    }
    fn cuStreamEndCapture(stream: Raw, graph: *mut Raw) |s| {
        match s.end_capture(id(stream)) {
            Ok(handle) => put!(graph, raw(handle)),
            Err(code) => {
                put!(graph, std::ptr::null_mut());
                return Err(code);
            }
        }
        Ok(())
    }
    fn cuStreamIsCapturing(stream: Raw, status: *mut c_uint) |s| {
        let stream = s.streams.get(&id(stream)).ok_or(code::INVALID_HANDLE)?;
        put!(status, stream.capture.as_ref().map_or(0, |c| 1 + u32::from(c.invalidated)));
        Ok(())
    }
    fn cuEventCreate(event: *mut Raw, _flags: c_uint) |s| {
        let handle = s.handle();
        s.events.insert(handle, None);
        put!(event, raw(handle));
        Ok(())
    }
    fn cuEventDestroy_v2(event: Raw) |s| {
        s.events.remove(&id(event)).map(drop).ok_or(code::INVALID_HANDLE)
    }
    fn cuEventRecord(event: Raw, stream: Raw) |s| {
        s.settled(id(stream))?;
        let clock = s.clock;
        *s.events.get_mut(&id(event)).ok_or(code::INVALID_HANDLE)? = Some(clock);
        Ok(())
    }
    fn cuEventSynchronize(event: Raw) |s| {
        s.unsafe_in_capture()?;
        s.events.get(&id(event)).ok_or(code::INVALID_HANDLE)?;
        s.wait()
    }
    fn cuEventQuery(event: Raw) |s| {
        s.unsafe_in_capture()?;
        s.events.get(&id(event)).ok_or(code::INVALID_HANDLE)?;
        if s.hung { Err(code::NOT_READY) } else { Ok(()) }
    }
    fn cuEventElapsedTime(ms: *mut f32, start: Raw, end: Raw) |s| {
        let at = |e: Raw| s.events.get(&id(e)).copied().flatten().ok_or(code::INVALID_HANDLE);
        put!(ms, (at(end)? - at(start)?) as f32 / 1e6);
        Ok(())
    }

    fn cuModuleLoadDataEx(module: *mut Raw, image: *const c_void, _count: c_uint,
        _options: *mut c_uint, _values: *mut *mut c_void) |s| {
        s.unsafe_in_capture()?;
        // SAFETY: the call's contract for PTX: NUL-terminated text.
        let text = unsafe { CStr::from_ptr(image.cast()) }.to_str();
        let text = text.map_err(|_| code::INVALID_PTX)?.to_owned();
        let (_, version) = text.split_once(".version ").ok_or(code::INVALID_PTX)?;
        let version = version.lines().next().and_then(|v| v.split_once('.'));
        let number = |text: &str| text.trim().parse::<i32>().map_err(|_| code::INVALID_PTX);
        let (major, minor) = version.ok_or(code::INVALID_PTX)?;
        if (number(major)?, number(minor)?) > newest_ptx(s.version) {
            return Err(code::UNSUPPORTED_PTX_VERSION);
        }
        let handle = s.handle();
        s.modules.insert(handle, text);
        put!(module, raw(handle));
        Ok(())
    }
    fn cuModuleUnload(module: Raw) |s| {
        s.modules.remove(&id(module)).map(drop).ok_or(code::INVALID_HANDLE)
    }
    fn cuModuleGetFunction(function: *mut Raw, module: Raw, name: *const c_char) |s| {
        // SAFETY: the call's contract: NUL-terminated text.
        let name = unsafe { CStr::from_ptr(name) }.to_owned();
        let text = s.modules.get(&id(module)).ok_or(code::INVALID_HANDLE)?;
        let key = (text.len(), name.clone());
        let parameters = match s.signatures.get(&key) {
            Some(known) => known.clone(),
            None => {
                let declared = entry_parameters(text, &name.to_string_lossy());
                let declared = declared.ok_or(code::NOT_FOUND)?;
                declared.iter().map(|p| p.bytes().unwrap_or(8)).collect()
            }
        };
        s.signatures.insert(key, parameters.clone());
        let handle = s.handle();
        s.functions.insert(handle, Function { name, parameters });
        put!(function, raw(handle));
        Ok(())
    }
    fn cuFuncLoad(function: Raw) |s| {
        s.functions.get(&id(function)).map(drop).ok_or(code::INVALID_HANDLE)
    }
    fn cuFuncSetAttribute(function: Raw, attribute: c_int, value: c_int) |s| {
        s.functions.get(&id(function)).ok_or(code::INVALID_HANDLE)?;
        if attribute == 8 && value > SHARED_OPTIN { Err(code::INVALID_VALUE) } else { Ok(()) }
    }
    fn cuFuncGetAttribute(value: *mut c_int, _attribute: c_int, function: Raw) |s| {
        s.functions.get(&id(function)).ok_or(code::INVALID_HANDLE)?;
        put!(value, 64);
        Ok(())
    }
    fn cuFuncGetName(name: *mut *const c_char, function: Raw) |s| {
        let function = s.functions.get(&id(function)).ok_or(code::INVALID_HANDLE)?;
        // The text stays where it is until the process restarts.
        put!(name, function.name.as_ptr());
        Ok(())
    }
    fn cuLaunchKernel(function: Raw, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
        block_x: c_uint, block_y: c_uint, block_z: c_uint, shared_bytes: c_uint, stream: Raw,
        args: *mut *mut c_void, _extra: *mut *mut c_void) |s| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        launch(s, function, grid, block, shared_bytes, stream, args, (false, false))
    }
    fn cuLaunchKernelEx(config: *const LaunchConfig, function: Raw, args: *mut *mut c_void,
        _extra: *mut *mut c_void) |s| {
        // SAFETY: the call's contract: a configuration, and in it a list as long as it says.
        let c = unsafe { &*config };
        // SAFETY: as above.
        let list = unsafe { std::slice::from_raw_parts(c.attributes, c.attribute_count as usize) };
        let programmatic = list.iter().any(|a| a.id == 6 && a.value[0] as u32 != 0);
        let cooperative = list.iter().any(|a| a.id == 2 && a.value[0] as u32 != 0);
        let kind = (programmatic, cooperative);
        launch(s, function, c.grid, c.block, c.shared_bytes, c.stream, args, kind)
    }

    fn cuGraphGetNodes(graph: Raw, nodes: *mut Raw, count: *mut usize) |s| {
        let all = s.graphs.get(&id(graph)).ok_or(code::INVALID_HANDLE)?;
        put_list(nodes, count, &all.iter().map(|(n, _)| raw(*n)).collect::<Vec<_>>())
    }
    fn cuGraphNodeGetType(of: Raw, kind: *mut c_uint) |s| {
        node(s, of)?;
        put!(kind, 0);
        Ok(())
    }
    fn cuGraphKernelNodeGetParams_v2(of: Raw, params: *mut KernelNodeParams) |s| {
        let n = node(s, of)?;
        let null: Raw = std::ptr::null_mut();
        put!(params, KernelNodeParams {
            function: raw(n.function),
            grid: n.grid,
            block: n.block,
            shared_bytes: n.shared_bytes,
            args: null.cast(),
            extra: null.cast(),
            kernel: null,
            context: raw(CONTEXT as u64),
        });
        Ok(())
    }
    fn cuGraphGetEdges(graph: Raw, from: *mut Raw, to: *mut Raw, count: *mut usize) |s| {
        let edges = edges(s, graph)?;
        let mut room = if from.is_null() { 0 } else {
            // SAFETY: the call's contract: `count` holds the room of the lists.
            unsafe { count.read() }
        };
        put_list(to, &raw mut room, &edges.iter().map(|e| e.1).collect::<Vec<_>>())?;
        put_list(from, count, &edges.iter().map(|e| e.0).collect::<Vec<_>>())
    }
    fn cuGraphGetEdges_v2(graph: Raw, from: *mut Raw, to: *mut Raw, data: *mut EdgeData,
        count: *mut usize) |s| {
        let edges = edges(s, graph)?;
        let mut room = if from.is_null() { 0 } else {
            // SAFETY: the call's contract: `count` holds the room of the lists.
            unsafe { count.read() }
        };
        put_list(to, &raw mut room, &edges.iter().map(|e| e.1).collect::<Vec<_>>())?;
        put_list(data, &raw mut room, &edges.iter().map(|e| e.2).collect::<Vec<_>>())?;
        put_list(from, count, &edges.iter().map(|e| e.0).collect::<Vec<_>>())
    }
    fn cuGraphDebugDotPrint(_graph: Raw, path: *const c_char, _flags: c_uint) |_s| {
        // SAFETY: the call's contract: NUL-terminated text.
        let path = unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned();
        std::fs::write(path, "digraph {}\n").map_err(|_| code::INVALID_VALUE)
    }
    fn cuGraphInstantiateWithFlags(exec: *mut Raw, graph: Raw, _flags: u64) |s| {
        s.unsafe_in_capture()?;
        let nodes = s.graphs.get(&id(graph)).ok_or(code::INVALID_HANDLE)?;
        let nodes = nodes.iter().map(|(_, n)| n.clone()).collect();
        let handle = s.handle();
        s.executables.insert(handle, nodes);
        put!(exec, raw(handle));
        Ok(())
    }
    fn cuGraphUpload(exec: Raw, stream: Raw) |s| {
        s.settled(id(stream))?;
        s.executables.get(&id(exec)).map(drop).ok_or(code::INVALID_HANDLE)
    }
    fn cuGraphLaunch(exec: Raw, stream: Raw) |s| {
        s.settled(id(stream))?;
        let nodes = s.executables.get(&id(exec)).ok_or(code::INVALID_HANDLE)?.clone();
        s.run(&nodes)
    }
    fn cuGraphExecDestroy(exec: Raw) |s| {
        s.executables.remove(&id(exec)).map(drop).ok_or(code::INVALID_HANDLE)
    }
    fn cuGraphDestroy(graph: Raw) |s| {
        s.graphs.remove(&id(graph)).map(drop).ok_or(code::INVALID_HANDLE)
    }

    fn cuProfilerStart() |_s| { Ok(()) }
    fn cuProfilerStop() |_s| { Ok(()) }
}

/// Device address of pinned memory.
fn pinned(s: &mut State, host: *mut c_void) -> Result<u64, u32> {
    let mut found = s.memory.iter_mut().filter(|(_, m)| m.pinned);
    let found = found.find_map(|(at, m)| (m.host().cast() == host).then_some(*at));
    found.ok_or(code::INVALID_VALUE)
}
