//! The read ceiling of a device: bytes per second that kernels can read from its memory at most.
//!
//! ```text
//! ceiling = max over grids of  median over runs of  buffer bytes / device time
//! ```
//!
//! The buffer is far larger than the L2 cache, and every byte is read once.

use super::bind::{KernelSource, gpu_of};
use super::driver::{Context, Device, DeviceMemory, Event, Module, Stream};
use super::issue::{BoundStep, issue_one};
use super::kernels::{ParamType, entry_parameters};
use super::modules::prepare;
use crate::error::{Error, Result};

/// Bytes that are read, at most.
const BUFFER_BYTES: u64 = 4 << 30;
/// Threads of a block, as the kernel is compiled for.
const BLOCK: u32 = 512;
/// Blocks of a multiprocessor that are tried.
const BLOCKS_PER_SM: [u32; 4] = [2, 4, 8, 16];
/// Timed runs of a grid.
const RUNS: usize = 12;

/// What the device reads at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ReadCeiling {
    /// Bytes per second: the median run of the best grid.
    pub bytes_per_second: f64,
    /// Blocks of that grid.
    pub grid: u32,
    /// Bytes of the buffer.
    pub buffer_bytes: u64,
    /// Runs of each grid.
    pub runs: usize,
}

/// Measures the read ceiling of `device`, with memory of its own.
///
/// # Errors
///
/// [`Error::OutOfMemory`] when not even 64 MiB are free; [`Error::Driver`].
pub fn measure(device: Device, kernels: KernelSource<'_>) -> Result<ReadCeiling> {
    let context = Context::new(device)?;
    let gpu = gpu_of(&context)?;
    let free = context.memory()?.0;
    let bytes = (free / 4).min(BUFFER_BYTES) & !((1 << 20) - 1);
    if bytes < 64 << 20 {
        let (what, advice) = ("the read ceiling's buffer".to_owned(), "free GPU memory".to_owned());
        return Err(Error::OutOfMemory { what, need: 256 << 20, free, advice });
    }
    let text = kernels("probe", gpu.compute)
        .ok_or_else(|| Error::NoDevice(format!("no kernels for compute {:?}", gpu.compute)))?;
    let expected = [ParamType::U64; 3];
    if entry_parameters(text, "read_ceiling").as_deref() != Some(&expected) {
        return Err(Error::Internal("read_ceiling takes other parameters".to_owned()));
    }
    let stream = Stream::new(&context)?;
    let function = Module::load(&context, "probe", text)?.function("read_ceiling")?;
    prepare(&function, 0)?;
    let data = DeviceMemory::alloc(&context, "read ceiling", bytes)?;
    let most = gpu.sms * BLOCKS_PER_SM.iter().max().unwrap_or(&1);
    let out = DeviceMemory::alloc(&context, "read ceiling sums", u64::from(most) * 4)?;
    // Memory that nobody wrote may be read from nowhere.
    data.fill(&stream, 0x5A)?;
    let (start, end) = (Event::new(&context)?, Event::new(&context)?);
    let mut best: Option<ReadCeiling> = None;
    for per_sm in BLOCKS_PER_SM {
        let grid = gpu.sms * per_sm;
        let step = BoundStep {
            cooperative: false,
            function: function.clone(),
            grid,
            block: BLOCK,
            cluster: 1,
            shared_bytes: 0,
            programmatic: false,
            args: vec![data.address(), bytes / 16, out.address()],
        };
        issue_one(&step, &stream)?;
        let mut seconds = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            start.record(&stream)?;
            issue_one(&step, &stream)?;
            end.record(&stream)?;
            end.synchronize()?;
            seconds.push(f64::from(end.milliseconds_since(&start)?) / 1e3);
        }
        let bytes_per_second = bytes as f64 / median(&mut seconds);
        if best.is_none_or(|b| bytes_per_second > b.bytes_per_second) {
            let (buffer_bytes, runs) = (bytes, RUNS);
            best = Some(ReadCeiling { bytes_per_second, grid, buffer_bytes, runs });
        }
    }
    stream.synchronize()?;
    best.ok_or_else(|| Error::Internal("no grid was measured".to_owned()))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let n = values.len();
    match n {
        0 => f64::NAN,
        _ if n % 2 == 1 => values[n / 2],
        _ => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn a_median_is_the_middle_or_the_mean_of_the_two_middles() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&mut []).is_nan());
    }
}
