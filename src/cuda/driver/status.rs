//! A driver result code becomes an [`Error`]: no device, out of memory, recoverable, capture, fatal.

use core::ffi::{CStr, c_char};

use super::{api, shim};
use crate::error::{Error, Result};

/// What can still be done after a result code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// The call had no effect; the context is usable.
    Recoverable,
    /// The capture is lost; the context is usable once the capture was ended.
    Capture,
    /// The context, or the device, is lost.
    Fatal,
}

/// CUDA_ERROR_OUT_OF_MEMORY.
pub(super) const OUT_OF_MEMORY: u32 = 2;
/// CUDA_ERROR_LAUNCH_TIMEOUT.
pub(super) const LAUNCH_TIMEOUT: u32 = 702;
/// CUDA_ERROR_NOT_READY: the answer "not yet" of a query.
pub(super) const NOT_READY: u32 = 600;

/// Classifies a result code of the driver, other than 0. A code that is not known is fatal: nothing
/// says that the context survived it.
pub fn classify(code: u32) -> Class {
    match code {
        1
        | 2
        | 34..=36
        | 100
        | 101
        | 200
        | 201
        | 209
        | 218
        | 221
        | 222
        | 302
        | 400
        | 401
        | 500
        | 600
        | 801
        | 803..=805
        | 807 => Class::Recoverable,
        900..=908 | 910 => Class::Capture,
        _ => Class::Fatal,
    }
}

/// What to do about a code, where there is something to do.
fn advice(code: u32) -> Option<&'static str> {
    Some(match code {
        34 => "libcuda.so.1 is the toolkit's stub: put the driver's own library first",
        35 | 36 | 302 => "update the NVIDIA driver",
        46 | 999 => "the GPU does not answer: see the kernel log for Xid messages",
        209 => "the PTX has no code for this device: see `decode-bench doctor`",
        214 => "uncorrectable memory error: reset or replace the GPU",
        222 => "the PTX is newer than the driver: update the driver",
        700 | 714..=719 => "a kernel faulted: GPU_DEBUG=1 names the step",
        702 => "a kernel did not end, or not within the display watchdog's time",
        802 => "the GPU fabric is not ready: is nvidia-fabricmanager running?",
        803 => "the driver and its library differ in version: reboot after a driver update",
        804 => "compatibility libraries are installed for a device that has no such support",
        805..=810 => "the CUDA MPS daemon is present: restart it, or run without it",
        _ => return None,
    })
}

/// A text function of the driver: cuGetErrorName or cuGetErrorString.
type TextOf = unsafe fn(u32, *mut *const c_char) -> u32;

fn driver_text(text_of: TextOf, code: u32) -> Option<String> {
    let mut text = core::ptr::null();
    // SAFETY: `text` is a place to write to.
    let result = unsafe { text_of(code, &raw mut text) };
    if result != 0 || text.is_null() {
        return None;
    }
    // SAFETY: the driver returns static, NUL-terminated text.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// Name, text and advice for a code, one line.
pub(super) fn describe(code: u32) -> String {
    let name = driver_text(api::cuGetErrorName, code);
    let text = driver_text(api::cuGetErrorString, code);
    let mut line = match (name, text) {
        (Some(name), Some(text)) => format!("{name}: {text}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) if code == shim::SYMBOL_NOT_FOUND => {
            "this driver lacks the entry point".to_owned()
        }
        (None, None) => format!("CUDA error {code}, which this driver does not name"),
    };
    if let Some(advice) = advice(code) {
        line.push_str("; ");
        line.push_str(advice);
    }
    line
}

/// Why there is no device, when a call returned CUDA_ERROR_NO_DEVICE.
pub(super) fn no_device() -> Error {
    Error::NoDevice(match shim::driver_status() {
        Err(why) => why.to_owned(),
        Ok(()) => "the driver reports none; is CUDA_VISIBLE_DEVICES empty or -1?".to_owned(),
    })
}

/// The error for a code other than 0, returned by `call` while doing `at`.
pub(super) fn error(at: &str, call: &'static str, code: u32) -> Error {
    match code {
        shim::NO_DEVICE => no_device(),
        OUT_OF_MEMORY => Error::OutOfMemory {
            what: format!("{at}: {call} (the driver does not say how much, shown as 0)"),
            need: 0,
            free: free_bytes(),
            advice: "free GPU memory".to_owned(),
        },
        _ => Error::Driver {
            at: at.to_owned(),
            call,
            code,
            name: describe(code),
            fatal: classify(code) == Class::Fatal,
        },
    }
}

/// `Ok` for 0, else the error.
pub(super) fn check(at: &str, call: &'static str, code: u32) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(error(at, call, code)) }
}

/// Bytes free on the current context's device; 0 when the driver does not say.
pub(super) fn free_bytes() -> u64 {
    let (mut free, mut total) = (0, 0);
    // SAFETY: both are places to write to.
    let code = unsafe { api::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
    if code == 0 { free as u64 } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_in_its_class_and_an_unknown_one_is_fatal() {
        let recoverable = [
            1, 2, 34, 35, 36, 100, 101, 200, 201, 209, 218, 221, 222, 302, 400, 401, 500, 600, 801,
            803, 804, 805, 807,
        ];
        let capture = [900, 901, 902, 903, 904, 905, 906, 907, 908, 910];
        for code in 1..=1200 {
            let class = if recoverable.contains(&code) {
                Class::Recoverable
            } else if capture.contains(&code) {
                Class::Capture
            } else {
                Class::Fatal
            };
            assert_eq!(classify(code), class, "{code}");
        }
        for code in [46, 214, 220, 700, 702, 710, 714, 719, 810, 999, 12345, u32::MAX] {
            assert_eq!(classify(code), Class::Fatal, "{code}");
        }
    }

    #[test]
    fn an_unknown_code_is_printed_by_number() {
        let e = error("replay of token 7", "cuGraphLaunch", 12345);
        let text = e.to_string();
        assert!(text.starts_with("replay of token 7: cuGraphLaunch failed: "), "{text}");
        assert!(text.ends_with("(12345)"), "{text}");
        assert_eq!(e.exit_code(), 7);
    }

    #[test]
    fn causes_map_to_the_exit_codes_of_the_command_line() {
        assert_eq!(error("init", "cuInit", 100).exit_code(), 5);
        assert_eq!(error("load", "cuMemAlloc_v2", 2).exit_code(), 6);
        assert_eq!(error("step", "cuStreamSynchronize", 700).exit_code(), 7);
        assert_eq!(error("step", "cuLaunchKernel", 1).exit_code(), 1);
    }

    #[test]
    fn a_code_with_a_remedy_names_it_on_one_line() {
        for (code, remedy) in [
            (34, "toolkit's stub"),
            (35, "update the NVIDIA driver"),
            (46, "kernel log"),
            (209, "decode-bench doctor"),
            (214, "replace the GPU"),
            (222, "update the driver"),
            (700, "GPU_DEBUG=1"),
            (719, "GPU_DEBUG=1"),
            (802, "nvidia-fabricmanager"),
            (803, "reboot"),
            (807, "MPS daemon"),
            (810, "MPS daemon"),
        ] {
            let line = describe(code);
            assert!(line.contains("; ") && line.contains(remedy), "{code}: {line}");
            assert!(!line.contains('\n'), "{code}: {line}");
        }
    }
}
