//! Defines every driver symbol that `cust` and `cust_raw` declare, bound to libcuda.so.1 at run time.
//!
//! `cust_raw` declares `extern "C" { fn cuInit(..); .. }` and would have the linker look for
//! `-lcuda`. Each symbol here is a trampoline that jumps through a table slot; an empty slot is
//! filled at its first call. So the crate builds, links and starts with no CUDA toolkit and no
//! driver: there every driver call returns CUDA_ERROR_NO_DEVICE (100).
//!
//! The symbols are ELF-hidden: they are never exported from an executable or shared library and
//! so cannot take the place of libcuda's own symbols, which libcuda itself looks up.

#![allow(non_camel_case_types, non_snake_case, dead_code)]

use core::arch::naked_asm;
use core::ffi::{CStr, c_char, c_void};
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use once_cell::sync::OnceCell;

use super::api;

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("the CUDA driver is bound on linux, x86_64 and aarch64 only");

/// CUDA_ERROR_NO_DEVICE: also what every entry point returns when the driver is absent.
pub(super) const NO_DEVICE: u32 = 100;
/// CUDA_ERROR_SHARED_OBJECT_SYMBOL_NOT_FOUND: what an entry point that this driver lacks returns.
pub(super) const SYMBOL_NOT_FOUND: u32 = 302;

/// The driver's library, by the name that every driver package installs.
///
/// `libcuda.so` without the `.1` is not tried: where only that exists it is the toolkit's stub.
const LIBRARY: &str = "libcuda.so.1";

macro_rules! trampolines {
    ($($name:ident)*) => {
        /// Index of each entry point in [`NAMES`] and [`TABLE`].
        #[repr(usize)]
        enum Sym { $($name,)* Count }

        /// ELF names, in the order of [`TABLE`].
        static NAMES: [&CStr; Sym::Count as usize] = [
            $(match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(s) => s,
                Err(_) => panic!("an entry point name has a NUL"),
            },)*
        ];

        /// Bound addresses; null until the first call of that entry point.
        static TABLE: [AtomicPtr<c_void>; Sym::Count as usize] =
            [const { AtomicPtr::new(ptr::null_mut()) }; Sym::Count as usize];

        mod symbols {
            use super::*;
            $(
                // The one definition of this symbol in the program; it keeps every argument
                // register and the stack as the caller left them.
                #[unsafe(naked)]
                #[unsafe(no_mangle)]
                unsafe extern "C" fn $name() {
                    #[cfg(target_arch = "x86_64")]
                    naked_asm!(
                        concat!(".hidden ", stringify!($name)),
                        "endbr64",
                        "mov r11, qword ptr [rip + {table} + {offset}]",
                        "test r11, r11",
                        "jz 2f",
                        "jmp r11",
                        "2:",
                        "mov r11d, {index}",
                        "jmp {slow}",
                        table = sym TABLE,
                        offset = const (Sym::$name as usize) * 8,
                        index = const Sym::$name as usize,
                        slow = sym slow_path,
                    );
                    #[cfg(target_arch = "aarch64")]
                    naked_asm!(
                        concat!(".hidden ", stringify!($name)),
                        "hint #34", // bti c
                        "adrp x16, {table}",
                        "add x16, x16, :lo12:{table}",
                        "mov x17, #{offset}",
                        "add x16, x16, x17",
                        "ldar x16, [x16]",
                        "cbz x16, 2f",
                        "br x16",
                        "2:",
                        "mov x16, #{index}",
                        "b {slow}",
                        table = sym TABLE,
                        offset = const (Sym::$name as usize) * 8,
                        index = const Sym::$name as usize,
                        slow = sym slow_path,
                    );
                }
            )*
        }
    };
}

include!("shim_syms.in.rs");

/// Saves every argument register, asks [`resolve`] for the target, restores them, tail-jumps.
///
/// In: r11 (x86-64) or x16 (aarch64) = index into [`TABLE`]. The vector registers are saved too,
/// because [`resolve`] runs the loader, which may use them.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
unsafe extern "C" fn slow_path() {
    naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        "push r8",
        "push r9",
        "push rax",
        "push r10",
        "sub rsp, 128",
        "movups [rsp], xmm0",
        "movups [rsp + 16], xmm1",
        "movups [rsp + 32], xmm2",
        "movups [rsp + 48], xmm3",
        "movups [rsp + 64], xmm4",
        "movups [rsp + 80], xmm5",
        "movups [rsp + 96], xmm6",
        "movups [rsp + 112], xmm7",
        "mov rdi, r11",
        "call {resolve}",
        "mov r11, rax",
        "movups xmm0, [rsp]",
        "movups xmm1, [rsp + 16]",
        "movups xmm2, [rsp + 32]",
        "movups xmm3, [rsp + 48]",
        "movups xmm4, [rsp + 64]",
        "movups xmm5, [rsp + 80]",
        "movups xmm6, [rsp + 96]",
        "movups xmm7, [rsp + 112]",
        "add rsp, 128",
        "pop r10",
        "pop rax",
        "pop r9",
        "pop r8",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "pop rbp",
        "jmp r11",
        resolve = sym resolve,
    )
}

#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
unsafe extern "C" fn slow_path() {
    naked_asm!(
        "stp x29, x30, [sp, #-224]!",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "str x8, [sp, #80]",
        "stp q0, q1, [sp, #96]",
        "stp q2, q3, [sp, #128]",
        "stp q4, q5, [sp, #160]",
        "stp q6, q7, [sp, #192]",
        "mov x0, x16",
        "bl {resolve}",
        "mov x16, x0",
        "ldp q6, q7, [sp, #192]",
        "ldp q4, q5, [sp, #160]",
        "ldp q2, q3, [sp, #128]",
        "ldp q0, q1, [sp, #96]",
        "ldr x8, [sp, #80]",
        "ldp x6, x7, [sp, #64]",
        "ldp x4, x5, [sp, #48]",
        "ldp x2, x3, [sp, #32]",
        "ldp x0, x1, [sp, #16]",
        "ldp x29, x30, [sp], #224",
        "br x16",
        resolve = sym resolve,
    )
}

static LIBCUDA: OnceCell<Result<libloading::Library, String>> = OnceCell::new();

fn libcuda() -> &'static Result<libloading::Library, String> {
    LIBCUDA.get_or_init(|| {
        // SAFETY: loading the NVIDIA driver runs its initialisers, which have no preconditions.
        let loaded = unsafe { libloading::Library::new(LIBRARY) };
        loaded.map_err(|e| format!("{LIBRARY} could not be loaded: {e}"))
    })
}

/// `Ok` when the driver library is there (or a test installed a table in its place); otherwise
/// the loader's message, one line.
pub fn driver_status() -> Result<(), &'static str> {
    if api::is_installed() {
        return Ok(());
    }
    libcuda().as_ref().map(|_| ()).map_err(String::as_str)
}

/// Address of an entry point of libcuda by its exact, versioned ELF name.
pub(super) fn lookup(name: &CStr) -> Option<*const c_void> {
    let library = libcuda().as_ref().ok()?;
    // SAFETY: only the address is taken; its type is chosen where it is called.
    let symbol = unsafe { library.get::<*const c_void>(name.to_bytes_with_nul()) }.ok()?;
    let address: *const c_void = *symbol;
    (!address.is_null()).then_some(address)
}

/// Fills slot `index`. Must not unwind (it is called from assembly) nor call a trampoline.
extern "C" fn resolve(index: usize) -> *const c_void {
    let name = NAMES.get(index).copied().unwrap_or(c"");
    let found = if api::is_installed() { api::installed_address(name) } else { lookup(name) };
    let target = match found {
        Some(address) => address,
        // cust formats its error through cuGetErrorString, and panics when that fails.
        None if name == c"cuGetErrorString" || name == c"cuGetErrorName" => {
            fallback_error_text as *const c_void
        }
        None if driver_status().is_err() => no_driver as *const c_void,
        None => missing_symbol as *const c_void,
    };
    if let Some(slot) = TABLE.get(index) {
        slot.store(target.cast_mut(), Ordering::Release);
    }
    target
}

extern "C" fn no_driver() -> u32 {
    NO_DEVICE
}

extern "C" fn missing_symbol() -> u32 {
    SYMBOL_NOT_FOUND
}

/// Stands in for cuGetErrorString and cuGetErrorName.
///
/// # Safety
///
/// `out` must be valid for a write.
unsafe extern "C" fn fallback_error_text(code: u32, out: *mut *const c_char) -> u32 {
    let text = match code {
        0 => c"no error",
        NO_DEVICE => c"no CUDA driver (libcuda.so.1 could not be loaded)",
        SYMBOL_NOT_FOUND => c"this CUDA driver lacks the entry point",
        _ => c"CUDA error (no driver to describe it)",
    };
    // SAFETY: the caller gives a place to write to.
    unsafe { out.write(text.as_ptr()) };
    0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::path::PathBuf;
    use std::process::Command;

    /// Where cargo unpacked cust_raw, asked of cargo itself.
    fn cust_raw_source() -> Option<PathBuf> {
        let out = Command::new(env!("CARGO"))
            .args(["metadata", "--offline", "--format-version", "1", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .output()
            .ok()?;
        let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).ok()?;
        let package = metadata["packages"]
            .as_array()?
            .iter()
            .find(|p| p["name"] == "cust_raw")?["manifest_path"]
            .as_str()?
            .to_owned();
        Some(PathBuf::from(package).parent()?.join("src/cuda.rs"))
    }

    #[test]
    fn every_symbol_is_defined_once_and_in_order() {
        assert_eq!(NAMES.len(), 353);
        assert_eq!(NAMES[Sym::cuInit as usize], c"cuInit");
        assert!(NAMES.windows(2).all(|w| w[0] < w[1]), "sorted, no duplicates");
    }

    #[test]
    fn the_table_has_exactly_what_cust_raw_declares() {
        let Some(path) = cust_raw_source() else { return };
        let source = std::fs::read_to_string(path).unwrap();
        let declared: BTreeSet<&str> = source
            .lines()
            .filter_map(|l| l.trim().strip_prefix("pub fn "))
            .filter_map(|l| l.split('(').next())
            .collect();
        let defined: BTreeSet<&str> = NAMES.iter().map(|n| n.to_str().unwrap()).collect();
        assert_eq!(defined, declared);
    }

    #[test]
    fn without_a_driver_cust_gets_an_error_it_can_print() {
        if let Err(why) = driver_status() {
            assert!(why.starts_with("libcuda.so.1 could not be loaded: "), "{why}");
            assert!(!why.contains('\n'), "{why}");
            let e = cust::init(cust::CudaFlags::empty()).unwrap_err();
            assert_eq!(e, cust::error::CudaError::NoDevice);
            assert!(e.to_string().contains("libcuda.so.1"));
        }
    }
}
