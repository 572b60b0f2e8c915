//! Defects of kernels that only a GPU shows, made in the committed PTX before it is loaded.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]
#![allow(dead_code, reason = "each test binary uses a part")]

use decode_graph::cuda::kernels;

/// What is made wrong.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Defect {
    /// Nothing waits for the predecessor's results (compute capability 9.0 and later).
    NoWait,
    /// No thread waits for another of its block.
    NoBarrier,
    /// Every store to global memory lands this many bytes further on.
    StoreBeyond(u64),
    /// Blocks whose number is not below this parameter of the kernel end at once: those that a grid
    /// made for the first position does not have.
    GridOfTheFirstPosition { parameter: u32 },
}

/// A defect, and where it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planted {
    pub(crate) module: &'static str,
    /// All of the module's where empty.
    pub(crate) entry: &'static str,
    pub(crate) defect: Defect,
}

pub(crate) const NO_WAIT: Planted =
    Planted { module: "gemv_q8_0", entry: "", defect: Defect::NoWait };
pub(crate) const NO_BARRIER: Planted =
    Planted { module: "gemv_q8_0", entry: "down_q8_0", defect: Defect::NoBarrier };
pub(crate) const NO_BARRIER_IN_A_NORM: Planted =
    Planted { module: "elementwise", entry: "rms_norm", defect: Defect::NoBarrier };
pub(crate) const STORE_BEHIND_A_BUFFER: Planted =
    Planted { module: "elementwise", entry: "add", defect: Defect::StoreBeyond(4) };
/// A row of 64 f16 elements.
pub(crate) const STORE_BEHIND_THE_CACHE: Planted =
    Planted { module: "elementwise", entry: "kv_append_f16", defect: Defect::StoreBeyond(128) };
pub(crate) const GRID_OF_THE_FIRST_POSITION: Planted = Planted {
    module: "attention_f16",
    entry: "attention_f16",
    defect: Defect::GridOfTheFirstPosition { parameter: 8 },
};

pub(crate) const ALL: [Planted; 6] = [
    NO_WAIT,
    NO_BARRIER,
    NO_BARRIER_IN_A_NORM,
    STORE_BEHIND_A_BUFFER,
    STORE_BEHIND_THE_CACHE,
    GRID_OF_THE_FIRST_POSITION,
];

impl Planted {
    /// The module's text with the defect, and in how many places it is.
    pub(crate) fn text(&self, compute: (u32, u32)) -> (String, usize) {
        let mut places = 0;
        let mut out = String::new();
        let text = kernels::ptx(self.module, compute).unwrap();
        for (entry, line) in with_entries(text) {
            let here = entry.filter(|name| self.entry.is_empty() || *name == self.entry);
            match here.and_then(|entry| self.line(line, entry)) {
                Some(changed) => {
                    places += 1;
                    out.push_str(&changed);
                }
                None => out.push_str(line),
            }
        }
        (out, places)
    }

    /// What becomes of a line of `entry`; `None` where it stays.
    fn line(&self, line: &str, entry: &str) -> Option<String> {
        match self.defect {
            Defect::NoWait => line.contains("griddepcontrol.wait").then(String::new),
            Defect::NoBarrier => line.contains("bar.sync").then(String::new),
            Defect::StoreBeyond(bytes) => {
                let (before, address) =
                    line.split_once("[").filter(|_| line.contains("st.global"))?;
                let (address, after) = address.split_once(']')?;
                let (register, offset) = address.split_once('+').unwrap_or((address, "0"));
                let offset = offset.parse::<u64>().unwrap() + bytes;
                Some(format!("{before}[{register}+{offset}]{after}"))
            }
            Defect::GridOfTheFirstPosition { parameter } => {
                // The state is read at the top of every kernel, once.
                line.contains("ld.global.v4.u32").then_some(())?;
                Some(format!(
                    "{{\n.reg .pred p;\n.reg .b32 block, blocks;\nmov.u32 block, %ctaid.x;\n\
                     ld.param.u32 blocks, [{entry}_param_{parameter}];\n\
                     setp.ge.u32 p, block, blocks;\n@p ret;\n}}\n{line}"
                ))
            }
        }
    }

    /// As [`kernels::ptx`], with the defect.
    pub(crate) fn source(
        &self,
        compute: (u32, u32),
    ) -> impl Fn(&str, (u32, u32)) -> Option<&'static str> {
        let (text, places) = self.text(compute);
        assert!(places > 0, "{self:?} is nowhere");
        let text: &'static str = Box::leak(text.into_boxed_str());
        let module = self.module;
        move |name, compute| if name == module { Some(text) } else { kernels::ptx(name, compute) }
    }
}

/// Lines of PTX with the entry point that they are in.
fn with_entries(text: &str) -> impl Iterator<Item = (Option<&str>, &str)> {
    let mut entry = None;
    text.split_inclusive('\n').map(move |line| {
        if let Some(rest) = line.strip_prefix(".visible .entry ") {
            entry = rest.split('(').next().map(str::trim);
        }
        (entry, line)
    })
}
