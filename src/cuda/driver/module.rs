//! PTX text to functions, with the compiler's log in the error.

use core::ffi::{c_int, c_void};
use std::ffi::CString;
use std::sync::Arc;

use super::abi::{Handle, Raw};
use super::api;
use super::context::{Context, driver_version};
use super::stream::non_null;
use crate::error::{Error, Result};

/// Room for each of the compiler's two logs, bytes.
const LOG_BYTES: usize = 16 << 10;

/// Compiled code on the device. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Module {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    context: Context,
    label: String,
    log: String,
    handle: Handle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.context.enter_to_free() {
            // SAFETY: loaded in `Module::load`, unloaded only here, when no function is left.
            let _ = unsafe { api::cuModuleUnload(self.handle.raw()) };
        }
    }
}

fn c_text(label: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| {
        Error::Internal(format!("{label}: a NUL byte at byte {} of the text", e.nul_position()))
    })
}

/// A log buffer up to its NUL.
fn log_text(buffer: &[u8]) -> String {
    let end = buffer.iter().position(|b| *b == 0).unwrap_or(buffer.len());
    String::from_utf8_lossy(buffer.get(..end).unwrap_or_default()).trim().to_owned()
}

/// The PTX version that a text declares, `(major, minor)`.
fn declared_version(ptx: &str) -> Option<(u32, u32)> {
    let line = ptx.lines().find_map(|line| line.trim_start().strip_prefix(".version"))?;
    let (major, minor) = line.split("//").next()?.trim().split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// CUDA version of the first driver that compiles this PTX version, `(major, minor)`; `None` for
/// one that is not in the list. Source: PTX ISA, release notes, "PTX ISA Version" table.
fn first_driver(ptx: (u32, u32)) -> Option<(u32, u32)> {
    match ptx {
        (7, minor @ 0..=8) => Some((11, minor)),
        (8, minor @ 0..=5) => Some((12, minor)),
        (8, minor @ 6..=8) => Some((12, minor + 1)),
        (9, minor) => Some((13, minor)),
        _ => None,
    }
}

/// Refuses a text that is newer than the driver, whose version is 1000 × major + 10 × minor: the
/// driver's own answer (222) names neither version.
fn check_version(label: &str, ptx: &str, driver: u32) -> Result<()> {
    let Some((version, first)) = declared_version(ptx).and_then(|v| Some((v, first_driver(v)?)))
    else {
        return Ok(());
    };
    let own = (driver / 1000, driver % 1000 / 10);
    if own >= first {
        return Ok(());
    }
    Err(Error::NoDevice(format!(
        "its driver is for CUDA {}.{}, and {label} (PTX {}.{}) needs one for CUDA {}.{} or later: \
         update the NVIDIA driver, or use --backend cpu",
        own.0, own.1, version.0, version.1, first.0, first.1
    )))
}

/// Adds the compiler's log to a driver error; leaves every other error as it is.
fn with_log(error: Error, log: &str) -> Error {
    match error {
        Error::Driver { at, call, code, mut name, fatal } => {
            if !log.is_empty() {
                name.push_str("\ncompiler log:\n");
                name.push_str(log);
                name.push('\n');
            }
            Error::Driver { at, call, code, name, fatal }
        }
        other => other,
    }
}

impl Module {
    /// Compiles the PTX text `ptx` for the context's device; `label` (a file name) is for errors.
    ///
    /// # Errors
    ///
    /// [`Error::NoDevice`] with both versions when the text needs a newer driver; [`Error::Driver`]
    /// with the compiler's log when it does not compile; [`Error::Internal`] during a capture.
    pub fn load(context: &Context, label: &str, ptx: &str) -> Result<Self> {
        let image = c_text(label, ptx)?;
        context.enter_outside_capture(label)?;
        check_version(label, ptx, driver_version()?)?;
        let mut info = vec![0u8; LOG_BYTES];
        let mut errors = vec![0u8; LOG_BYTES];
        // CUjit_option: info log and its size, error log and its size, verbose log.
        let mut options = [3u32, 4, 5, 6, 12];
        let mut values: [*mut c_void; 5] = [
            info.as_mut_ptr().cast(),
            core::ptr::without_provenance_mut(LOG_BYTES),
            errors.as_mut_ptr().cast(),
            core::ptr::without_provenance_mut(LOG_BYTES),
            core::ptr::without_provenance_mut(1),
        ];
        let mut raw = core::ptr::null_mut();
        // SAFETY: `image` is NUL-terminated PTX; options and values are five of each, and the
        // buffers that they point at outlive the call and are as long as stated.
        let code = unsafe {
            api::cuModuleLoadDataEx(
                &raw mut raw,
                image.as_ptr().cast(),
                5,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        context
            .check(label, "cuModuleLoadDataEx", code)
            .map_err(|e| with_log(e, &log_text(&errors)))?;
        let handle = non_null(label, raw)?;
        let inner = Inner {
            context: context.clone(),
            label: label.to_owned(),
            log: log_text(&info),
            handle,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// What the compiler said of each function: registers, spills; empty when it was cached.
    pub fn log(&self) -> &str {
        &self.inner.log
    }

    /// The function of this name, loaded to the device now rather than at its first launch.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when there is none of this name.
    pub fn function(&self, name: &str) -> Result<Function> {
        let at = format!("{}: {name}", self.inner.label);
        let context = &self.inner.context;
        context.enter_outside_capture(&at)?;
        let c_name = c_text(&at, name)?;
        let mut raw = core::ptr::null_mut();
        // SAFETY: `raw` is a place to write to; the module is live; the name is NUL-terminated.
        let code = unsafe {
            api::cuModuleGetFunction(&raw mut raw, self.inner.handle.raw(), c_name.as_ptr())
        };
        context.check(&at, "cuModuleGetFunction", code)?;
        let handle = non_null(&at, raw)?;
        if api::has_func_load() {
            // A first launch inside a capture must not load code.
            // SAFETY: the function is live.
            let code = unsafe { api::cuFuncLoad(handle.raw()) };
            context.check(&at, "cuFuncLoad", code)?;
        }
        Ok(Function { module: self.clone(), name: name.to_owned(), handle })
    }
}

/// A kernel; keeps its module loaded.
#[derive(Clone, Debug)]
pub struct Function {
    module: Module,
    name: String,
    handle: Handle,
}

/// What a kernel uses of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionAttributes {
    /// Registers a thread.
    pub registers: u32,
    /// Local memory a thread (spills, arrays), bytes.
    pub local_bytes: u32,
    /// Static shared memory a block, bytes.
    pub shared_bytes: u32,
    /// Threads a block, at most, for these registers.
    pub max_threads: u32,
}

impl Function {
    /// The kernel's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn raw(&self) -> Raw {
        self.handle.raw()
    }

    fn context(&self) -> &Context {
        &self.module.inner.context
    }

    /// Allows launches with up to `bytes` bytes of dynamic shared memory a block; needed above
    /// 48 KiB.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] above what the device lets a block opt in to.
    pub fn set_max_dynamic_shared(&self, bytes: u32) -> Result<()> {
        const MAX_DYNAMIC_SHARED: c_int = 8;
        self.set_attribute(MAX_DYNAMIC_SHARED, bytes)
    }

    /// Prefers `percent` of a multiprocessor's memory as shared memory over L1 cache. Kernels of one
    /// graph that prefer different shares drain the multiprocessor between them.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] above 100.
    pub fn set_shared_carveout(&self, percent: u32) -> Result<()> {
        const PREFERRED_SHARED_MEMORY_CARVEOUT: c_int = 9;
        self.set_attribute(PREFERRED_SHARED_MEMORY_CARVEOUT, percent)
    }

    /// Sets one CUfunction_attribute by number.
    fn set_attribute(&self, number: c_int, value: u32) -> Result<()> {
        self.context().enter_outside_capture(&self.name)?;
        let value = c_int::try_from(value).map_err(|_| {
            Error::Internal(format!("{}: attribute {number} of {value}", self.name))
        })?;
        // SAFETY: the function is live.
        let code = unsafe { api::cuFuncSetAttribute(self.raw(), number, value) };
        self.context().check(&self.name, "cuFuncSetAttribute", code)
    }

    /// Registers, local and shared memory.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] when the driver does not answer.
    pub fn attributes(&self) -> Result<FunctionAttributes> {
        Ok(FunctionAttributes {
            max_threads: self.attribute(0)?,
            shared_bytes: self.attribute(1)?,
            local_bytes: self.attribute(3)?,
            registers: self.attribute(4)?,
        })
    }

    /// One CUfunction_attribute by number.
    fn attribute(&self, number: c_int) -> Result<u32> {
        self.context().enter_outside_capture(&self.name)?;
        let mut value = 0;
        // SAFETY: `value` is a place to write to; the function is live.
        let code = unsafe { api::cuFuncGetAttribute(&raw mut value, number, self.raw()) };
        self.context().check(&self.name, "cuFuncGetAttribute", code)?;
        u32::try_from(value).map_err(|_| {
            Error::Internal(format!("{}: attribute {number} is {value}, below zero", self.name))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_compilers_log_is_in_the_error_of_a_module() {
        let log = log_text(b"ptxas application ptx input, line 9; error : Not a name\n\0\0rest");
        let error =
            with_log(super::super::status::error("ops.ptx", "cuModuleLoadDataEx", 218), &log);
        let text = error.to_string();
        assert!(text.starts_with("ops.ptx: cuModuleLoadDataEx failed: "), "{text}");
        assert!(text.contains("line 9; error : Not a name"), "{text}");
        assert!(!text.contains("rest"), "{text}");
    }

    #[test]
    fn a_text_is_taken_by_the_first_driver_of_its_version_and_refused_by_the_one_before() {
        for (version, first) in [
            ("7.0", 11_000),
            ("7.8", 11_080),
            ("8.0", 12_000),
            ("8.5", 12_050),
            ("8.6", 12_070),
            ("8.8", 12_090),
            ("9.0", 13_000),
        ] {
            let ptx = format!("//\n\n.version {version}\n.target sm_80\n");
            assert!(check_version("ops", &ptx, first).is_ok(), "{version}");
            let error = check_version("ops", &ptx, first - 10).unwrap_err();
            let said = error.to_string();
            assert!(matches!(error, Error::NoDevice(_)), "{said}");
            assert!(said.contains(&format!("ops (PTX {version})")), "{said}");
        }
        // What is not known is the driver's to judge.
        assert!(check_version("ops", ".version 6.5\n", 9_000).is_ok());
        assert!(check_version("ops", "no version", 9_000).is_ok());
    }

    #[test]
    fn a_log_that_fills_its_buffer_is_kept() {
        assert_eq!(log_text(b"abc"), "abc");
        assert_eq!(log_text(b""), "");
    }

    #[test]
    fn a_nul_in_the_text_is_refused_with_its_place() {
        let text = c_text("ops.ptx", "ab\0c").unwrap_err().to_string();
        assert!(text.contains("ops.ptx") && text.contains("byte 2"), "{text}");
    }
}
