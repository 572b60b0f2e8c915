//! Bytes that a token must read and write, and how close that comes to what the memory can do.

use crate::cuda::driver::Device;
use crate::cuda::{ceiling, kernels};
use crate::error::Result;
use crate::plan::DecodePlan;

/// Bytes a token between device memory and the processor, mean over a test's positions
/// `first..first + steps`: all weights once, the cache up to the position.
pub fn bytes_per_token(plan: &DecodePlan, first: u32, steps: u32) -> f64 {
    let last = first.saturating_add(steps);
    let total: u64 = (first..last).map(|position| plan.traffic(position).dram()).sum();
    total as f64 / f64::from(steps.max(1))
}

/// bytes a token × tokens a second / 10⁹.
pub fn gigabytes_per_second(bytes_per_token: f64, tokens_per_second: f64) -> f64 {
    bytes_per_token * tokens_per_second / 1e9
}

/// The fastest read of device memory, measured on this device now, GB/s; `None` on the CPU, where
/// weights partly stay in caches.
///
/// # Errors
///
/// Those of the device.
pub fn ceiling(backend: &str, device: u32) -> Result<Option<f64>> {
    if backend != "cuda" {
        return Ok(None);
    }
    let ceiling = ceiling::measure(Device::get(device)?, &kernels::ptx)?;
    Ok(Some(ceiling.bytes_per_second / 1e9))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_bytes_a_token_times_tokens_a_second() {
        assert_eq!(gigabytes_per_second(2e9, 500.0), 1000.0);
    }
}
