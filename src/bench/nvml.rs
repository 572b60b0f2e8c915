//! The sensor of an NVIDIA GPU: NVML, the driver's management library, loaded when it is asked
//! for, so that a machine without it builds and runs everything else.

use super::telemetry::{Reading, Sensor, Throttle};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};

/// NVML and the PCI address of one device.
struct NvmlSensor {
    nvml: Nvml,
    pci_bus_id: String,
}

/// The sensor of the device at `pci_bus_id`: indices of NVML and CUDA need not agree, addresses
/// do. The error says in words why there is none.
///
/// # Errors
///
/// NVML's own, in words: no library, no device at that address.
pub fn sensor(pci_bus_id: &str) -> Result<Box<dyn Sensor>, String> {
    let nvml = Nvml::init().map_err(|e| e.to_string())?;
    nvml.device_by_pci_bus_id(pci_bus_id).map_err(|e| format!("{pci_bus_id}: {e}"))?;
    Ok(Box::new(NvmlSensor { nvml, pci_bus_id: pci_bus_id.to_owned() }))
}

impl Sensor for NvmlSensor {
    fn read(&mut self) -> Reading {
        // The handle borrows the library, so it is looked up anew; NVML keeps a table.
        let Ok(device) = self.nvml.device_by_pci_bus_id(self.pci_bus_id.as_str()) else {
            return Reading::default();
        };
        Reading {
            sm_mhz: device.clock_info(Clock::SM).ok(),
            memory_mhz: device.clock_info(Clock::Memory).ok(),
            celsius: device.temperature(TemperatureSensor::Gpu).ok(),
            watts: device.power_usage().ok().map(|mw| f64::from(mw) / 1e3),
            joules: device.total_energy_consumption().ok().map(|mj| mj as f64 / 1e3),
            throttle: Throttle(device.current_throttle_reasons().map_or(0, |r| r.bits())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sensor;

    #[test]
    fn without_the_library_or_the_device_the_reason_is_told() {
        let why = sensor("ffff:ff:1f.7").map(drop).unwrap_err();
        assert!(!why.is_empty());
    }
}
