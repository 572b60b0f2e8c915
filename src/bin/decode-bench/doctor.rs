//! `doctor`: what of this machine is ready, and what to fix. Works without a driver.

use crate::Outcome;
use crate::args::{Backend, DoctorArgs};
use crate::output::{one_line, print};
use decode_graph::bench::nvml;
use decode_graph::bench::telemetry::Reading;
use decode_graph::cuda::driver::Device;
use decode_graph::error::Result;
use std::fmt::Write;

pub(crate) fn run(args: &DoctorArgs) -> Result<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut out = format!("decode-bench {}\n", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "CPU reference  ready: {}, {threads} threads", cpu_name());
    let devices = if args.backend == Backend::Cpu { Ok(String::new()) } else { devices() };
    match &devices {
        Ok(list) => out.push_str(list),
        Err(error) => {
            let _ = writeln!(out, "CUDA           not ready: {}", one_line(&error.to_string()));
            out.push_str(ADVICE);
        }
    }
    print(&out)?;
    match devices {
        Err(error) if args.backend == Backend::Cuda => Err(error),
        Ok(_) | Err(_) => Ok(Outcome::Done),
    }
}

const ADVICE: &str = "\
To fix it      1. is there an NVIDIA GPU?       lspci | grep -i nvidia
               2. is the driver loaded?         nvidia-smi
               3. in a container: was it started with the GPU (--gpus all)?
               4. does CUDA_VISIBLE_DEVICES hide it?
               Until then --backend cpu computes the same tokens, slowly.
";

/// `--list-devices`.
pub(crate) fn list_devices() -> Result<Outcome> {
    print(&devices()?)?;
    Ok(Outcome::Done)
}

/// A line or two for each CUDA device.
fn devices() -> Result<String> {
    let mut out = String::new();
    for device in Device::all()? {
        let d = device.info()?;
        let (major, minor) = d.compute_capability;
        let _ = writeln!(
            out,
            "CUDA{:<10} {}, compute {major}.{minor}, {} SMs, {:.1} GiB, L2 {} MiB, PCI {}, driver for CUDA {}.{}",
            d.ordinal,
            one_line(&d.name),
            d.sm_count,
            d.memory_bytes as f64 / f64::from(1 << 30),
            d.l2_bytes >> 20,
            d.pci_bus_id,
            d.driver_version / 1000,
            d.driver_version % 1000 / 10
        );
        let now = match nvml::sensor(&d.pci_bus_id) {
            Ok(mut sensor) => state(&sensor.read()),
            Err(why) => format!("NVML does not answer: {}", one_line(&why)),
        };
        let _ = writeln!(out, "{:<14} {now}", "");
    }
    Ok(out)
}

/// Clocks, temperature, power and throttling in a line.
fn state(now: &Reading) -> String {
    let known = |value: Option<String>, unit: &str| match value {
        Some(value) => format!("{value} {unit}"),
        None => format!("- {unit}"),
    };
    let reasons = now.throttle.reasons();
    [
        known(now.sm_mhz.map(|v| v.to_string()), "MHz SM"),
        known(now.memory_mhz.map(|v| v.to_string()), "MHz memory"),
        known(now.celsius.map(|v| v.to_string()), "°C"),
        known(now.watts.map(|v| format!("{v:.0}")), "W"),
        if reasons.is_empty() { "not throttled".to_owned() } else { reasons.join(", ") },
    ]
    .join(", ")
}

/// Name of the CPU, as the system tells it.
pub(crate) fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let named = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    named.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
