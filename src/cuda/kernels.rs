//! The embedded kernels: PTX by module, and what an entry point takes.
//!
//! `ptx/build.sh` writes the table with the PTX itself; every module is there in two variants, for
//! compute capability 8.0 and up and for 9.0 and up (programmatic dependent launch).

/// `(module, PTX for compute 8.0, PTX for compute 9.0)`, sorted by module.
const MODULES: &[(&str, &str, &str)] =
    &include!(concat!(env!("CARGO_MANIFEST_DIR"), "/ptx/modules.in.rs"));

/// The lowest compute capability that any kernel is built for.
pub const LOWEST_COMPUTE: (u32, u32) = (8, 0);

/// The compute capability from which on the kernels wait for their predecessor themselves, so that
/// they may be launched before it ends.
pub const PROGRAMMATIC_COMPUTE: (u32, u32) = (9, 0);

/// Names of the embedded modules, sorted.
pub fn modules() -> impl Iterator<Item = &'static str> {
    MODULES.iter().map(|m| m.0)
}

/// The PTX text of `module` for a device of compute capability `compute`, `(major, minor)`; `None`
/// when there is no such module, or the device is below [`LOWEST_COMPUTE`].
pub fn ptx(module: &str, compute: (u32, u32)) -> Option<&'static str> {
    let &(_, sm80, sm90) = MODULES.iter().find(|m| m.0 == module)?;
    match compute {
        c if c >= PROGRAMMATIC_COMPUTE => Some(sm90),
        c if c >= LOWEST_COMPUTE => Some(sm80),
        _ => None,
    }
}

/// Type of one kernel parameter, as declared in PTX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamType {
    /// 32-bit integer or untyped: a count or size.
    U32,
    /// 32-bit float.
    F32,
    /// 64-bit integer or untyped: an address, or a 64-bit count.
    U64,
    /// Anything else (8 or 16 bits, f64, an array): no launch of this crate passes such a thing.
    Other,
}

impl ParamType {
    /// Bytes that a launch passes for it; `None` for [`ParamType::Other`].
    pub fn bytes(self) -> Option<usize> {
        match self {
            Self::U32 | Self::F32 => Some(4),
            Self::U64 => Some(8),
            Self::Other => None,
        }
    }

    fn parse(name: &str) -> Self {
        match name {
            ".u32" | ".s32" | ".b32" => Self::U32,
            ".f32" => Self::F32,
            ".u64" | ".s64" | ".b64" => Self::U64,
            _ => Self::Other,
        }
    }
}

/// The parameter types of entry point `entry` in the text `ptx`, in order; `None` when it has no
/// such entry point or the declaration is malformed.
///
/// Reads what the PTX ISA allows in an `.entry` directive (section 11.1.1): parameters are
/// `.param .<type> [.ptr [.<space>] .align N] name[\[N\]]`, separated by commas.
pub fn entry_parameters(ptx: &str, entry: &str) -> Option<Vec<ParamType>> {
    let after = ptx.match_indices(".entry").find_map(|(at, word)| {
        // A comment holds no declaration.
        let line = ptx[..at].rfind('\n').map_or(0, |end| end + 1);
        let rest = ptx[at + word.len()..].trim_start().strip_prefix(entry)?;
        // The name ends here: an entry of which `entry` is only the beginning is another one.
        let whole = rest.starts_with(|c: char| c.is_whitespace() || "({.".contains(c));
        (whole && !ptx[line..at].contains("//")).then_some(rest)
    })?;
    // Only the declaration is looked at: a module's text is long.
    let mut declaration = String::new();
    for line in after.lines() {
        let line = line.split("//").next().unwrap_or_default();
        declaration.push_str(line);
        declaration.push('\n');
        if line.contains([')', '{']) {
            break;
        }
    }
    let Some(list) = declaration.trim_start().strip_prefix('(') else { return Some(Vec::new()) };
    let (list, _) = list.split_once(')')?;
    if list.trim().is_empty() {
        return Some(Vec::new());
    }
    list.split(',').map(parameter).collect()
}

fn parameter(declaration: &str) -> Option<ParamType> {
    let mut words = declaration.split_whitespace();
    if words.next()? != ".param" {
        return None;
    }
    if declaration.contains('[') {
        return Some(ParamType::Other);
    }
    // Alignment may precede the type.
    let mut word = words.next()?;
    if word == ".align" {
        words.next()?;
        word = words.next()?;
    }
    Some(ParamType::parse(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ParamType::{F32, Other, U32, U64};

    const TEXT: &str = "
.version 7.8
.target sm_90
// .visible .entry add(.param .f32 no)
.visible .entry add_long(
	.param .u64 .ptr .align 16 add_long_param_0,
	.param .f32 add_long_param_1 // , .param .u32 no
)
.maxntid 256, 1, 1
{ ret; }
.visible .entry add(.param .b64 a, .param .u32 b,
	.param .align 8 .b8 c[16])
{ ret; }
.visible .entry none()
{ ret; }
.visible .entry bare
{ ret; }
.visible .entry broken(.param .u32 a
";

    #[test]
    fn reads_types_in_order_past_attributes_and_comments() {
        assert_eq!(entry_parameters(TEXT, "add_long"), Some(vec![U64, F32]));
        assert_eq!(entry_parameters(TEXT, "add"), Some(vec![U64, U32, Other]));
        assert_eq!(entry_parameters(TEXT, "none"), Some(vec![]));
        assert_eq!(entry_parameters(TEXT, "bare"), Some(vec![]));
    }

    #[test]
    fn a_missing_or_broken_entry_is_none() {
        assert_eq!(entry_parameters(TEXT, "ad"), None);
        assert_eq!(entry_parameters(TEXT, "long"), None);
        assert_eq!(entry_parameters(TEXT, "broken"), None);
    }

    #[test]
    fn the_variant_follows_the_compute_capability() {
        let target = |compute| {
            let text = ptx("elementwise", compute)?;
            text.lines().find_map(|l| l.strip_prefix(".target "))
        };
        assert_eq!(target((7, 5)), None);
        assert_eq!(target((8, 0)), Some("sm_80"));
        assert_eq!(target((8, 9)), Some("sm_80"));
        assert_eq!(target((9, 0)), Some("sm_90"));
        assert_eq!(target((12, 0)), Some("sm_90"));
        assert_eq!(ptx("no_such_module", (9, 0)), None);
    }

    #[test]
    fn every_kernel_for_compute_9_waits_for_its_predecessor_and_none_below() {
        for module in modules() {
            // Measuring kernels, and the one that is a whole token, are launched on their own.
            if matches!(module, "probe" | "persistent") {
                continue;
            }
            let new = ptx(module, (9, 0)).unwrap();
            for kernel in new.split(".visible .entry").skip(1) {
                let name = kernel.split('(').next().unwrap().trim();
                let launch = kernel.find("griddepcontrol.launch_dependents");
                assert!(launch.is_some(), "{module}: {name} never lets its successor start");
                assert!(kernel.contains("griddepcontrol.wait"), "{module}: {name} never waits");
            }
            assert!(!ptx(module, (8, 0)).unwrap().contains("griddepcontrol"), "{module}");
        }
    }
}
