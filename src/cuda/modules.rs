//! The modules of a plan's launches: found, checked against the launches, and loaded once each.

use super::bind::KernelSource;
use super::driver::{Context, Function, Module};
use super::signature;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::ops::{Gpu, Launch};
use crate::plan::DecodePlan;
use std::collections::HashMap;

/// A weight type or device without a kernel, told as what the model asks for.
pub(super) fn no_kernel(checkpoint: &Checkpoint, error: Missing) -> Error {
    match error {
        Missing::Other(e) => e,
        Missing::Module { label, module, compute } => Error::Unsupported {
            path: checkpoint.path().to_owned(),
            at: label,
            what: format!("module {module} on compute capability {}.{}", compute.0, compute.1),
            instead: "use a device of compute capability 8.0 or later, or --backend cpu".to_owned(),
        },
    }
}

/// Why there is no code.
pub(super) enum Missing {
    Module { label: String, module: String, compute: (u32, u32) },
    Other(Error),
}

/// The text of every module, once every launch was checked against it.
pub(super) fn sources(
    plan: &DecodePlan,
    launches: &[Launch],
    gpu: Gpu,
    kernels: KernelSource<'_>,
) -> Result<HashMap<String, &'static str>, Missing> {
    let mut code = HashMap::new();
    let mut checked: HashMap<(&str, &str), Vec<&Launch>> = HashMap::new();
    for (step, launch) in plan.steps.iter().zip(launches) {
        let text = match code.get(&launch.module) {
            Some(text) => *text,
            None => {
                let text = kernels(&launch.module, gpu.compute).ok_or_else(|| Missing::Module {
                    label: step.label.clone(),
                    module: launch.module.clone(),
                    compute: gpu.compute,
                })?;
                code.insert(launch.module.clone(), text);
                text
            }
        };
        // The layers repeat the same kernels: each list of parameters is read once.
        let seen = checked.entry((&launch.module, &launch.kernel)).or_default();
        if !seen.iter().any(|l| same_parameters(l, launch)) {
            signature::check(&step.label, launch, text).map_err(Missing::Other)?;
            seen.push(launch);
        }
    }
    Ok(code)
}

fn same_parameters(a: &Launch, b: &Launch) -> bool {
    use std::mem::discriminant;
    a.args.len() == b.args.len()
        && a.args.iter().zip(&b.args).all(|(a, b)| discriminant(a) == discriminant(b))
}

pub(super) type Functions = HashMap<(String, String), Function>;

/// Loads every module once and prepares every function.
pub(super) fn load(
    context: &Context,
    launches: &[Launch],
    code: &HashMap<String, &'static str>,
) -> Result<Functions> {
    let mut largest: HashMap<(String, String), u32> = HashMap::new();
    for l in launches {
        let most = largest.entry((l.module.clone(), l.kernel.clone())).or_default();
        *most = l.shared_bytes.max(*most);
    }
    let mut modules: HashMap<&str, Module> = HashMap::new();
    let mut functions = HashMap::new();
    for (key, shared_bytes) in largest {
        let (name, text) = code
            .get_key_value(&key.0)
            .ok_or_else(|| Error::Internal(format!("module {} has no text", key.0)))?;
        let module = match modules.get(name.as_str()) {
            Some(module) => module,
            None => {
                let module = Module::load(context, name, text)?;
                log::debug!("{name}: {}", module.log());
                modules.entry(name).or_insert(module)
            }
        };
        let function = module.function(&key.1)?;
        prepare(&function, shared_bytes)?;
        functions.insert(key, function);
    }
    Ok(functions)
}

/// Allows a launch's shared memory, and gives all of the multiprocessor's memory to it.
pub(super) fn prepare(function: &Function, shared_bytes: u32) -> Result<()> {
    function.set_max_dynamic_shared(shared_bytes)?;
    // On every kernel alike: two that differ cannot be on one multiprocessor at the same time, so
    // it drains between them.
    function.set_shared_carveout(100)
}
