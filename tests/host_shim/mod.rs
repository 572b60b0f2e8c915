//! The kernels' own sources, compiled for the host with `shim.h`. Needs `g++`, as the crate's
//! dependencies do.
//!
//! | file | what |
//! |---|---|
//! | `fibres.h` | threads and blocks: who runs when, and who waits in vain |
//! | `shim.h` | types, functions and instructions of the device |
//! | `bulk.h` | what only the persistent kernel does: `mbarrier`s, bulk copies, mail |
//!
//! The code is that for compute capability 8.0, without the copies and waits that later devices have; of
//! the persistent kernel it is that for 9.0. Shows what a kernel computes, that its threads wait where they
//! must, and, where a launch is cooperative, that blocks which run at the same time do: each may be ahead
//! of the others as far as it can, in two orders that are the same in every run. Shows nothing of memory
//! orders, or of what only the device's compiler does.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code, reason = "calls libraries that were just compiled")]

use decode_graph::cuda::kernels;
use libloading::{Library, Symbol};
use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::ffi::{CStr, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Inline PTX, by a part of its text, and the function of `shim.h` or `bulk.h` that does it with the same
/// operands, outputs first. The first that fits counts.
const KNOWN: [(&str, &str); 45] = [
    ("fence.", "nothing"),
    ("prefetch", "nothing"),
    ("globaltimer", "clock"),
    ("%%clock;", "clock"),
    ("and.b32 %0, %0, 31", "lane_index"),
    ("mov.u32 %0, %%tid.x", "thread_index"),
    ("mov.u32 %0, %%ctaid.x", "block_index"),
    ("mov.u32 %0, %%nctaid.x", "block_count"),
    ("st.global.b16", "store_half"),
    ("cvt.f32.f16 %0, l", "widen"),
    ("max.NaN.f32", "max_nan"),
    ("ex2.approx", "power_of_two"),
    ("ld.global.cg.v4.u32", "load_words"),
    ("ld.shared.v4.u32", "load_shared_words"),
    ("ld.shared.u32", "load_shared"),
    ("cp.async.cg.shared.global", "copy_async"),
    ("cp.async.commit_group", "commit"),
    ("cp.async.wait_group", "wait_groups"),
    ("s32.s8.s8.s32", "matrix_signed"),
    ("s32.u8.s8.s32", "matrix_unsigned"),
    ("f32.f16.f16.f32", "matrix_half"),
    ("f32.bf16.bf16.f32", "matrix_bfloat"),
    // The persistent kernel's.
    ("cp.async.bulk.shared", "copy_bulk"),
    ("mbarrier.init", "barrier_init"),
    ("mbarrier.arrive.expect_tx", "barrier_expect"),
    ("mbarrier.arrive", "barrier_arrive"),
    ("mbarrier.try_wait", "barrier_try_wait"),
    ("bar.sync 1,", "meet_at<1>"),
    ("barrier.sync 2,", "meet_at<2>"),
    ("bar.sync 3,", "meet_at<3>"),
    ("bar.sync 4,", "meet_at<4>"),
    ("bar.arrive 1,", "arrive_at<1>"),
    ("bar.arrive 2,", "arrive_at<2>"),
    ("bar.arrive 3,", "arrive_at<3>"),
    ("bar.arrive 4,", "arrive_at<4>"),
    ("st.relaxed.gpu.global.u", "post"),
    ("ld.relaxed.gpu.global.u", "peek"),
    ("ld.relaxed.gpu.global.v2.u32", "peek_pair"),
    ("ld.relaxed.gpu.global.v4.u32", "peek_four"),
    ("\"exit;\"", "leave"),
    ("setmaxnreg", "nothing"),
    ("createpolicy", "nothing"),
    // Of later devices, which are not compiled for.
    ("griddepcontrol", "nothing"),
    ("cp.async.bulk", "nothing"),
    // No instruction: a hint to the compiler.
    ("\"\"", "nothing"),
];

/// The end of what an opening parenthesis, just before `text`, encloses.
fn closing(text: &str) -> usize {
    let (mut depth, mut quoted, mut escaped) = (1, false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => quoted = !quoted,
            '(' if !quoted => depth += 1,
            ')' if !quoted => {
                depth -= 1;
                if depth == 0 {
                    return i;
                }
            }
            _ => {}
        }
    }
    panic!("a parenthesis is not closed: {text}");
}

/// The operands of an asm statement, `"constraint"(operand)` each, in order.
fn operands(statement: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = statement;
    while let Some(at) = rest.find("\"(") {
        rest = &rest[at + 2..];
        let end = closing(rest);
        found.push(&rest[..end]);
        rest = &rest[end..];
    }
    found
}

/// Replaces inline PTX by calls of `shim.h`. PTX that is not known here stays, and does not compile.
fn without_ptx(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find("asm") {
        let after = rest[at + 3..].trim_start();
        let after = after.strip_prefix("volatile").unwrap_or(after);
        let Some(statement) = after.strip_prefix('(') else {
            out.push_str(&rest[..at + 3]);
            rest = &rest[at + 3..];
            continue;
        };
        let end = closing(statement);
        let (statement, after) = (&statement[..end], &statement[end + 1..]);
        out.push_str(&rest[..at]);
        match KNOWN.iter().find(|(ptx, _)| statement.contains(ptx)) {
            Some((_, name)) => {
                out.push_str(&format!("shim::{name}({})", operands(statement).join(", ")));
            }
            None => out.push_str(&format!("asm({statement})")),
        }
        rest = after;
    }
    out + rest
}

/// Has every block its own shared memory: that of a size given by the launch is `shim::dynamic`, any
/// other variable is one of an array.
fn with_shared_memory(source: &str) -> String {
    const WORD: &str = "__shared__ ";
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find(WORD) {
        let (before, after) = (&rest[..at], &rest[at + WORD.len()..]);
        let (declared, after) = after.split_once(';').unwrap();
        let (variable, bounds) = declared.split_at(declared.find('[').unwrap_or(declared.len()));
        let (kind, name) = variable.rsplit_once(' ').unwrap();
        if let Some(before) = before.strip_suffix("extern ") {
            out.push_str(&format!("{before}uint8_t* const {name} = shim::dynamic;"));
        } else {
            out.push_str(&format!(
                "{before}static {kind} {name}_of_blocks[shim::TOGETHER]{bounds}; \
                 auto& {name} = {name}_of_blocks[shim::place()];"
            ));
        }
        rest = after;
    }
    out + rest
}

/// As the host's compiler takes it.
fn for_the_host(source: &str) -> String {
    with_shared_memory(&without_ptx(source))
        // What a loop reads until others have changed it. Written in another way it is a plain load here, and
        // the loop never lets the others run.
        .replace("const volatile uint32_t& ", "const shim::Watched ")
        .replace("#include <cuda_", "// #include <cuda_")
}

/// The source of a module and its definitions, as `ptx/build.sh` has them.
fn source_of(module: &str) -> (&'static str, Vec<String>) {
    let define = |name: &str, value: &str| format!("-D{name}={value}");
    if let Some(kind) = module.strip_prefix("attention_") {
        return ("attention.cu", vec![define("KV_F16", if kind == "f16" { "1" } else { "0" })]);
    }
    for (prefix, source) in [("gemv_", "gemv.cu"), ("expert_", "expert.cu")] {
        if let Some(format) = module.strip_prefix(prefix) {
            return (source, vec![define("FORMAT", format)]);
        }
    }
    if let Some(pair) = module.strip_prefix("qkv_") {
        let formats = decode_graph::quant::QuantFormat::ALL.map(|f| f.suffix());
        let pair = formats.into_iter().find_map(|a| {
            let b = pair.strip_prefix(a)?.strip_prefix('_')?;
            formats.contains(&b).then_some((a, b))
        });
        let (a, b) = pair.unwrap();
        return ("qkv.cu", vec![define("FORMAT_A", a), define("FORMAT_B", b)]);
    }
    match module {
        "elementwise" => ("elementwise.cu", vec![]),
        "sample" => ("sample.cu", vec![]),
        "persistent" => ("persistent.cu", vec![define("__CUDA_ARCH__", "900")]),
        _ => panic!("{module} is not compiled for the host"),
    }
}

/// The PTX of a module, of the device that it is compiled for.
fn text_of(module: &str) -> &'static str {
    kernels::ptx(module, if module == "persistent" { (9, 0) } else { (8, 0) }).unwrap()
}

/// The module that has an entry point of this name.
pub(crate) fn module_of(kernel: &str) -> Option<&'static str> {
    /// Of every kernel: they are looked for in megabytes of text.
    static MODULES: LazyLock<HashMap<&'static str, &'static str>> = LazyLock::new(|| {
        let entries = |module| {
            let names = text_of(module).split(".entry ").skip(1);
            names.filter_map(move |rest| Some((rest.split_once('(')?.0, module)))
        };
        kernels::modules().flat_map(entries).collect()
    });
    MODULES.get(kernel).copied()
}

/// Blocks, threads, bytes of shared memory; whether all blocks run at the same time.
pub(crate) type Launch = (u32, u32, u32, bool);

/// The same as `shim.h` has it.
#[repr(C)]
struct ShimLaunch {
    grid: u32,
    block: u32,
    shared: u32,
    plant: u32,
    together: bool,
    backwards: bool,
}

/// Compiled modules; each when it is first asked for.
pub(crate) struct Kernels {
    folder: tempfile::TempDir,
    modules: Mutex<HashMap<&'static str, Library>>,
    /// How often each kernel has run.
    runs: Mutex<HashMap<String, u32>>,
    /// `shim::plant` from now on: sources may ask for it, so that one compilation has many defects.
    plant: AtomicU32,
}

impl Kernels {
    /// The sources after `change` was made to each; it gets the file's name first.
    pub(crate) fn new(change: impl Fn(&str, String) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ptx = Path::new(env!("CARGO_MANIFEST_DIR")).join("ptx");
        for part in ["", "formats", "persistent"] {
            std::fs::create_dir_all(folder.path().join(part)).unwrap();
            for entry in std::fs::read_dir(ptx.join(part)).unwrap() {
                let path = entry.unwrap().path();
                let name = path.file_name().unwrap().to_str().unwrap();
                if name.ends_with(".cu") || name.ends_with(".cuh") {
                    let source = std::fs::read_to_string(&path).unwrap();
                    let source = change(name, for_the_host(&source));
                    std::fs::write(folder.path().join(part).join(name), source).unwrap();
                }
            }
        }
        Self { folder, modules: Mutex::default(), runs: Mutex::default(), plant: AtomicU32::new(0) }
    }

    /// Builds defect number `plant` in, of those that the sources were changed to have; 0: none.
    pub(crate) fn plant(&self, plant: u32) {
        self.plant.store(plant, Ordering::Relaxed);
    }

    fn compile(&self, module: &str) -> Library {
        let (source, definitions) = source_of(module);
        let text = text_of(module);
        let mut main = format!("#include \"bulk.h\"\n#include \"{source}\"\n");
        main.push_str("extern \"C\" const char* why() { return shim::why.c_str(); }\n");
        for entry in text.split(".entry ").skip(1) {
            let name = entry.split('(').next().unwrap();
            main.push_str(&format!(
                "extern \"C\" int run_{name}(const shim::Launch* launch, const uint64_t* slots) \
                 {{ return shim::call({name}, *launch, slots); }}\n"
            ));
        }
        let file =
            |ending: &str| -> PathBuf { self.folder.path().join(format!("{module}.{ending}")) };
        std::fs::write(file("cpp"), main).unwrap();
        let output = Command::new("g++")
            .args(["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"])
            .args(["-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"])
            .args(definitions)
            .arg("-I")
            .arg(self.folder.path())
            .arg("-I")
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/host_shim"))
            .arg(file("cpp"))
            .arg("-o")
            .arg(file("so"))
            .output()
            .expect("g++ compiles the kernels for the host: install it");
        assert!(output.status.success(), "{module}: {}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: made just now from the sources of this repository.
        unsafe { Library::new(file("so")) }.unwrap()
    }

    /// Compiles the modules of these kernels that were not asked for yet, two at a time.
    pub(crate) fn prepare<'a>(&self, kernels: impl IntoIterator<Item = &'a str>) {
        let asked: BTreeSet<_> = kernels.into_iter().filter_map(module_of).collect();
        let missing: Vec<_> =
            asked.into_iter().filter(|m| !self.modules.lock().contains_key(m)).collect();
        let next = AtomicUsize::new(0);
        let work = || {
            while let Some(module) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
                let library = self.compile(module);
                self.modules.lock().insert(module, library);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(work);
            scope.spawn(work);
        });
    }

    /// Runs a kernel on parameters of 8 bytes each, addresses being the host's: 0, or 1 where threads
    /// wait for one another in vain, or 2 where there is less shared memory or blocks cannot all run at
    /// the same time, or 3 where it does what no device allows. `None` where no module has it. The
    /// threads, and blocks, take turns from the first on, and from the last on when the kernel runs the
    /// next time.
    pub(crate) fn run(
        &self,
        kernel: &str,
        (grid, block, shared, together): Launch,
        slots: &[u64],
    ) -> Option<i32> {
        type Run = unsafe extern "C" fn(*const ShimLaunch, *const u64) -> i32;
        type Why = unsafe extern "C" fn() -> *const c_char;
        let module = module_of(kernel)?;
        let mut modules = self.modules.lock();
        let library = modules.entry(module).or_insert_with(|| self.compile(module));
        let backwards = {
            let mut runs = self.runs.lock();
            let runs = runs.entry(kernel.to_owned()).or_default();
            *runs += 1;
            runs.is_multiple_of(2)
        };
        let plant = self.plant.load(Ordering::Relaxed);
        let launch = ShimLaunch { grid, block, shared, plant, together, backwards };
        let symbol = format!("run_{kernel}");
        // SAFETY: `compile` defines it with this type.
        let run: Symbol<'_, Run> = unsafe { library.get(symbol.as_bytes()) }.unwrap();
        // SAFETY: as many parameters as the kernel has, of its types: the caller's.
        let code = unsafe { run(&raw const launch, slots.as_ptr()) };
        if code != 0 {
            // SAFETY: `compile` defines it with this type.
            let why: Symbol<'_, Why> = unsafe { library.get(b"why") }.unwrap();
            // SAFETY: takes nothing.
            let why = unsafe { why() };
            // SAFETY: text that ends, which nobody changes before the next launch.
            let why = unsafe { CStr::from_ptr(why) };
            println!("{kernel} ended with {code}: {}", why.to_string_lossy());
        }
        Some(code)
    }
}
