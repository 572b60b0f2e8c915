//! A plan's program on the device: the table of instructions and the mail between their blocks.
//!
//! ```text
//! table      one row of 48 slots a step        read by every block, constant
//! mail       a word an element, a buffer after the other
//! partials   64-bit words of split attentions
//! trace      readings of the clock, only while profiling
//! ```

use super::driver::{Context, DeviceMemory, Stream};
use crate::error::{Error, Result};
use crate::ops::{Arg, Buf, Launch};
use crate::plan::program::{HELPERS, Program, SLOTS, Slot, WARPS};

/// Module and entry of the kernel.
pub(super) const MODULE: &str = "persistent";
const ENTRY: &str = "decode_step";
/// Words of the trace for a step and block.
pub(super) const TRACE_WORDS: usize = 8;
/// Alignment of a buffer's mail, bytes.
const ALIGNMENT: u64 = 256;

/// Where one buffer's mail is.
#[derive(Clone, Copy, Debug)]
struct Place {
    buf: Buf,
    offset: u64,
    bytes: u64,
    writes: u16,
}

/// A program and its memory.
#[derive(Debug)]
pub(super) struct BoundProgram {
    program: Program,
    places: Vec<Place>,
    partials: u64,
    table: DeviceMemory,
    mail: DeviceMemory,
    trace: Option<DeviceMemory>,
}

impl BoundProgram {
    /// Bytes of table, mail and partial results.
    pub(super) fn bytes(&self) -> u64 {
        table_bytes(&self.program) + self.partials + 8 * self.program.partials
    }

    /// Allocates; [`Self::fill`] writes the table once the addresses are known.
    pub(super) fn new(
        context: &Context,
        stream: &Stream,
        program: Program,
        trace: bool,
    ) -> Result<Self> {
        let (places, partials) = places(&program);
        let table = DeviceMemory::alloc(context, "program", table_bytes(&program))?;
        let mail = DeviceMemory::alloc(context, "mail", partials + 8 * program.partials)?;
        // Partial results carry the number of their step, which is never 0.
        mail.fill(stream, 0)?;
        let trace = if trace {
            let words = program.instructions.len() * program.grid as usize * TRACE_WORDS;
            let memory = DeviceMemory::alloc(context, "trace", 4 * words as u64)?;
            memory.fill(stream, 0)?;
            Some(memory)
        } else {
            None
        };
        Ok(Self { program, places, partials, table, mail, trace })
    }

    pub(super) fn table(&self) -> u64 {
        self.table.address()
    }

    /// Address of the trace; 0 without one.
    pub(super) fn trace_address(&self) -> u64 {
        self.trace.as_ref().map_or(0, DeviceMemory::address)
    }

    /// The trace of the last token, `[steps][blocks][TRACE_WORDS]`; empty without one.
    pub(super) fn trace(&self, stream: &Stream) -> Result<Vec<u32>> {
        let Some(memory) = &self.trace else { return Ok(Vec::new()) };
        let mut out =
            vec![0; self.program.instructions.len() * self.program.grid as usize * TRACE_WORDS];
        memory.download(stream, 0, &mut out)?;
        Ok(out)
    }

    /// Writes the table; `slot` resolves what a launch can name too.
    pub(super) fn fill(&self, stream: &Stream, slot: &dyn Fn(&Arg) -> Result<u64>) -> Result<()> {
        let mut rows = Vec::with_capacity(self.program.instructions.len() * SLOTS);
        for instruction in &self.program.instructions {
            for s in &instruction.slots {
                rows.push(match s {
                    Slot::Arg(arg) => slot(arg)?,
                    Slot::Mail(buf) => self.mail_of(*buf)?,
                    Slot::Version { writes, ordinal } => {
                        u64::from(*writes) << 16 | u64::from(*ordinal)
                    }
                    Slot::Words(low, high) => u64::from(*high) << 32 | u64::from(*low),
                    Slot::Partials => self.mail.address() + self.partials,
                });
            }
        }
        self.table.upload(stream, 0, &rows)
    }

    fn mail_of(&self, buf: Buf) -> Result<u64> {
        let place = self.places.iter().find(|p| p.buf == buf);
        let place = place.ok_or_else(|| Error::Internal(format!("{buf:?} has no mail")))?;
        Ok(self.mail.address() + place.offset)
    }

    /// Makes every word of mail one that the step numbered `epoch` does not take for its own: the
    /// tag before the first one that it publishes. Called whenever the numbers do not go on by one.
    pub(super) fn reset(&self, stream: &Stream, epoch: u32) -> Result<()> {
        for p in &self.places {
            let tag = epoch.wrapping_mul(u32::from(p.writes)).wrapping_sub(1) as u8;
            self.mail.fill_range(stream, p.offset, p.bytes, tag)?;
        }
        Ok(())
    }

    /// The launch of steps `first..last`.
    pub(super) fn launch(&self, first: usize, last: usize) -> Launch {
        let p = &self.program;
        let n = |n: u32| Arg::U32(n);
        Launch {
            module: MODULE.to_owned(),
            kernel: ENTRY.to_owned(),
            grid: p.grid,
            block: 32 * (WARPS + HELPERS),
            cluster: 1,
            shared_bytes: p.shared_bytes,
            programmatic: false,
            args: vec![
                Arg::Step,
                Arg::Program,
                n(first as u32),
                n(last as u32),
                n(p.instructions.len() as u32),
                n(p.chunk_bytes),
                n(p.record_bytes),
                Arg::Trace,
            ],
        }
    }

    pub(super) fn steps(&self) -> usize {
        self.program.instructions.len()
    }
}

fn table_bytes(program: &Program) -> u64 {
    (program.instructions.len() * SLOTS * 8) as u64
}

/// Where every buffer's mail is, and where it ends.
fn places(program: &Program) -> (Vec<Place>, u64) {
    let mut offset = 0;
    let mut places = Vec::new();
    for &(buf, elements, writes) in &program.mail {
        let bytes = (4 * u64::from(elements)).next_multiple_of(ALIGNMENT);
        places.push(Place { buf, offset, bytes, writes });
        offset += bytes;
    }
    (places, offset)
}
