//! Initialisation, devices, and the primary context with its frozen, capturing and lost states.

use core::cell::Cell;
use core::mem::ManuallyDrop;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::ffi::CStr;
use std::sync::Arc;

use cust::error::CudaError;
use once_cell::sync::OnceCell;

use super::abi::Handle;
use super::{api, fork, shim, status};
use crate::error::{Error, Result};

/// Device attributes (CUdevice_attribute) by number: an enum of one CUDA version lacks later ones.
pub mod attribute {
    /// Threads in a block, at most.
    pub const MAX_THREADS_PER_BLOCK: i32 = 1;
    /// Peak clock of the multiprocessors, kHz.
    pub const CLOCK_RATE_KHZ: i32 = 13;
    /// Multiprocessors.
    pub const MULTIPROCESSOR_COUNT: i32 = 16;
    /// Peak clock of the memory, kHz.
    pub const MEMORY_CLOCK_RATE_KHZ: i32 = 36;
    /// Width of the memory bus, bits.
    pub const GLOBAL_MEMORY_BUS_WIDTH_BITS: i32 = 37;
    /// L2 cache, bytes.
    pub const L2_CACHE_BYTES: i32 = 38;
    /// Resident threads on a multiprocessor, at most.
    pub const MAX_THREADS_PER_MULTIPROCESSOR: i32 = 39;
    /// Compute capability, before the dot.
    pub const COMPUTE_CAPABILITY_MAJOR: i32 = 75;
    /// Compute capability, after the dot.
    pub const COMPUTE_CAPABILITY_MINOR: i32 = 76;
    /// Shared memory of a multiprocessor, bytes.
    pub const SHARED_BYTES_PER_MULTIPROCESSOR: i32 = 81;
    /// Shared memory that one block may opt in to, bytes.
    pub const SHARED_BYTES_PER_BLOCK_OPTIN: i32 = 97;
    /// L2 that may be set aside for persisting accesses, bytes.
    pub const PERSISTING_L2_BYTES: i32 = 108;
}

/// Initialises the driver.
fn init() -> Result<()> {
    if let Err(why) = shim::driver_status() {
        return Err(Error::NoDevice(why.to_owned()));
    }
    fork::refuse()?;
    // Asked with a `u32` result first: cust reads the code into an enum that lacks newer ones.
    // SAFETY: no conditions.
    let code = unsafe { api::cuInit(0) };
    match code {
        0 => {}
        shim::NO_DEVICE => return Err(status::no_device()),
        code => {
            let name = status::describe(code);
            return Err(Error::NoDevice(format!("cuInit failed: {name} ({code})")));
        }
    }
    fork::watch();
    cust::init(cust::CudaFlags::empty()).map_err(|e| from_cust("initialisation", "cuInit", e))
}

fn from_cust(at: &str, call: &'static str, error: CudaError) -> Error {
    status::error(at, call, error as u32)
}

/// One CUDA device, by its ordinal after CUDA_VISIBLE_DEVICES.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    device: cust::device::Device,
    ordinal: u32,
}

/// What a report says of a device. Clocks are `None` where the driver does not tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Ordinal after CUDA_VISIBLE_DEVICES.
    pub ordinal: u32,
    /// Product name.
    pub name: String,
    /// PCI address, `domain:bus:device.function`.
    pub pci_bus_id: String,
    /// Compute capability, (major, minor).
    pub compute_capability: (u32, u32),
    /// Streaming multiprocessors.
    pub sm_count: u32,
    /// L2 cache, bytes.
    pub l2_bytes: u64,
    /// Shared memory that one block may opt in to, bytes.
    pub shared_optin_bytes: u32,
    /// Device memory, bytes.
    pub memory_bytes: u64,
    /// Peak multiprocessor clock, kHz.
    pub clock_khz: Option<u32>,
    /// Peak memory clock, kHz.
    pub memory_clock_khz: Option<u32>,
    /// Memory bus, bits.
    pub memory_bus_bits: Option<u32>,
    /// CUDA version of the driver, 1000 × major + 10 × minor.
    pub driver_version: u32,
}

impl Device {
    /// All devices that the process may see.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] without a driver or a device, with the reason.
    pub fn all() -> Result<Vec<Self>> {
        init()?;
        // Each question is asked with a `u32` result before cust asks it, as in `init`.
        let mut count = 0;
        // SAFETY: `count` is a place to write to.
        let code = unsafe { api::cuDeviceGetCount(&raw mut count) };
        status::check("device count", "cuDeviceGetCount", code)?;
        let count = cust::device::Device::num_devices()
            .map_err(|e| from_cust("device count", "cuDeviceGetCount", e))?;
        if count == 0 {
            return Err(status::no_device());
        }
        (0..count)
            .map(|ordinal| {
                let mut raw = 0;
                // SAFETY: `raw` is a place to write to.
                let code = unsafe { api::cuDeviceGet(&raw mut raw, ordinal.cast_signed()) };
                status::check("device", "cuDeviceGet", code)?;
                let device = cust::device::Device::get_device(ordinal)
                    .map_err(|e| from_cust("device", "cuDeviceGet", e))?;
                Ok(Self { device, ordinal })
            })
            .collect()
    }

    /// The device of this ordinal, after CUDA_VISIBLE_DEVICES.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] without a driver, or where there is no such device.
    pub fn get(ordinal: u32) -> Result<Self> {
        let all = Self::all()?;
        all.get(ordinal as usize).copied().ok_or_else(|| {
            let last = all.len().saturating_sub(1);
            Error::NoDevice(format!(
                "device {ordinal} was asked for, devices 0 to {last} are visible (after CUDA_VISIBLE_DEVICES)"
            ))
        })
    }

    /// The ordinal, after CUDA_VISIBLE_DEVICES.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// An attribute by its number, one of [`attribute`].
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] where this driver does not know the number.
    pub fn attribute(&self, number: i32) -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is a place to write to.
        let code =
            unsafe { api::cuDeviceGetAttribute(&raw mut value, number, self.device.as_raw()) };
        status::check("device attribute", "cuDeviceGetAttribute", code)?;
        u32::try_from(value).map_err(|_| {
            Error::Internal(format!("device attribute {number} is {value}, below zero"))
        })
    }

    /// Everything that a report says of this device.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver refuses one of the questions.
    pub fn info(&self) -> Result<DeviceInfo> {
        let mut memory = 0;
        // SAFETY: `memory` is a place to write to.
        let code = unsafe { api::cuDeviceTotalMem_v2(&raw mut memory, self.device.as_raw()) };
        status::check("device", "cuDeviceTotalMem_v2", code)?;
        Ok(DeviceInfo {
            ordinal: self.ordinal,
            name: self.name()?,
            pci_bus_id: self.pci_bus_id()?,
            compute_capability: (
                self.attribute(attribute::COMPUTE_CAPABILITY_MAJOR)?,
                self.attribute(attribute::COMPUTE_CAPABILITY_MINOR)?,
            ),
            sm_count: self.attribute(attribute::MULTIPROCESSOR_COUNT)?,
            l2_bytes: u64::from(self.attribute(attribute::L2_CACHE_BYTES)?),
            shared_optin_bytes: self.attribute(attribute::SHARED_BYTES_PER_BLOCK_OPTIN)?,
            memory_bytes: memory as u64,
            clock_khz: self.attribute(attribute::CLOCK_RATE_KHZ).ok(),
            memory_clock_khz: self.attribute(attribute::MEMORY_CLOCK_RATE_KHZ).ok(),
            memory_bus_bits: self.attribute(attribute::GLOBAL_MEMORY_BUS_WIDTH_BITS).ok(),
            driver_version: driver_version()?,
        })
    }

    fn name(&self) -> Result<String> {
        let mut text = [0u8; 256];
        // SAFETY: 255 bytes may be written, so the last stays NUL.
        let code =
            unsafe { api::cuDeviceGetName(text.as_mut_ptr().cast(), 255, self.device.as_raw()) };
        status::check("device", "cuDeviceGetName", code)?;
        let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }

    fn pci_bus_id(&self) -> Result<String> {
        let mut text = [0u8; 32];
        // SAFETY: 31 bytes may be written, so the last stays NUL.
        let code =
            unsafe { api::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), 31, self.device.as_raw()) };
        status::check("device", "cuDeviceGetPCIBusId", code)?;
        let text = CStr::from_bytes_until_nul(&text).unwrap_or_default();
        Ok(text.to_string_lossy().into_owned())
    }
}

/// CUDA version of the driver, 1000 × major + 10 × minor.
pub(super) fn driver_version() -> Result<u32> {
    let mut version = 0;
    // SAFETY: `version` is a place to write to.
    let code = unsafe { api::cuDriverGetVersion(&raw mut version) };
    status::check("driver version", "cuDriverGetVersion", code)?;
    Ok(u32::try_from(version).unwrap_or(0))
}

thread_local! {
    /// Id of the context that this thread made current; 0 before the first.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
    /// Whether this thread is recording a graph.
    static CAPTURING: Cell<bool> = const { Cell::new(false) };
}

/// Marks this thread as recording, until dropped. `None` when it is already.
pub(super) struct Capturing(());

impl Capturing {
    pub(super) fn begin() -> Option<Self> {
        (!CAPTURING.replace(true)).then(|| Self(()))
    }
}

impl Drop for Capturing {
    fn drop(&mut self) {
        CAPTURING.set(false);
    }
}

/// Refuses, before the driver is asked, what would break the capture of this thread.
pub(super) fn outside_capture(what: &str) -> Result<()> {
    if CAPTURING.get() {
        return Err(Error::Internal(format!(
            "{what} while a graph is being captured: do it before the capture"
        )));
    }
    Ok(())
}

/// How many guards forbid allocation.
#[derive(Debug, Default)]
struct Freeze(AtomicUsize);

impl Freeze {
    fn check(&self, what: &str, bytes: u64) -> Result<()> {
        if self.0.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(Error::Internal(format!(
            "{what}: allocation of {bytes} bytes after memory was frozen: \
             plan it in the workspace, before capture"
        )))
    }

    fn add(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn remove(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A device's primary context, shared by all owners of its objects.
#[derive(Clone, Debug)]
pub struct Context {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    primary: ManuallyDrop<cust::context::Context>,
    raw: Handle,
    device: Device,
    id: u64,
    freeze: Freeze,
    /// The first fatal error.
    lost: OnceCell<Lost>,
}

/// The fault that lost a context.
#[derive(Debug)]
struct Lost {
    at: String,
    call: &'static str,
    code: u32,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A lost context is left to the end of the process: releasing it may not return. A child's
        // is its parent's.
        if self.lost.get().is_none() && fork::refuse().is_ok() {
            // SAFETY: dropped only here, and not used after.
            unsafe { ManuallyDrop::drop(&mut self.primary) };
        }
    }
}

impl Context {
    /// The primary context of `device`, made current on this thread.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] or [`Error::Driver`] when the driver cannot make one.
    pub fn new(device: Device) -> Result<Self> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        let mut raw = core::ptr::null_mut();
        // Retained with a `u32` result first: cust reads the code into an enum that lacks newer
        // ones. The context stays alive between the two, so cust's own retain cannot fail anew.
        // SAFETY: `raw` is a place to write to.
        let code = unsafe { api::cuDevicePrimaryCtxRetain(&raw mut raw, device.device.as_raw()) };
        status::check("primary context", "cuDevicePrimaryCtxRetain", code)?;
        let retained = cust::context::Context::new(device.device)
            .map_err(|e| from_cust("primary context", "cuDevicePrimaryCtxRetain", e));
        // SAFETY: gives back the retain above.
        let _ = unsafe { api::cuDevicePrimaryCtxRelease_v2(device.device.as_raw()) };
        let primary = ManuallyDrop::new(retained?);
        let raw = Handle::new(raw)
            .ok_or_else(|| Error::Internal("the driver returned a null context".to_owned()))?;
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let inner =
            Inner { primary, raw, device, id, freeze: Freeze::default(), lost: OnceCell::new() };
        let context = Self { inner: Arc::new(inner) };
        // cust made its context current behind the back of `CURRENT`.
        CURRENT.set(0);
        context.enter()?;
        Ok(context)
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.inner.device
    }

    /// Device memory: (free, total) bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver does not answer.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are places to write to.
        let code = unsafe { api::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.check("memory", "cuMemGetInfo_v2", code)?;
        Ok((free as u64, total as u64))
    }

    /// Forbids allocation in this context as long as the guard lives: everything that a captured
    /// graph points at is allocated before.
    #[must_use = "allocation is forbidden only as long as the guard lives"]
    pub fn freeze(&self) -> Frozen {
        self.inner.freeze.add();
        Frozen { context: self.clone() }
    }

    /// The first fatal result code, after which nothing is asked of the driver any more.
    pub fn lost(&self) -> Option<u32> {
        self.inner.lost.get().map(|lost| lost.code)
    }

    /// Makes the context current on this thread; an error when it was lost. Asks the driver only
    /// when another context was current, so it costs nothing per token.
    #[inline]
    pub(super) fn enter(&self) -> Result<()> {
        if let Some(lost) = self.inner.lost.get() {
            return Err(lost_before(lost));
        }
        fork::refuse()?;
        if CURRENT.get() == self.inner.id {
            return Ok(());
        }
        // SAFETY: the context is retained as long as `inner` lives.
        let code = unsafe { api::cuCtxSetCurrent(self.inner.raw.raw()) };
        self.check("context", "cuCtxSetCurrent", code)?;
        CURRENT.set(self.inner.id);
        Ok(())
    }

    /// As [`Self::enter`], and an error while this thread records a graph.
    pub(super) fn enter_outside_capture(&self, what: &str) -> Result<()> {
        outside_capture(what)?;
        self.enter()
    }

    /// As [`Self::enter`], and an error where `bytes` may not be allocated now.
    pub(super) fn enter_to_allocate(&self, what: &str, bytes: u64) -> Result<()> {
        self.inner.freeze.check(what, bytes)?;
        self.enter_outside_capture(what)
    }

    /// Whether a Drop may still free: the context is usable, and current now.
    pub(super) fn enter_to_free(&self) -> bool {
        self.inner.lost.get().is_none() && self.enter().is_ok()
    }

    /// `Ok` for 0, else the error; a fatal code marks the context as lost.
    #[inline]
    pub(super) fn check(&self, at: &str, call: &'static str, code: u32) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(self.fail(at, call, code)) }
    }

    /// The error for a device that does not come to an end of its work; the context counts as lost,
    /// so that nothing waits for it any more.
    #[cold]
    pub(in crate::cuda) fn give_up(&self, at: &str) -> Error {
        self.fail(at, "cuStreamQuery", status::LAUNCH_TIMEOUT)
    }

    #[cold]
    fn fail(&self, at: &str, call: &'static str, code: u32) -> Error {
        // It may have failed because other code of this thread made another context current.
        CURRENT.set(0);
        let error = status::error(at, call, code);
        if let Error::Driver { fatal: true, .. } = error {
            let _ = self.inner.lost.set(Lost { at: at.to_owned(), call, code });
        }
        error
    }
}

/// The first fault again, for everything that is asked after it.
#[cold]
fn lost_before(lost: &Lost) -> Error {
    Error::Driver {
        at: format!("the context was lost before, at {}", lost.at),
        call: lost.call,
        code: lost.code,
        name: status::describe(lost.code),
        fatal: true,
    }
}

/// Forbids allocation in a context while it lives; see [`Context::freeze`].
#[derive(Debug)]
pub struct Frozen {
    context: Context,
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.context.inner.freeze.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_driver_every_way_in_says_why() {
        if shim::driver_status().is_ok() {
            return;
        }
        for error in [Device::all().unwrap_err(), Device::get(0).unwrap_err(), init().unwrap_err()]
        {
            let text = error.to_string();
            assert!(matches!(error, Error::NoDevice(_)), "{text}");
            assert!(text.contains("libcuda.so.1 could not be loaded: "), "{text}");
            assert!(!text.contains('\n'), "{text}");
        }
    }

    #[test]
    fn allocation_is_refused_while_any_freeze_lasts() {
        let freeze = Freeze::default();
        assert!(freeze.check("kv", 64).is_ok());
        freeze.add();
        freeze.add();
        freeze.remove();
        let text = freeze.check("scratch", 20480).unwrap_err().to_string();
        assert!(text.contains("scratch") && text.contains("20480 bytes"), "{text}");
        freeze.remove();
        assert!(freeze.check("kv", 64).is_ok());
    }

    #[test]
    fn what_breaks_a_capture_is_refused_on_the_capturing_thread_only() {
        let mark = Capturing::begin().unwrap();
        assert!(Capturing::begin().is_none(), "one capture a thread");
        let text = outside_capture("synchronize").unwrap_err().to_string();
        assert!(text.contains("synchronize while a graph is being captured"), "{text}");
        assert!(std::thread::spawn(|| outside_capture("copy").is_ok()).join().unwrap());
        drop(mark);
        assert!(outside_capture("synchronize").is_ok());
    }
}
