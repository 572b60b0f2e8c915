//! Seeded contents of the caches, computed where they are needed: at depth the host would take
//! seconds, and the bus as long again.

use super::bind::BoundPlan;
use super::driver::{Context, Module, Stream};
use super::issue::{BoundStep, issue_one};
use super::kernels::{self, ParamType, entry_parameters};
use super::modules::prepare;
use crate::engine::{CacheHalf, stream as values_of};
use crate::error::{Error, Result};

/// Threads of a block, as the kernel is compiled for.
const BLOCK: u32 = 256;
/// Blocks of a multiprocessor: as many as it holds threads for.
const BLOCKS_PER_SM: u32 = 8;

/// What the kernel takes: cache, stream of values, heads, head_dim, capacity, positions.
const PARAMETERS: [ParamType; 6] = {
    use ParamType::{U32, U64};
    [U64, U64, U32, U32, U32, U32]
};

/// Fills positions `0..positions` (at most the capacity) of all caches of `plan` with the values of
/// [`crate::engine::fill_row`]; they are there when it returns.
///
/// # Errors
///
/// [`Error::Driver`].
pub(super) fn fill_caches(
    context: &Context,
    stream: &Stream,
    plan: &BoundPlan,
    positions: u32,
    seed: u64,
) -> Result<()> {
    if positions == 0 {
        return Ok(());
    }
    let cache = plan.plan().cache;
    let (name, compute) = (format!("fill_cache_{}", cache.kind.name()), plan.gpu().compute);
    let text = kernels::ptx("probe", compute)
        .ok_or_else(|| Error::NoDevice(format!("no kernels for compute {compute:?}")))?;
    if entry_parameters(text, &name).as_deref() != Some(&PARAMETERS) {
        return Err(Error::Internal(format!("{name} takes other parameters")));
    }
    let function = Module::load(context, "probe", text)?.function(&name)?;
    prepare(&function, 0)?;
    for layer in 0..cache.layers {
        let addresses = plan.cache_addresses(layer)?;
        for (half, address) in [CacheHalf::Keys, CacheHalf::Values].into_iter().zip(addresses) {
            let sizes = [cache.kv_heads, cache.head_dim, cache.capacity, positions];
            let mut args = vec![address, values_of(seed, layer, half)];
            args.extend(sizes.map(u64::from));
            let step = BoundStep {
                cooperative: false,
                function: function.clone(),
                grid: plan.gpu().sms * BLOCKS_PER_SM,
                block: BLOCK,
                cluster: 1,
                shared_bytes: 0,
                programmatic: false,
                args,
            };
            issue_one(&step, stream)?;
        }
    }
    // The code goes when the function does.
    stream.synchronize()
}

#[cfg(test)]
mod tests;
