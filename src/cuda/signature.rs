//! A launch against the parameter list of its kernel, before anything runs.

use super::kernels::{ParamType, entry_parameters};
use crate::error::{Error, Result};
use crate::ops::{Arg, Launch};

/// The parameter that takes `arg`.
fn parameter_of(arg: &Arg) -> ParamType {
    match arg {
        Arg::Buf(_)
        | Arg::Weight(_)
        | Arg::Null
        | Arg::Step
        | Arg::Forced
        | Arg::Ring
        | Arg::Keys(_)
        | Arg::Values(_)
        | Arg::Zeros
        | Arg::Counters
        | Arg::Program
        | Arg::Trace => ParamType::U64,
        Arg::U32(_) => ParamType::U32,
        Arg::F32(_) => ParamType::F32,
    }
}

/// Checks that the arguments of `launch` are those that its kernel in `ptx` takes, by number and
/// type.
///
/// # Errors
///
/// [`Error::Internal`] with the step's label and the first difference.
pub(super) fn check(label: &str, launch: &Launch, ptx: &str) -> Result<()> {
    let at = || format!("{label}: kernel {} of module {}", launch.kernel, launch.module);
    let Some(wanted) = entry_parameters(ptx, &launch.kernel) else {
        return Err(Error::Internal(format!("{}: there is no such entry", at())));
    };
    let given: Vec<ParamType> = launch.args.iter().map(parameter_of).collect();
    if given.len() != wanted.len() {
        let (given, wanted) = (given.len(), wanted.len());
        return Err(Error::Internal(format!("{}: {given} arguments, it takes {wanted}", at())));
    }
    match given.iter().zip(&wanted).position(|(a, b)| a != b) {
        None => Ok(()),
        Some(i) => Err(Error::Internal(format!(
            "{}: argument {i} is {:?}, the parameter {:?}",
            at(),
            launch.args[i],
            wanted[i]
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: &str = "
.visible .entry add(
\t.param .u64 .ptr .align 1 add_param_0,
\t.param .u64 add_param_1,
\t.param .f32 add_param_2
)
{ ret; }
";

    fn launch(kernel: &str, args: Vec<Arg>) -> Launch {
        let (module, kernel) = ("m".to_owned(), kernel.to_owned());
        let (grid, block, cluster, shared_bytes, programmatic) = (1, 32, 1, 0, false);
        Launch { module, kernel, grid, block, cluster, shared_bytes, programmatic, args }
    }

    #[test]
    fn a_launch_with_other_arguments_than_its_kernel_is_refused_by_name() {
        let good = launch("add", vec![Arg::Step, Arg::Null, Arg::F32(1.0)]);
        assert!(check("L00.x", &good, PTX).is_ok());
        let text = |l: &Launch| check("L00.x", l, PTX).unwrap_err().to_string();
        let short = text(&launch("add", vec![Arg::Step, Arg::Null]));
        assert!(
            short.contains("L00.x: kernel add of module m: 2 arguments, it takes 3"),
            "{short}"
        );
        let wide = text(&launch("add", vec![Arg::Step, Arg::U32(1), Arg::F32(1.0)]));
        assert!(wide.contains("argument 1 is U32(1), the parameter U64"), "{wide}");
        let kind = text(&launch("add", vec![Arg::Step, Arg::Null, Arg::U32(1)]));
        assert!(kind.contains("argument 2 is U32(1), the parameter F32"), "{kind}");
        assert!(text(&launch("ad", vec![])).contains("no such entry"));
    }
}
