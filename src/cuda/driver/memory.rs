//! Device memory: one allocation, freed once, copied to and from only within its bounds.

use core::ffi::c_void;
use core::marker::PhantomData;

use bytemuck::Pod;

use super::context::Context;
use super::stream::Stream;
use super::{api, calls, status};
use crate::error::{Error, Result};

/// One allocation on the device, `[bytes]` u8. Share it by `Arc` with whatever points at it.
#[derive(Debug)]
pub struct DeviceMemory {
    context: Context,
    what: String,
    address: u64,
    bytes: u64,
}

/// A byte range of a [`DeviceMemory`] that cannot outlive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSlice<'a> {
    address: u64,
    bytes: u64,
    memory: PhantomData<&'a DeviceMemory>,
}

impl DeviceSlice<'_> {
    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// `offset .. offset + bytes` lies within `limit` bytes.
pub(super) fn in_bounds(what: &str, limit: u64, offset: u64, bytes: u64) -> Result<()> {
    match offset.checked_add(bytes) {
        Some(end) if end <= limit => Ok(()),
        _ => Err(Error::Internal(format!(
            "{what}: {bytes} bytes at offset {offset} are outside its {limit} bytes"
        ))),
    }
}

/// A length that the driver takes.
pub(super) fn length(what: &str, bytes: u64) -> Result<usize> {
    match usize::try_from(bytes) {
        Ok(bytes) if bytes > 0 => Ok(bytes),
        _ => Err(Error::Internal(format!("{what}: {bytes} bytes cannot be allocated"))),
    }
}

impl DeviceMemory {
    /// Allocates `bytes` bytes for `what`, a name that errors give. The content is undefined.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] with the bytes that are free; [`Error::Internal`] for 0 bytes, after
    /// [`Context::freeze`] or during a capture: then the driver is not asked.
    pub fn alloc(context: &Context, what: &str, bytes: u64) -> Result<Self> {
        let length = length(what, bytes)?;
        context.enter_to_allocate(what, bytes)?;
        calls::count_allocation();
        let mut address = 0;
        // SAFETY: `address` is a place to write to.
        let code = unsafe { api::cuMemAlloc_v2(&raw mut address, length) };
        if code == status::OUT_OF_MEMORY {
            return Err(Error::OutOfMemory {
                what: what.to_owned(),
                need: bytes,
                free: status::free_bytes(),
                advice: "use a smaller model, a shorter context or a smaller KV type, or free GPU memory"
                    .to_owned(),
            });
        }
        context.check(what, "cuMemAlloc_v2", code)?;
        Ok(Self { context: context.clone(), what: what.to_owned(), address, bytes })
    }

    /// The name it was allocated for.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Device address of the first byte; at least 256-byte aligned.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Length, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The range `offset .. offset + bytes`, bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when it is not within the allocation.
    pub fn slice(&self, offset: u64, bytes: u64) -> Result<DeviceSlice<'_>> {
        in_bounds(&self.what, self.bytes, offset, bytes)?;
        Ok(DeviceSlice { address: self.address + offset, bytes, memory: PhantomData })
    }

    /// The range of `count` values of type `T` at byte `offset`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] when it is not within the allocation or not aligned for `T`.
    pub fn typed<T: Pod>(&self, offset: u64, count: u64) -> Result<DeviceSlice<'_>> {
        let align = align_of::<T>() as u64;
        if !offset.is_multiple_of(align) {
            return Err(Error::Internal(format!(
                "{}: offset {offset} is not a multiple of {align}",
                self.what
            )));
        }
        let bytes = count.checked_mul(size_of::<T>() as u64).ok_or_else(|| {
            Error::Internal(format!("{}: {count} elements do not fit 64 bits", self.what))
        })?;
        self.slice(offset, bytes)
    }

    /// Copies `data` to byte `offset`, after the work queued on `stream`; returns when it is there.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] out of bounds or during a capture; [`Error::Driver`].
    pub fn upload<T: Pod>(&self, stream: &Stream, offset: u64, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        // SAFETY: `bytes` stays borrowed until the stream is done.
        let queued = unsafe { self.upload_async(stream, offset, bytes) };
        // Also after an error: part of the copy may be queued.
        let done = stream.synchronize();
        queued.and(done)
    }

    /// Queues a copy of `bytes` to byte `offset` on `stream`.
    ///
    /// # Errors
    ///
    /// As [`Self::upload`].
    ///
    /// # Safety
    ///
    /// `bytes` must stay alive and unchanged until the work queued on `stream` is done.
    pub unsafe fn upload_async(&self, stream: &Stream, offset: u64, bytes: &[u8]) -> Result<()> {
        let to = self.slice(offset, bytes.len() as u64)?.address();
        self.context.enter_outside_capture(&self.what)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let from = bytes.as_ptr().cast::<c_void>();
        // SAFETY: `to` has room for `bytes.len()` bytes; the caller keeps `bytes`.
        let code = unsafe { api::cuMemcpyHtoDAsync_v2(to, from, bytes.len(), stream.raw()) };
        self.context.check(&self.what, "cuMemcpyHtoDAsync_v2", code)
    }

    /// Copies from byte `offset` into `out`, after the work queued on `stream`; returns when it is
    /// there.
    ///
    /// # Errors
    ///
    /// As [`Self::upload`].
    pub fn download<T: Pod>(&self, stream: &Stream, offset: u64, out: &mut [T]) -> Result<()> {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(out);
        let from = self.slice(offset, bytes.len() as u64)?.address();
        self.context.enter_outside_capture(&self.what)?;
        if bytes.is_empty() {
            return Ok(());
        }
        let to = bytes.as_mut_ptr().cast::<c_void>();
        // SAFETY: `from` has `bytes.len()` bytes, and `out` stays borrowed until the stream is done.
        let code = unsafe { api::cuMemcpyDtoHAsync_v2(to, from, bytes.len(), stream.raw()) };
        let done = stream.synchronize();
        self.context.check(&self.what, "cuMemcpyDtoHAsync_v2", code).and(done)
    }

    /// Queues a fill of the whole allocation with `value` on `stream`.
    ///
    /// # Errors
    ///
    /// [`Error::Internal`] during a capture: a memset node would break the pairing of the kernels
    /// around it. [`Error::Driver`].
    pub fn fill(&self, stream: &Stream, value: u8) -> Result<()> {
        self.fill_range(stream, 0, self.bytes, value)
    }

    /// As [`Self::fill`], for `bytes` bytes at byte `offset`.
    ///
    /// # Errors
    ///
    /// As [`Self::fill`], and [`Error::Internal`] out of bounds.
    pub fn fill_range(&self, stream: &Stream, offset: u64, bytes: u64, value: u8) -> Result<()> {
        let to = self.slice(offset, bytes)?.address();
        self.context.enter_outside_capture(&self.what)?;
        if bytes == 0 {
            return Ok(());
        }
        let length = length(&self.what, bytes)?;
        // SAFETY: the range lies within this allocation, which is freed only after the device is
        // done with it.
        let code = unsafe { api::cuMemsetD8Async(to, value, length, stream.raw()) };
        self.context.check(&self.what, "cuMemsetD8Async", code)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: allocated in `alloc`, freed only here; cuMemFree waits for the device.
            let _ = unsafe { api::cuMemFree_v2(self.address) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_outside_its_memory_is_refused() {
        assert!(in_bounds("kv", 16, 0, 16).is_ok());
        assert!(in_bounds("kv", 16, 16, 0).is_ok());
        assert!(in_bounds("kv", 16, u64::MAX, 2).is_err(), "no wrap");
        let text = in_bounds("kv", 16, 9, 8).unwrap_err().to_string();
        assert!(text.contains("kv: 8 bytes at offset 9 are outside its 16 bytes"), "{text}");
    }

    #[test]
    fn an_empty_allocation_is_refused_by_name() {
        assert!(length("scratch", 0).unwrap_err().to_string().contains("scratch: 0 bytes"));
        assert_eq!(length("scratch", 4).unwrap(), 4);
    }
}
