//! Page-locked host memory: plain, for staging copies; mapped, for what a kernel tells the host.

use core::ffi::c_void;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use super::context::Context;
use super::memory::{in_bounds, length};
use super::{api, calls, status};
use crate::error::{Error, Result};

/// CU_MEMHOSTALLOC_PORTABLE.
const PORTABLE: u32 = 1;
/// CU_MEMHOSTALLOC_DEVICEMAP.
const MAPPED: u32 = 2;

/// The allocation itself, zeroed.
#[derive(Debug)]
struct Locked {
    context: Context,
    what: String,
    host: NonNull<u8>,
    bytes: u64,
}

// SAFETY: the allocation belongs to the process, not to a thread; access follows the owners' `&`.
unsafe impl Send for Locked {}
// SAFETY: as above; the owners write through `&mut`, or volatile.
unsafe impl Sync for Locked {}

impl Locked {
    fn alloc(context: &Context, what: &str, bytes: u64, flags: u32) -> Result<Self> {
        let length = length(what, bytes)?;
        context.enter_to_allocate(what, bytes)?;
        calls::count_allocation();
        let mut host = core::ptr::null_mut::<c_void>();
        // SAFETY: `host` is a place to write to.
        let code = unsafe { api::cuMemHostAlloc(&raw mut host, length, flags) };
        if code == status::OUT_OF_MEMORY {
            return Err(Error::OutOfMemory {
                what: format!("{what} (page-locked host memory)"),
                need: bytes,
                free: status::free_bytes(),
                advice: "the host's limit of locked memory may be reached".to_owned(),
            });
        }
        context.check(what, "cuMemHostAlloc", code)?;
        let host = NonNull::new(host.cast::<u8>()).ok_or_else(|| {
            Error::Internal(format!("{what}: the driver returned a null host address"))
        })?;
        let locked = Self { context: context.clone(), what: what.to_owned(), host, bytes };
        // SAFETY: `length` bytes were allocated at `host`, and nothing else knows them yet.
        unsafe { host.as_ptr().write_bytes(0, length) };
        Ok(locked)
    }

    fn len(&self) -> usize {
        // Fits: it came from a `usize` in `alloc`.
        self.bytes as usize
    }

    /// The address of a `T` at byte `offset`.
    fn place<T>(&self, offset: u64) -> Result<*mut T> {
        in_bounds(&self.what, self.bytes, offset, size_of::<T>() as u64)?;
        if !offset.is_multiple_of(align_of::<T>() as u64) {
            return Err(Error::Internal(format!(
                "{}: offset {offset} is not a multiple of {}",
                self.what,
                align_of::<T>()
            )));
        }
        // SAFETY: in bounds of the allocation, checked above.
        Ok(unsafe { self.host.as_ptr().add(offset as usize) }.cast::<T>())
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: allocated in `alloc`, freed only here.
            let _ = unsafe { api::cuMemFreeHost(self.host.as_ptr().cast()) };
        }
    }
}

/// Page-locked host memory for staging copies, `[bytes]` u8, zeroed.
#[derive(Debug)]
pub struct PinnedMemory {
    locked: Locked,
}

impl PinnedMemory {
    /// Allocates `bytes` bytes for `what`, a name that errors give.
    ///
    /// # Errors
    ///
    /// As [`DeviceMemory::alloc`](super::DeviceMemory::alloc).
    pub fn alloc(context: &Context, what: &str, bytes: u64) -> Result<Self> {
        Ok(Self { locked: Locked::alloc(context, what, bytes, PORTABLE)? })
    }

    /// The content.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: allocated and zeroed; written only through `&mut self` or, by contract, by a
        // copy that the caller waits for.
        unsafe { core::slice::from_raw_parts(self.locked.host.as_ptr(), self.locked.len()) }
    }

    /// The content, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and `&mut self` is exclusive.
        unsafe { core::slice::from_raw_parts_mut(self.locked.host.as_ptr(), self.locked.len()) }
    }
}

/// Page-locked host memory that kernels write and the host reads, `[bytes]` u8, zeroed.
///
/// The host reads it volatile, because the device may write at any time; no Rust reference to it
/// exists. A kernel that publishes data and then a flag needs `__threadfence_system()` between.
#[derive(Debug)]
pub struct MappedMemory {
    locked: Locked,
    device_address: u64,
}

macro_rules! volatile {
    ($($ty:ty: $read:ident, $write:ident;)*) => {$(
        /// Reads the value at byte `offset`; what the device wrote before it is visible after.
        ///
        /// # Errors
        ///
        /// [`Error::Internal`] out of bounds or misaligned.
        #[inline]
        pub fn $read(&self, offset: u64) -> Result<$ty> {
            let place = self.locked.place::<$ty>(offset)?;
            // SAFETY: in bounds, aligned, initialised; any bits are a value.
            let value = unsafe { place.read_volatile() };
            fence(Ordering::Acquire);
            Ok(value)
        }

        /// Writes the value at byte `offset`; what the host wrote before it is visible before it.
        ///
        /// # Errors
        ///
        /// [`Error::Internal`] out of bounds or misaligned.
        pub fn $write(&self, offset: u64, value: $ty) -> Result<()> {
            let place = self.locked.place::<$ty>(offset)?;
            fence(Ordering::Release);
            // SAFETY: in bounds and aligned; no reference to it exists.
            unsafe { place.write_volatile(value) };
            Ok(())
        }
    )*};
}

impl MappedMemory {
    /// Allocates `bytes` bytes for `what`, a name that errors give.
    ///
    /// # Errors
    ///
    /// As [`DeviceMemory::alloc`](super::DeviceMemory::alloc).
    pub fn alloc(context: &Context, what: &str, bytes: u64) -> Result<Self> {
        let locked = Locked::alloc(context, what, bytes, PORTABLE | MAPPED)?;
        let mut device_address = 0;
        // SAFETY: `device_address` is a place to write to; the host address was just allocated.
        let code = unsafe {
            api::cuMemHostGetDevicePointer_v2(
                &raw mut device_address,
                locked.host.as_ptr().cast(),
                0,
            )
        };
        context.check(what, "cuMemHostGetDevicePointer_v2", code)?;
        Ok(Self { locked, device_address })
    }

    /// Device address of the first byte.
    pub fn device_address(&self) -> u64 {
        self.device_address
    }

    /// Length, bytes.
    pub fn bytes(&self) -> u64 {
        self.locked.bytes
    }

    volatile! {
        u32: read_u32, write_u32;
        u64: read_u64, write_u64;
    }
}
