//! `doctor`: what of this machine is ready, and what to fix. Works without a driver.

use crate::Outcome;
use crate::args::{Backend, DoctorArgs};
use crate::output::{one_line, print};
use decode_graph::bench::telemetry::Reading;
use decode_graph::bench::{ceiling, nvml};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::cuda::driver::{Device, DeviceInfo};
use decode_graph::error::Result;
use decode_graph::session::{BackendChoice, DecodeSession, SessionOptions};
use std::fmt::Write;

pub(crate) fn run(args: &DoctorArgs) -> Result<Outcome> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut out = format!("decode-bench {}\n", env!("CARGO_PKG_VERSION"));
    let _ = writeln!(out, "CPU reference  ready: {}, {threads} threads", cpu_name());
    let mut found = Ok(());
    if args.backend != Backend::Cpu {
        found = examine(&mut out);
    }
    print(&out)?;
    match found {
        Err(error) if args.backend == Backend::Cuda => Err(error),
        Ok(()) | Err(_) => Ok(Outcome::Done),
    }
}

/// Tells what each device is and does, and what to fix; the first error of any.
fn examine(out: &mut String) -> Result<()> {
    let devices = Device::all().inspect_err(|error| {
        let _ = writeln!(out, "CUDA           not ready: {}", one_line(&error.to_string()));
        out.push_str(NO_DEVICE);
    })?;
    let (mut found, mut advice) = (Ok(()), Vec::new());
    for device in devices {
        let looked_at = device.info().and_then(|d| {
            let (said, to_fix) = described(&d);
            out.push_str(&said);
            advice.extend(to_fix);
            kernels(d.ordinal)
        });
        match looked_at {
            Ok(said) => out.push_str(&said),
            Err(error) => {
                let _ = writeln!(out, "kernels        not ready: {}", one_line(&error.to_string()));
                found = found.and(Err(error));
            }
        }
    }
    advice.dedup();
    for (i, line) in advice.iter().enumerate() {
        let _ = writeln!(out, "{:<14} {line}", if i == 0 { "To fix it" } else { "" });
    }
    found
}

/// Loads the kernels of a small model, replays a token of it, and reads the memory.
fn kernels(ordinal: u32) -> Result<String> {
    let model = Checkpoint::synthetic(&SyntheticSpec::parse("tiny")?)?;
    let options = SessionOptions {
        backend: BackendChoice::Cuda,
        device: ordinal,
        capacity: 16,
        ..SessionOptions::default()
    };
    let mut session = DecodeSession::new(&model, &options, &mut |_, _| {})?;
    session.feed(1)?;
    let stats = session.stats();
    drop(session);
    let ceiling = ceiling("cuda", ordinal)?.unwrap_or(f64::NAN);
    Ok(format!(
        "kernels        ready: PTX of a small model loaded in {:.2} s, its graph captured in {:.4} s, \
         a token replayed\n\
         ceiling        {ceiling:.0} GB/s, read now\n",
        stats.jit_seconds, stats.capture_seconds
    ))
}

const NO_DEVICE: &str = "\
To fix it      1. is there an NVIDIA GPU?       lspci | grep -i nvidia
               2. is the driver loaded?         nvidia-smi
               3. in a container: was it started with the GPU (--gpus all)?
               4. does CUDA_VISIBLE_DEVICES hide it?
               Until then --backend cpu computes the same tokens, slowly.
";

/// `--list-devices`.
pub(crate) fn list_devices() -> Result<Outcome> {
    let all = Device::all()?;
    let lines: Result<String> = all.iter().map(|d| Ok(described(&d.info()?).0)).collect();
    print(&lines?)?;
    Ok(Outcome::Done)
}

/// Two lines: what a device is, and its state; and what of that is to be fixed.
fn described(d: &DeviceInfo) -> (String, Option<&'static str>) {
    let (major, minor) = d.compute_capability;
    let (now, advice) = match nvml::sensor(&d.pci_bus_id).map(|mut sensor| sensor.read()) {
        Ok(now) => (state(&now), now.throttle.is_active().then_some(THROTTLED)),
        Err(why) => (format!("NVML does not answer: {}", one_line(&why)), Some(NO_SENSOR)),
    };
    let text = format!(
        "CUDA{:<10} {}, compute {major}.{minor}, {} SMs, {:.1} GiB, L2 {} MiB, PCI {}, driver for CUDA {}.{}\n\
         {:<14} {now}\n",
        d.ordinal,
        one_line(&d.name),
        d.sm_count,
        d.memory_bytes as f64 / f64::from(1 << 30),
        d.l2_bytes >> 20,
        d.pci_bus_id,
        d.driver_version / 1000,
        d.driver_version % 1000 / 10,
        ""
    );
    (text, advice)
}

const THROTTLED: &str =
    "throttled: more air, or a higher limit: nvidia-smi -q -d PERFORMANCE,POWER";
const NO_SENSOR: &str = "NVML: in a container NVIDIA_DRIVER_CAPABILITIES must hold utility";

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
