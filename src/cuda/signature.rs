//! The parameter list of a PTX entry, checked against a launch before anything runs.
//!
//! ```text
//! .visible .entry add(.param .u64 add_param_0, …, .param .u32 add_param_3)
//! ```

use crate::error::{Error, Result};
use crate::ops::{Arg, Launch};

/// Bytes of each parameter of entry `kernel` of the text `ptx`; `None` when there is no such entry
/// or a parameter is no scalar of 4 or 8 bytes.
pub fn parameters(ptx: &str, kernel: &str) -> Option<Vec<u32>> {
    let list = entry(ptx, kernel)?.split_once(')')?.0;
    list.split(',').map(str::trim).filter(|p| !p.is_empty()).map(width).collect()
}

/// The text after the opening parenthesis of entry `kernel`.
fn entry<'a>(ptx: &'a str, kernel: &str) -> Option<&'a str> {
    const ENTRY: &str = ".entry ";
    let mut rest = ptx;
    loop {
        let at = rest.find(ENTRY)?;
        rest = &rest[at + ENTRY.len()..];
        if let Some(list) = rest.trim_start().strip_prefix(kernel)
            && let Some(list) = list.trim_start().strip_prefix('(')
        {
            return Some(list);
        }
    }
}

fn width(parameter: &str) -> Option<u32> {
    let mut words = parameter.split_whitespace();
    if words.next()? != ".param" {
        return None;
    }
    match words.next()? {
        ".u64" | ".s64" | ".b64" | ".f64" => Some(8),
        ".u32" | ".s32" | ".b32" | ".f32" => Some(4),
        _ => None,
    }
}

/// Bytes of the parameter that takes `arg`.
fn width_of(arg: &Arg) -> u32 {
    match arg {
        Arg::Buf(_)
        | Arg::Weight(_)
        | Arg::Null
        | Arg::Step
        | Arg::Forced
        | Arg::Ring
        | Arg::Keys(_)
        | Arg::Values(_)
        | Arg::Counters => 8,
        Arg::U32(_) | Arg::F32(_) => 4,
    }
}

/// Checks that the arguments of `launch` are those that its kernel in `ptx` takes, by number and
/// width.
///
/// # Errors
///
/// [`Error::Internal`] with the first difference.
pub fn check(label: &str, launch: &Launch, ptx: &str) -> Result<()> {
    let at = format!("{label}: kernel {} of module {}", launch.kernel, launch.module);
    let Some(wanted) = parameters(ptx, &launch.kernel) else {
        return Err(Error::Internal(format!("{at}: no entry of scalar parameters has this name")));
    };
    let given: Vec<u32> = launch.args.iter().map(width_of).collect();
    if given.len() != wanted.len() {
        let (given, wanted) = (given.len(), wanted.len());
        return Err(Error::Internal(format!("{at}: {given} arguments, it takes {wanted}")));
    }
    match given.iter().zip(&wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(Error::Internal(format!(
            "{at}: argument {i} ({:?}) has {} bytes, the parameter {}",
            launch.args[i], given[i], wanted[i]
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "
.visible .entry add_more(.param .u64 a)
{ ret; }
.visible .entry add(
\t.param .u64 .ptr .align 1 add_param_0,
\t.param .u64 add_param_1,
\t.param .f32 add_param_2
)
.maxntid 256, 1, 1
{ ret; }
.entry odd(.param .align 16 .b8 odd_param_0[64]) { ret; }
.entry none() { ret; }
";

    fn launch(kernel: &str, args: Vec<Arg>) -> Launch {
        let (module, kernel) = ("m".to_owned(), kernel.to_owned());
        let (grid, block, cluster, shared_bytes, programmatic) = (1, 32, 1, 0, false);
        Launch { module, kernel, grid, block, cluster, shared_bytes, programmatic, args }
    }

    #[test]
    fn an_entry_is_found_by_its_whole_name_with_the_width_of_each_parameter() {
        assert_eq!(parameters(PTX, "add"), Some(vec![8, 8, 4]));
        assert_eq!(parameters(PTX, "add_more"), Some(vec![8]));
        assert_eq!(parameters(PTX, "none"), Some(vec![]));
        assert_eq!(parameters(PTX, "odd"), None, "a structure by value");
        assert_eq!(parameters(PTX, "ad"), None);
    }

    #[test]
    fn a_launch_with_other_arguments_than_its_kernel_is_refused_by_name() {
        let good = launch("add", vec![Arg::Step, Arg::Null, Arg::F32(1.0)]);
        assert!(check("L00.x", &good, PTX).is_ok());
        let short = launch("add", vec![Arg::Step, Arg::Null]);
        let text = check("L00.x", &short, PTX).unwrap_err().to_string();
        assert!(text.contains("L00.x: kernel add of module m: 2 arguments, it takes 3"), "{text}");
        let wide = launch("add", vec![Arg::Step, Arg::U32(1), Arg::F32(1.0)]);
        let text = check("L00.x", &wide, PTX).unwrap_err().to_string();
        assert!(text.contains("argument 1 (U32(1)) has 4 bytes, the parameter 8"), "{text}");
    }
}
