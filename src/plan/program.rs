//! A step as the persistent kernel reads it: one row of 48 slots, plain data made without CUDA types.
//!
//! `ptx/persistent/program.cuh` declares the same slots in the same order. A step that has no such
//! form (a plain op, an f32 cache, a head size without kernel) makes [`Program::of`] answer `None`:
//! the plan is then issued kernel by kernel.

use super::DecodePlan;
use crate::ops::gemv::{activation_bytes, optional, tiles};
use crate::ops::{
    Activation, Arg, Attention, Buf, Embed, Gpu, KvType, Matrix, Op, Pairing, RmsNorm, fused,
};
use crate::quant::{TileLayout, tile};

/// Slots of an instruction.
pub const SLOTS: usize = 48;
/// Warps of a block.
pub const WARPS: u32 = 16;
/// Warps beside them, which ask for weights, plan and finish: in fours, by which registers are given.
pub const HELPERS: u32 = 8;
/// Shared memory ahead of the ring: instructions, barriers (`Board` of `ptx/persistent/board.cuh`).
const BOARD_BYTES: u32 = 14592;
/// Chunks of the ring.
pub const CHUNKS: u32 = 16;
/// Chunks on their way, at most.
pub const FLIGHT: u32 = 6;
/// Units of a chunk, at most.
const UNITS: u32 = 8;
/// Sums of parts of tiles that are held before they are added up.
const SUMS: u32 = 128;
/// Clock cycles of a warp's part of a tile, of a unit that it finds in registers, of one that it does
/// not, and of a barrier before the first: estimates, only their order of size matters.
const PART_COST: u32 = 150;
const HELD_COST: u32 = 350;
const UNIT_COST: u32 = 450;
const BARRIER_COST: u32 = 400;
/// What the kernel is made for: registers go from one warp to another, which later devices cannot.
const COMPUTE: (u32, u32) = (9, 0);
/// Positions of a group.
const POSITIONS: u32 = 16;
/// Query heads of a key/value head, at most.
const HEADS: u32 = 8;
/// Shared memory that the kernel declares itself, rounded up.
const STATIC_BYTES: u32 = 1024;

/// What one slot is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Slot {
    /// Anything that a launch can name.
    Arg(Arg),
    /// Address of a buffer's mail, `[elements]` words.
    Mail(Buf),
    /// `writes << 16 | ordinal`: which version of a buffer's mail.
    Version {
        /// Times that the buffer is published in a token.
        writes: u16,
        /// Which of them.
        ordinal: u16,
    },
    /// Two numbers, the first in the low half.
    Words(u32, u32),
    /// Address of the partial results of a split attention.
    Partials,
}

/// Kinds of step, by the number that the kernel knows them by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Embed = 0,
    Qkv = 1,
    Attention = 2,
    Project = 3,
    GateUp = 4,
    LmHead = 5,
}

/// Index of each slot.
mod at {
    pub(super) const KIND: usize = 0;
    pub(super) const ITEMS: usize = 1;
    pub(super) const WEIGHT: usize = 2;
    pub(super) const TILES: usize = 5;
    pub(super) const UNITS: usize = 7;
    pub(super) const UNIT_BYTES: usize = 8;
    pub(super) const TILE_BYTES: usize = 10;
    pub(super) const TAIL: usize = 14;
    pub(super) const FORMAT: usize = 15;
    pub(super) const X: usize = 17;
    pub(super) const X_TAG: usize = 18;
    pub(super) const GAIN: usize = 19;
    pub(super) const EPS: usize = 20;
    pub(super) const COLUMNS: usize = 21;
    pub(super) const Y: usize = 22;
    pub(super) const Y_MAIL: usize = 23;
    pub(super) const Y_TAG: usize = 24;
    pub(super) const RESIDUAL: usize = 25;
    pub(super) const BIAS: usize = 26;
    pub(super) const ROWS: usize = 29;
    pub(super) const FREQS: usize = 31;
    pub(super) const HALF_ROTARY: usize = 32;
    pub(super) const HALVES: usize = 33;
    pub(super) const MAGNITUDE: usize = 34;
    pub(super) const HEAD_DIM: usize = 35;
    pub(super) const KV_HEADS: usize = 36;
    pub(super) const GROUP: usize = 37;
    pub(super) const CAPACITY: usize = 38;
    pub(super) const KEYS: usize = 39;
    pub(super) const VALUES: usize = 40;
    pub(super) const K_MAIL: usize = 41;
    pub(super) const V_MAIL: usize = 42;
    pub(super) const PARTIALS: usize = 43;
    pub(super) const CANDIDATES: usize = 44;
    pub(super) const COUNTERS: usize = 45;
    pub(super) const FORCED: usize = 46;
    pub(super) const RING: usize = 47;
}

/// One step.
#[derive(Clone, Debug, PartialEq)]
pub struct Instruction {
    /// In the kernel's order.
    pub slots: [Slot; SLOTS],
    /// Bytes of its staged activations, or of its scratch.
    record_bytes: u32,
    /// 64-bit words of a block's partial results.
    partials: u32,
}

/// A whole plan for the persistent kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// One a step.
    pub instructions: Vec<Instruction>,
    /// Buffers that have mail, with their words and how often a token publishes them.
    pub mail: Vec<(Buf, u32, u16)>,
    /// 64-bit words of partial results.
    pub partials: u64,
    /// Blocks.
    pub grid: u32,
    /// Bytes of a place in the ring.
    pub chunk_bytes: u32,
    /// Bytes of the staged activations.
    pub record_bytes: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
}

/// What is published while the steps are walked.
#[derive(Default)]
struct Mail {
    published: Vec<(Buf, u32, u16)>,
    /// Key and value buffers of the last `qkv`.
    appended: Option<(Buf, Buf)>,
    /// Steps so far.
    steps: usize,
    /// Of each version: what it is, the step that writes it, and the gain that its reader wants it
    /// to be posted with.
    versions: Vec<(Buf, usize, Option<Wanted>)>,
}

/// How a version is read: as it is, or times a norm's gain.
#[derive(Clone, Copy, PartialEq)]
enum Wanted {
    Plain,
    Times(Arg),
}

impl Mail {
    fn ordinal(&self, buf: Buf) -> Option<u16> {
        self.published.iter().find(|m| m.0 == buf).and_then(|m| m.2.checked_sub(1))
    }

    fn publish(&mut self, buf: Buf, elements: u32) -> Option<u16> {
        match self.published.iter_mut().find(|m| m.0 == buf) {
            Some(m) => {
                m.2 = m.2.checked_add(1)?;
                (m.1 == elements).then_some(m.2 - 1)
            }
            None => {
                self.published.push((buf, elements, 1));
                Some(0)
            }
        }
    }

    /// Notes how the last version of `buf` is read; `None` where another step reads it otherwise.
    fn want(&mut self, buf: Buf, wanted: Wanted) -> Option<()> {
        let version = self.versions.iter_mut().rev().find(|v| v.0 == buf)?;
        (*version.2.get_or_insert(wanted) == wanted).then_some(())
    }
}

impl Instruction {
    fn new(kind: Kind) -> Self {
        let slots = [Slot::Arg(Arg::Null); SLOTS];
        let mut this = Self { slots, record_bytes: 0, partials: 0 };
        this.number(at::KIND, kind as u32);
        this
    }

    fn arg(&mut self, slot: usize, arg: Arg) {
        self.slots[slot] = Slot::Arg(arg);
    }

    fn number(&mut self, slot: usize, n: u32) {
        self.arg(slot, Arg::U32(n));
    }

    /// Geometry of the first matrix, or (`which` 1) of the last one.
    fn matrix(&mut self, which: usize, w: &Matrix) {
        let layout =
            TileLayout { format: w.format, rows: w.rows as usize, columns: w.columns as usize };
        self.number(at::UNIT_BYTES + which, layout.unit_bytes() as u32);
        self.number(at::TILE_BYTES + which, layout.tile_bytes() as u32);
        self.number(at::FORMAT + which, w.format.describe().ggml_id());
        if which == 0 {
            self.number(at::UNITS, layout.units() as u32);
            self.number(at::TAIL, layout.tail_columns() as u32);
            self.number(at::COLUMNS, w.columns);
            self.arg(at::WEIGHT, Arg::Weight(w.id));
            self.number(at::ROWS, w.rows);
            self.number(at::TILES, tiles(w.rows));
            self.number(at::ITEMS, tiles(w.rows));
        }
    }

    fn number_at(&self, slot: usize) -> Option<u32> {
        match self.slots[slot] {
            Slot::Arg(Arg::U32(n)) => Some(n),
            _ => None,
        }
    }

    /// Shares the tiles of a block out among its warps, so that they are done soonest: `parts` warps
    /// are a set and have units of the same tiles, each always the same units.
    fn share_out(&mut self, blocks: u32, chunk_bytes: u32) -> Option<()> {
        let kind = self.number_at(at::KIND)?;
        if kind == Kind::Embed as u32 {
            return Some(());
        }
        let each = |unit_bytes: u32| {
            let n = (chunk_bytes / unit_bytes).min(UNITS);
            (n > 0).then_some(n)
        };
        // In the upper half of the slot: the kernel divides by multiplying.
        let in_chunks = |each: u32| each << 8 | (1u32 << 15).div_ceil(each) << 16;
        if kind == Kind::Attention as u32 {
            let group_bytes = POSITIONS * 2 * self.number_at(at::HEAD_DIM)?;
            // A power of two: there may be more groups than the division is exact for.
            let each = 1 << each(group_bytes)?.ilog2();
            self.slots[at::UNITS] = Slot::Words(0, in_chunks(each));
            return Some(());
        }
        let unit_bytes = self.number_at(at::UNIT_BYTES)?;
        let other = self.number_at(at::UNIT_BYTES + 1).unwrap_or(0);
        let each = each(unit_bytes.max(other))?;
        let (units, items) = (self.number_at(at::UNITS)?, self.number_at(at::ITEMS)?);
        let tiles = items.div_ceil(blocks) * if kind == Kind::GateUp as u32 { 2 } else { 1 };
        // Tiles come one after the other: sets that are many tiles apart would wait for the ring.
        let near = (CHUNKS / 2 / units.div_ceil(each)).max(1);
        let sets = |parts: u32| (WARPS / parts).min(near).min(tiles);
        let cost = |parts: &u32| {
            let run = units.div_ceil(*parts);
            let unit = if run == 1 { HELD_COST } else { UNIT_COST };
            let barrier = if sets(*parts) == 1 { 0 } else { BARRIER_COST };
            tiles.div_ceil(sets(*parts)) * (PART_COST + run * unit) + barrier
        };
        // The most parts of equals: nearest to a tile at a time.
        let parts = (1..=units.min(WARPS)).rev().min_by_key(cost)?;
        // In fours, so that the same thread finishes a row in every step: it finds there what it wrote. Not
        // too many: what is finished while the next are multiplied need not be waited for.
        let at_once = ((SUMS / parts) & !3).min(16);
        self.slots[at::UNITS] =
            Slot::Words(units | parts << 16 | sets(parts) << 24, at_once | in_chunks(each));
        Some(())
    }

    fn reads(&mut self, mail: &mut Mail, buf: Buf, wanted: Wanted) -> Option<()> {
        mail.want(buf, wanted)?;
        self.slots[at::X] = Slot::Mail(buf);
        self.slots[at::X_TAG] = Slot::Version { writes: 0, ordinal: mail.ordinal(buf)? };
        Some(())
    }

    /// The first matrix, of the format that the activations are staged for, and its input.
    fn multiplies(&mut self, mail: &mut Mail, w: &Matrix, x: Buf, wanted: Wanted) -> Option<()> {
        self.reads(mail, x, wanted)?;
        self.matrix(0, w);
        self.record_bytes = activation_bytes(w.format) * self.number_at(at::UNITS)?;
        Some(())
    }

    /// The product behind a norm. The gain is folded in by who posts its input, a factor an element
    /// once instead of in every block; the root of the mean square is a factor of the sums.
    fn norms(&mut self, mail: &mut Mail, w: &Matrix, norm: &RmsNorm) -> Option<()> {
        self.arg(at::EPS, Arg::F32(norm.eps));
        self.multiplies(mail, w, norm.x, Wanted::Times(Arg::Weight(norm.gain.id)))
    }

    fn writes(&mut self, mail: &mut Mail, buf: Buf, elements: u32) -> Option<()> {
        mail.versions.push((buf, mail.steps, None));
        self.arg(at::Y, Arg::Buf(buf));
        self.slots[at::Y_MAIL] = Slot::Mail(buf);
        let ordinal = mail.publish(buf, elements)?;
        self.slots[at::Y_TAG] = Slot::Version { writes: 0, ordinal };
        Some(())
    }

    fn embed(op: &Embed, mail: &mut Mail) -> Option<Self> {
        let mut this = Self::new(Kind::Embed);
        this.matrix(0, &op.table);
        this.arg(at::MAGNITUDE, Arg::F32(op.scale));
        this.writes(mail, op.out, op.table.columns)?;
        Some(this)
    }

    fn qkv(op: &fused::Qkv, mail: &mut Mail) -> Option<Self> {
        let (q, k, v) = (&op.q.weight, &op.k.weight, &op.v.weight);
        let one_kind = q.format.describe().dot_kind() == v.format.describe().dot_kind();
        let cache = &op.append.cache;
        if q.format != k.format || !one_kind || cache.kind != KvType::F16 {
            return None;
        }
        let mut this = Self::new(Kind::Qkv);
        this.norms(mail, q, &op.norm)?;
        this.matrix(1, v);
        this.arg(at::WEIGHT + 1, Arg::Weight(k.id));
        this.arg(at::WEIGHT + 2, Arg::Weight(v.id));
        this.number(at::TILES + 1, tiles(k.rows));
        this.number(at::ROWS + 1, k.rows);
        this.number(at::ITEMS, tiles(q.rows) + tiles(k.rows) + tiles(v.rows));
        for (i, m) in [&op.q, &op.k, &op.v].into_iter().enumerate() {
            this.arg(at::BIAS + i, optional(m.bias));
        }
        this.writes(mail, op.q.out, q.rows)?;
        mail.publish(op.k.out, k.rows)?;
        mail.publish(op.v.out, v.rows)?;
        mail.appended = Some((op.k.out, op.v.out));
        this.slots[at::K_MAIL] = Slot::Mail(op.k.out);
        this.slots[at::V_MAIL] = Slot::Mail(op.v.out);
        this.arg(at::FREQS, Arg::Weight(op.rope_q.freqs.id));
        this.number(at::HALF_ROTARY, op.rope_q.freqs.len);
        this.number(at::HALVES, u32::from(op.rope_q.pairing == Pairing::Halves));
        this.arg(at::MAGNITUDE, Arg::F32(op.rope_q.magnitude));
        this.number(at::HEAD_DIM, cache.head_dim);
        this.number(at::CAPACITY, cache.capacity);
        this.arg(at::KEYS, Arg::Keys(cache.layer));
        this.arg(at::VALUES, Arg::Values(cache.layer));
        Some(this)
    }

    fn attention(op: &Attention, mail: &mut Mail) -> Option<Self> {
        let cache = &op.cache;
        let (k, v) = mail.appended?;
        let whole = op.softcap.is_none() && op.window.is_none_or(|w| w >= cache.capacity);
        let dims = matches!(cache.head_dim, 64 | 128);
        if cache.kind != KvType::F16 || !dims || op.group() > HEADS || !whole {
            return None;
        }
        let mut this = Self::new(Kind::Attention);
        this.reads(mail, op.q, Wanted::Plain)?;
        this.writes(mail, op.out, op.heads * cache.head_dim)?;
        this.number(at::ITEMS, POSITIONS);
        this.arg(at::MAGNITUDE, Arg::F32(op.scale));
        this.number(at::HEAD_DIM, cache.head_dim);
        this.number(at::KV_HEADS, cache.kv_heads);
        this.number(at::GROUP, op.group());
        this.number(at::CAPACITY, cache.capacity);
        this.arg(at::KEYS, Arg::Keys(cache.layer));
        this.arg(at::VALUES, Arg::Values(cache.layer));
        this.slots[at::K_MAIL] = Slot::Mail(k);
        this.slots[at::V_MAIL] = Slot::Mail(v);
        this.slots[at::PARTIALS] = Slot::Partials;
        this.record_bytes = attention_bytes(op);
        this.partials = op.group() * cache.head_dim + 2 * HEADS;
        Some(this)
    }

    fn project(op: &fused::Project, mail: &mut Mail) -> Option<Self> {
        let w = &op.mat.weight;
        let mut this = Self::new(Kind::Project);
        this.multiplies(mail, w, op.mat.x, Wanted::Plain)?;
        this.arg(at::BIAS, optional(op.mat.bias));
        this.arg(at::RESIDUAL, Arg::Buf(op.add.out));
        this.writes(mail, op.add.out, w.rows)?;
        Some(this)
    }

    fn gate_up(op: &fused::GateUp, mail: &mut Mail) -> Option<Self> {
        let (gate, up) = (&op.gate.weight, &op.up.weight);
        if op.act.activation != Activation::Silu {
            return None;
        }
        let mut this = Self::new(Kind::GateUp);
        this.norms(mail, gate, &op.norm)?;
        this.arg(at::WEIGHT + 1, Arg::Weight(up.id));
        this.arg(at::BIAS, optional(op.gate.bias));
        this.arg(at::BIAS + 1, optional(op.up.bias));
        this.writes(mail, op.act.out, gate.rows)?;
        Some(this)
    }

    fn lm_head(op: &fused::LmHead, mail: &mut Mail) -> Option<Self> {
        let mut this = Self::new(Kind::LmHead);
        this.norms(mail, &op.head.weight, &op.norm)?;
        this.arg(at::BIAS, optional(op.head.bias));
        this.arg(at::Y, Arg::Buf(op.head.out));
        this.slots[at::Y_TAG] = Slot::Arg(Arg::U32(0));
        this.arg(at::CANDIDATES, Arg::Buf(op.argmax.candidates));
        this.arg(at::COUNTERS, Arg::Counters);
        this.arg(at::FORCED, Arg::Forced);
        this.arg(at::RING, Arg::Ring);
        Some(this)
    }

    fn of(op: &Op, mail: &mut Mail) -> Option<Self> {
        let this = Self::of_kind(op, mail);
        mail.steps += 1;
        this
    }

    fn of_kind(op: &Op, mail: &mut Mail) -> Option<Self> {
        match op {
            Op::Embed(op) => Self::embed(op, mail),
            Op::Qkv(op) => Self::qkv(op, mail),
            Op::Attention(op) => Self::attention(op, mail),
            Op::Project(op) => Self::project(op, mail),
            Op::GateUp(op) => Self::gate_up(op, mail),
            Op::LmHead(op) => Self::lm_head(op, mail),
            Op::RmsNorm(_)
            | Op::MatVec(_)
            | Op::Rope(_)
            | Op::KvAppend(_)
            | Op::Add(_)
            | Op::Glu(_)
            | Op::Softcap(_)
            | Op::TopK(_)
            | Op::ExpertMatVec(_)
            | Op::ExpertSum(_)
            | Op::ExpertGateUp(_)
            | Op::NormQkv(_)
            | Op::HeadRope(_)
            | Op::NormAdd(_)
            | Op::Argmax(_)
            | Op::Sample(_) => None,
        }
    }
}

/// Words of a vector's mail: its elements, and behind them, from a multiple of four on, the sum of squares
/// of every 16 of them.
fn mail_words(elements: u32) -> u32 {
    elements.next_multiple_of(4) + tiles(elements)
}

/// Bytes of a block's scratch for `op`; mirrors `Scratch` of `ptx/persistent/attention.cuh`.
fn attention_bytes(op: &Attention) -> u32 {
    let dim = op.cache.head_dim;
    let rows = 2 * (HEADS + 1) * dim * 2;
    let outputs = op.group() * dim;
    let joined = 3 * 4 * outputs;
    (rows + 2 * WARPS * HEADS * 4 + WARPS * outputs * 4).max(joined)
}

impl Program {
    /// The program of `plan` on `gpu`; `None` where a step has no form for the persistent kernel or
    /// the device is not of compute 9.0.
    pub fn of(plan: &DecodePlan, gpu: &Gpu) -> Option<Self> {
        if gpu.compute != COMPUTE || gpu.sms < plan.cache.kv_heads {
            return None;
        }
        let mut mail = Mail::default();
        let mut instructions = plan
            .steps
            .iter()
            .map(|s| Instruction::of(&s.op, &mut mail))
            .collect::<Option<Vec<_>>>()?;
        matches!(plan.steps.last()?.op, Op::LmHead(_)).then_some(())?;
        // A version has a tag of at most eight bits, and a block may be a whole token ahead of one.
        mail.published.iter().all(|m| m.2 < 256).then_some(())?;
        let writes = |buf: Buf| mail.published.iter().find(|m| m.0 == buf).map_or(0, |m| m.2);
        for i in &mut instructions {
            for (address, tag) in [(at::X, at::X_TAG), (at::Y_MAIL, at::Y_TAG)] {
                if let (Slot::Mail(buf), Slot::Version { ordinal, .. }) =
                    (i.slots[address], i.slots[tag])
                {
                    i.slots[tag] = Slot::Version { writes: writes(buf), ordinal };
                }
            }
        }
        for (_, step, wanted) in &mail.versions {
            if let Some(Wanted::Times(gain)) = wanted {
                // Only these two can: they have whole rows of the input of a norm.
                let writer = instructions.get_mut(*step)?;
                let kind = writer.number_at(at::KIND)?;
                (kind == Kind::Embed as u32 || kind == Kind::Project as u32).then_some(())?;
                writer.arg(at::GAIN, *gain);
            }
        }
        let record_bytes = instructions.iter().map(|i| i.record_bytes).max()?;
        let partials = instructions.iter().map(|i| u64::from(i.partials)).max()?;
        let record_bytes = record_bytes.next_multiple_of(128);
        let fixed = BOARD_BYTES + record_bytes + 2 * SUMS * tile::ROWS as u32 * 4;
        let room = gpu.shared_per_block.checked_sub(fixed + STATIC_BYTES)?;
        let chunk_bytes = room / CHUNKS / 16 * 16;
        for i in &mut instructions {
            i.share_out(gpu.sms, chunk_bytes)?;
        }
        Some(Self {
            instructions,
            mail: mail.published.into_iter().map(|(b, n, w)| (b, mail_words(n), w)).collect(),
            partials: partials * u64::from(gpu.sms),
            grid: gpu.sms,
            chunk_bytes,
            record_bytes,
            shared_bytes: fixed + CHUNKS * chunk_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `constexpr … NAME = NUMBER;` of the kernel's sources.
    fn declared(name: &str) -> Option<u32> {
        let sources = [
            include_str!("../../ptx/persistent/board.cuh"),
            include_str!("../../ptx/persistent/attention.cuh"),
        ];
        let lines = sources.iter().flat_map(|s| s.lines()).filter(|l| l.starts_with("constexpr"));
        let numbers = lines.filter_map(|l| l.split_once(&format!(" {name} = ")));
        numbers.filter_map(|(_, n)| n.split(';').next()?.parse().ok()).next()
    }

    #[test]
    fn the_kernel_declares_the_same_numbers() {
        for (name, here) in [
            ("BOARD_BYTES", BOARD_BYTES),
            ("CHUNKS", CHUNKS),
            ("FLIGHT", FLIGHT),
            ("UNITS", UNITS),
            ("SLOTS", SUMS),
            ("HEADS", HEADS),
            ("HELPERS", HELPERS),
            ("POSITIONS", POSITIONS),
        ] {
            assert_eq!(declared(name), Some(here), "{name}");
        }
    }
}
