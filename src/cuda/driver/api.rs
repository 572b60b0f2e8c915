//! The driver's entry points that this crate calls, typed, with `CUresult` as a plain `u32`.
//!
//! A result is never a Rust enum: a driver newer than the enum returns codes it lacks. Each entry
//! point is looked up by its exact versioned ELF name, once, into one process-wide [`Driver`].
//! A test can [`install`] its own table before the first use; `cust`'s calls then go there too.
//!
//! Source: CUDA Driver API reference, CUDA 12.3 and later.

use core::ffi::{CStr, c_char, c_int, c_uint, c_void};

use once_cell::sync::OnceCell;

use super::{calls, shim};

pub use super::abi::{EdgeData, KernelNodeParams, LaunchAttribute, LaunchConfig, Raw};

/// A device address (CUdeviceptr).
pub type DevicePtr = u64;

macro_rules! name {
    ($name:ident) => {
        const {
            match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("an entry point name has a NUL"),
            }
        }
    };
}

macro_rules! driver_api {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),* $(,)?);)*) => {
        /// The entry points; `None` where the driver has no such symbol.
        #[allow(non_snake_case)]
        #[derive(Clone, Copy, Debug, Default)]
        pub struct Driver {
            $(
                #[doc = concat!("`", stringify!($name), "`")]
                $(#[$doc])*
                pub $name: Option<unsafe extern "C" fn($($ty),*) -> u32>,
            )*
        }

        impl Driver {
            /// Binds every entry point that libcuda.so.1 has.
            fn bind() -> Self {
                Self {
                    $($name: shim::lookup(name!($name)).map(|address| {
                        // SAFETY: the address is that of the symbol of this name, whose C
                        // prototype is the one declared here.
                        unsafe {
                            core::mem::transmute::<
                                *const c_void,
                                unsafe extern "C" fn($($ty),*) -> u32,
                            >(address)
                        }
                    }),)*
                }
            }

            /// Address of an entry point by name.
            fn address(&self, wanted: &CStr) -> Option<*const c_void> {
                $(if wanted == name!($name) {
                    return self.$name.map(|f| f as *const c_void);
                })*
                None
            }
        }

        $(
            /// Calls the entry point of this name and counts the call.
            ///
            /// # Safety
            ///
            /// Handles must be live, pointers valid for what the driver reads or writes there.
            #[inline]
            #[allow(non_snake_case)]
            #[allow(dead_code, reason = "cust makes some of these calls, through the table only")]
            pub(super) unsafe fn $name($($arg: $ty),*) -> u32 {
                calls::count_call();
                match driver().$name {
                    // SAFETY: the caller keeps the entry point's conditions.
                    Some(f) => unsafe { f($($arg),*) },
                    None => absent(),
                }
            }
        )*
    };
}

static INSTALLED: OnceCell<Driver> = OnceCell::new();
static BOUND: OnceCell<Driver> = OnceCell::new();

/// The process-wide table: the installed one, else libcuda's.
fn driver() -> &'static Driver {
    BOUND.get_or_init(|| INSTALLED.get().copied().unwrap_or_else(Driver::bind))
}

/// Puts `table` in the place of libcuda for the whole process; for tests without a device.
///
/// Returns `false`, and changes nothing, when the driver was already used or another table is
/// installed.
///
/// # Safety
///
/// Each entry must keep the contract of the driver function whose name it bears, and the table
/// must be installed before any other thread uses the driver.
pub unsafe fn install(table: Driver) -> bool {
    BOUND.get().is_none() && INSTALLED.set(table).is_ok()
}

/// Whether a table stands in for libcuda.
pub(super) fn is_installed() -> bool {
    INSTALLED.get().is_some()
}

/// Address of an entry point in the installed table, for the symbols that `cust` calls.
pub(super) fn installed_address(name: &CStr) -> Option<*const c_void> {
    INSTALLED.get()?.address(name)
}

#[cold]
fn absent() -> u32 {
    if shim::driver_status().is_err() { shim::NO_DEVICE } else { shim::SYMBOL_NOT_FOUND }
}

driver_api! {
    fn cuInit(flags: c_uint);
    fn cuDriverGetVersion(version: *mut c_int);
    fn cuGetErrorName(code: u32, text: *mut *const c_char);
    fn cuGetErrorString(code: u32, text: *mut *const c_char);

    fn cuDeviceGet(device: *mut c_int, ordinal: c_int);
    fn cuDeviceGetCount(count: *mut c_int);
    fn cuDeviceGetName(text: *mut c_char, bytes: c_int, device: c_int);
    fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int);
    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int);
    fn cuDeviceGetPCIBusId(text: *mut c_char, bytes: c_int, device: c_int);
    fn cuDevicePrimaryCtxRetain(context: *mut Raw, device: c_int);
    fn cuDevicePrimaryCtxRelease_v2(device: c_int);
    fn cuCtxSetCurrent(context: Raw);

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    fn cuMemAlloc_v2(address: *mut DevicePtr, bytes: usize);
    fn cuMemFree_v2(address: DevicePtr);
    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    fn cuMemFreeHost(address: *mut c_void);
    fn cuMemHostGetDevicePointer_v2(address: *mut DevicePtr, host: *mut c_void, flags: c_uint);
    fn cuMemcpyHtoDAsync_v2(to: DevicePtr, from: *const c_void, bytes: usize, stream: Raw);
    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: DevicePtr, bytes: usize, stream: Raw);
    fn cuMemsetD8Async(to: DevicePtr, value: u8, bytes: usize, stream: Raw);

    fn cuStreamCreateWithPriority(stream: *mut Raw, flags: c_uint, priority: c_int);
    fn cuStreamDestroy_v2(stream: Raw);
    fn cuStreamSynchronize(stream: Raw);
    fn cuStreamQuery(stream: Raw);
    fn cuStreamWaitEvent(stream: Raw, event: Raw, flags: c_uint);
    fn cuStreamBeginCapture_v2(stream: Raw, mode: c_uint);
    fn cuStreamEndCapture(stream: Raw, graph: *mut Raw);
    fn cuStreamIsCapturing(stream: Raw, status: *mut c_uint);
    fn cuEventCreate(event: *mut Raw, flags: c_uint);
    fn cuEventDestroy_v2(event: Raw);
    fn cuEventRecord(event: Raw, stream: Raw);
    fn cuEventSynchronize(event: Raw);
    fn cuEventQuery(event: Raw);
    fn cuEventElapsedTime(milliseconds: *mut f32, start: Raw, end: Raw);

    fn cuModuleLoadDataEx(module: *mut Raw, image: *const c_void, count: c_uint,
        options: *mut c_uint, values: *mut *mut c_void);
    fn cuModuleUnload(module: Raw);
    fn cuModuleGetFunction(function: *mut Raw, module: Raw, name: *const c_char);
    /// CUDA 12.4 and later: loads a function that lazy loading has left for its first launch.
    fn cuFuncLoad(function: Raw);
    fn cuFuncSetAttribute(function: Raw, attribute: c_int, value: c_int);
    fn cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: Raw);
    /// CUDA 12.3 and later.
    fn cuFuncGetName(name: *mut *const c_char, function: Raw);
    /// CUDA 12.3 and later.
    fn cuKernelGetName(name: *mut *const c_char, kernel: Raw);
    fn cuLaunchKernel(function: Raw, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint,
        block_x: c_uint, block_y: c_uint, block_z: c_uint, shared_bytes: c_uint, stream: Raw,
        args: *mut *mut c_void, extra: *mut *mut c_void);
    /// CUDA 11.8 and later.
    fn cuLaunchKernelEx(config: *const LaunchConfig, function: Raw, args: *mut *mut c_void,
        extra: *mut *mut c_void);

    fn cuGraphGetNodes(graph: Raw, nodes: *mut Raw, count: *mut usize);
    fn cuGraphNodeGetType(node: Raw, kind: *mut c_uint);
    /// CUDA 12.0 and later.
    fn cuGraphKernelNodeGetParams_v2(node: Raw, params: *mut KernelNodeParams);
    fn cuGraphGetEdges(graph: Raw, from: *mut Raw, to: *mut Raw, count: *mut usize);
    /// CUDA 12.3 and later.
    fn cuGraphGetEdges_v2(graph: Raw, from: *mut Raw, to: *mut Raw, data: *mut EdgeData,
        count: *mut usize);
    fn cuGraphDebugDotPrint(graph: Raw, path: *const c_char, flags: c_uint);
    fn cuGraphInstantiateWithFlags(exec: *mut Raw, graph: Raw, flags: u64);
    fn cuGraphUpload(exec: Raw, stream: Raw);
    fn cuGraphLaunch(exec: Raw, stream: Raw);
    fn cuGraphExecDestroy(exec: Raw);
    fn cuGraphDestroy(graph: Raw);

    fn cuProfilerStart();
    fn cuProfilerStop();
}

/// Whether this driver has `cuGraphGetEdges_v2`.
pub(super) fn has_edge_data() -> bool {
    driver().cuGraphGetEdges_v2.is_some()
}

/// Whether this driver has `cuFuncLoad`.
pub(super) fn has_func_load() -> bool {
    driver().cuFuncLoad.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_every_entry_returns_no_device() {
        if shim::driver_status().is_ok() {
            return;
        }
        let mut version = -1;
        // SAFETY: `version` is a place to write to.
        assert_eq!(unsafe { cuDriverGetVersion(&mut version) }, shim::NO_DEVICE);
        // SAFETY: no conditions.
        assert_eq!(unsafe { cuProfilerStart() }, shim::NO_DEVICE);
        assert_eq!(version, -1);
    }

    #[test]
    fn an_entry_is_found_by_its_exact_name() {
        unsafe extern "C" fn fake_init(_: c_uint) -> u32 {
            7
        }
        let table = Driver { cuInit: Some(fake_init), ..Driver::default() };
        let expected = fake_init as unsafe extern "C" fn(c_uint) -> u32 as *const c_void;
        assert_eq!(table.address(c"cuInit"), Some(expected));
        assert_eq!(table.address(c"cuProfilerStart"), None, "absent in the table");
        assert_eq!(table.address(c"cuIni"), None, "no such entry");
    }

    #[test]
    fn a_table_is_refused_once_the_driver_was_used() {
        let _ = driver();
        // SAFETY: an empty table has no entry that could break a contract.
        assert!(!unsafe { install(Driver::default()) });
        assert!(!is_installed());
    }
}
