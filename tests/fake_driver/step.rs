//! The end of a step, as the last kernel of a token makes it.

use super::plants::Plant;
use super::state::State;
use decode_graph::cuda::step_state::{NOT_FORCED, RING_SLOTS, StepState};
use decode_graph::ops::HostState;
use std::sync::atomic::{AtomicU64, Ordering};

/// The step state at `address`.
pub(super) fn read_step(s: &State, address: u64) -> Result<StepState, u32> {
    Ok(bytemuck::pod_read_unaligned(s.read(address, size_of::<StepState>())?))
}

/// Ends the step as the last kernel of a token does; `chosen` is `None` where nothing was computed.
pub(super) fn advance(
    s: &mut State,
    address: u64,
    forced: u64,
    ring: u64,
    chosen: Option<HostState>,
) -> Result<(), u32> {
    const RING_STATUS: u32 = 0x8000_0000;
    let mut step = read_step(s, address)?;
    let (steps, position) = (step.steps, step.position);
    let finite = s.plant == Some(Plant::NonFiniteIgnored) || chosen.is_some_and(|c| c.finite);
    let capacity = step.capacity + u32::from(s.plant == Some(Plant::CapacityIgnored)) * 4;
    let mut entry = chosen.map_or(0, |c| c.next);
    let mut status = step.status;
    if status == 0 {
        if position >= capacity {
            status = 1;
        } else if step.token >= step.vocab {
            status = 2;
        } else if !finite {
            status = 4;
        } else {
            let mut next = entry;
            if position + 1 < step.capacity && s.plant != Some(Plant::ForcedIgnored) {
                let f = s.read(forced + 4 * u64::from(position + 1), 4)?;
                let f = u32::from_le_bytes([f[0], f[1], f[2], f[3]]);
                next = if f == NOT_FORCED { next } else { f };
            }
            step = StepState { token: next, position: position + 1, steps: steps + 1, ..step };
            step.status = if next < step.vocab { 0 } else { 2 };
        }
    } else if position >= step.capacity {
        status |= 1;
    }
    if status != 0 {
        step.status = status;
        entry = RING_STATUS | status;
    }
    s.write(address, bytemuck::bytes_of(&step))?;
    let behind = u32::from(s.plant == Some(Plant::RingOneStepBehind));
    let slot = ring + 16 * u64::from(steps % RING_SLOTS);
    let clock = s.clock;
    let entry = u64::from(steps + 1 - behind) << 32 | u64::from(entry);
    if s.plant == Some(Plant::LateToken) {
        late(s.on_host(slot), [entry, clock]);
        return Ok(());
    }
    s.write(slot + 8, &clock.to_le_bytes())?;
    s.write(slot, &entry.to_le_bytes())
}

/// Writes a slot of the ring, at `address` of the host, later.
fn late(address: u64, [entry, clock]: [u64; 2]) {
    std::thread::spawn(move || {
        std::thread::sleep(Plant::LATE);
        // SAFETY: the ring lives as long as its session, which the test keeps until it has seen the
        // token; host and device reach it word by word.
        let slot = unsafe { std::slice::from_raw_parts(address as *const AtomicU64, 2) };
        slot[1].store(clock, Ordering::Relaxed);
        slot[0].store(entry, Ordering::Release);
    });
}
