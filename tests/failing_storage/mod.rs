//! A disk that fails on demand: `open64`, `pread64` and `mmap64` of this process, which the standard
//! library and memmap2 call by these names, stand here and pass on to the C library's unless the
//! thread is within [`while_storage_fails`].

#![allow(unsafe_code, reason = "entry points of the C library")]

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::PathBuf;

pub(crate) const EIO: i32 = 5;
pub(crate) const ENOMEM: i32 = 12;
pub(crate) const EACCES: i32 = 13;
pub(crate) const EMFILE: i32 = 24;
const EINTR: i32 = 4;

/// What goes wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Failure {
    /// Nothing: calls are counted.
    None,
    /// The n-th opening of a file, from 0, fails with this code.
    Open(usize, i32),
    /// Every map fails with this code.
    Maps(i32),
    /// This byte of the file whose name ends so cannot be read: a read that begins before it ends
    /// before it, one that begins there fails with EIO.
    BadByte(&'static str, u64),
    /// A read gives at most so many bytes, and every other one is interrupted before it gives any.
    Piecemeal(usize),
}

/// What was asked of the storage meanwhile.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Files in the order in which they were opened.
    pub(crate) opened: Vec<PathBuf>,
    pub(crate) reads: usize,
    pub(crate) maps: usize,
    /// How many calls failed as they were told to.
    pub(crate) failed: usize,
}

thread_local! {
    static NOW: RefCell<Option<(Failure, Seen)>> = const { RefCell::new(None) };
}

/// `f` while this thread's calls fail so.
pub(crate) fn while_storage_fails<T>(failure: Failure, f: impl FnOnce() -> T) -> (T, Seen) {
    NOW.set(Some((failure, Seen::default())));
    let made = f();
    let seen = NOW.take().map(|(_, seen)| seen).unwrap_or_default();
    (made, seen)
}

unsafe extern "C" {
    // The same functions as those with 64 in their names, where addresses have 64 bits.
    fn open(path: *const c_char, flags: c_int, mode: c_uint) -> c_int;
    fn pread(file: c_int, to: *mut c_void, bytes: usize, offset: i64) -> isize;
    fn mmap(
        at: *mut c_void,
        bytes: usize,
        protection: c_int,
        flags: c_int,
        file: c_int,
        offset: i64,
    ) -> *mut c_void;
    fn __errno_location() -> *mut c_int;
}

/// What `change` makes of the script; `None` outside of one, and in calls made in here.
fn script<T>(change: impl FnOnce(&Failure, &mut Seen) -> Option<T>) -> Option<T> {
    // A thread that ends may have no script any more.
    let (failure, mut seen) = NOW.try_with(RefCell::take).ok()??;
    let made = change(&failure, &mut seen);
    seen.failed += usize::from(made.is_some());
    NOW.set(Some((failure, seen)));
    made
}

fn fail(code: i32) {
    // SAFETY: gives the address of the thread's own number.
    let number = unsafe { __errno_location() };
    // SAFETY: as above.
    unsafe { number.write(code) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_uint) -> c_int {
    let refused = script(|failure, seen| {
        let this = seen.opened.len();
        // SAFETY: the caller's promise: text that ends with a zero.
        let name = unsafe { std::ffi::CStr::from_ptr(path) };
        seen.opened.push(name.to_string_lossy().into_owned().into());
        match failure {
            Failure::Open(which, code) if *which == this => Some(*code),
            _ => None,
        }
    });
    if let Some(code) = refused {
        fail(code);
        return -1;
    }
    // SAFETY: as it came.
    unsafe { open(path, flags, mode) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pread64(file: c_int, to: *mut c_void, bytes: usize, offset: i64) -> isize {
    let mut most = bytes;
    let refused = script(|failure, seen| {
        seen.reads += 1;
        match *failure {
            Failure::Piecemeal(_) if seen.reads % 2 == 1 => Some(EINTR),
            Failure::Piecemeal(n) => {
                most = bytes.min(n);
                None
            }
            Failure::BadByte(name, bad) if bad.wrapping_sub(offset as u64) < bytes as u64 => {
                let path = std::fs::read_link(format!("/proc/self/fd/{file}")).unwrap();
                if !path.to_string_lossy().ends_with(name) {
                    return None;
                }
                most = (bad - offset as u64) as usize;
                (most == 0).then_some(EIO)
            }
            _ => None,
        }
    });
    if let Some(code) = refused {
        fail(code);
        return -1;
    }
    // SAFETY: as it came, or fewer bytes.
    unsafe { pread(file, to, most, offset) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    at: *mut c_void,
    bytes: usize,
    protection: c_int,
    flags: c_int,
    file: c_int,
    offset: i64,
) -> *mut c_void {
    let refused = script(|failure, seen| {
        seen.maps += 1;
        match failure {
            Failure::Maps(code) => Some(*code),
            _ => None,
        }
    });
    if let Some(code) = refused {
        fail(code);
        return std::ptr::without_provenance_mut(usize::MAX);
    }
    // SAFETY: as it came.
    unsafe { mmap(at, bytes, protection, flags, file, offset) }
}
