//! The committed PTX of the fill kernels, run here instruction by instruction, against the values
//! that the host computes. Knows the straight integer and float instructions that these kernels
//! consist of; any other one is a panic, not a guess.

use crate::cuda::kernels::ptx;
use crate::engine::{CacheHalf, fill_row, stream};
use half::f16;
use std::collections::HashMap;

/// Where the cache begins; every address is relative to it.
const BASE: u64 = 0x10_0000;

/// What a thread sees: its registers, with the special ones and parameters among them by name.
struct Thread<'a> {
    registers: HashMap<String, u64>,
    memory: &'a mut [u8],
}

fn float(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

impl Thread<'_> {
    fn value(&self, operand: &str) -> u64 {
        if let Some(bits) = operand.strip_prefix("0f") {
            return u64::from_str_radix(bits, 16).unwrap();
        }
        match operand.parse::<i128>() {
            Ok(literal) => literal as u64,
            Err(_) => self.registers[operand],
        }
    }

    /// Executes one instruction that is no branch.
    fn execute(&mut self, op: &str, operands: &[&str]) {
        let v: Vec<u64> = operands.iter().skip(1).map(|o| self.value(o)).collect();
        let size = op.rsplit('.').next().unwrap();
        let result = match op {
            "ld.param.u32" | "ld.param.u64" | "mov.u32" | "mov.u64" | "mov.f32" => v[0],
            "cvt.u64.u32" | "cvt.u32.u64" | "cvta.to.global.u64" => v[0],
            "add.s32" | "add.s64" => v[0].wrapping_add(v[1]),
            "sub.s32" | "sub.s64" => v[0].wrapping_sub(v[1]),
            "mul.lo.s32" | "mul.lo.s64" | "mul.wide.u32" => v[0].wrapping_mul(v[1]),
            "mad.lo.s32" | "mad.lo.s64" => v[0].wrapping_mul(v[1]).wrapping_add(v[2]),
            "div.u32" | "div.u64" => v[0] / v[1],
            "and.b32" | "and.b64" => v[0] & v[1],
            "xor.b64" => v[0] ^ v[1],
            "shl.b64" => v[0] << v[1],
            "shr.u64" => v[0] >> v[1],
            "setp.eq.s64" => u64::from(v[0] == v[1]),
            "setp.ge.u32" | "setp.ge.u64" => u64::from(v[0] >= v[1]),
            "setp.lt.u32" | "setp.lt.u64" => u64::from(v[0] < v[1]),
            "cvt.rn.f32.u32" => u64::from((v[0] as u32 as f32).to_bits()),
            "fma.rn.f32" => u64::from(float(v[0]).mul_add(float(v[1]), float(v[2])).to_bits()),
            "mul.rn.f32" => u64::from((float(v[0]) * float(v[1])).to_bits()),
            "cvt.rn.f16.f32" => u64::from(f16::from_f32(float(v[0])).to_bits()),
            "cvt.f32.f16" => u64::from(f16::from_bits(v[0] as u16).to_f32().to_bits()),
            "st.global.u16" | "st.global.f32" => {
                let at = (self.value(operands[0].trim_matches(['[', ']'])) - BASE) as usize;
                let bytes = if size == "u16" { 2 } else { 4 };
                self.memory[at..at + bytes].copy_from_slice(&v[0].to_le_bytes()[..bytes]);
                return;
            }
            other => panic!("an instruction that is not known here: {other}"),
        };
        let narrow = size.ends_with("32") && op != "mul.wide.u32" && !op.ends_with("u64.u32");
        let result = if narrow { result & 0xFFFF_FFFF } else { result };
        // A conversion to 32 bits names them first.
        let result = if op == "cvt.u32.u64" { result & 0xFFFF_FFFF } else { result };
        self.registers.insert(operands[0].to_owned(), result);
    }
}

/// Runs `entry` of `text` as one block of `threads` threads, one after the other.
fn run(text: &str, entry: &str, parameters: &[u64], threads: u64, memory: &mut [u8]) {
    let body = text.split(&format!(".entry {entry}(")).nth(1).unwrap();
    let body = body.split_once('{').unwrap().1.split("\n}").next().unwrap();
    let lines: Vec<&str> = body.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let label = |name: &str| lines.iter().position(|l| l.strip_suffix(':') == Some(name)).unwrap();
    for thread in 0..threads {
        let special = [("%tid.x", thread), ("%ntid.x", threads), ("%ctaid.x", 0), ("%nctaid.x", 1)];
        let mut registers: HashMap<String, u64> =
            special.into_iter().map(|(name, v)| (name.to_owned(), v)).collect();
        for (i, v) in parameters.iter().enumerate() {
            registers.insert(format!("[{entry}_param_{i}]"), *v);
        }
        let mut t = Thread { registers, memory: &mut *memory };
        let mut at = 0;
        loop {
            let line = lines[at].trim_end_matches(';');
            at += 1;
            if line.starts_with('.') || line.ends_with(':') {
                continue;
            }
            let (guard, line) = match line.strip_prefix('@') {
                Some(rest) => rest.split_once(' ').map(|(p, l)| (Some(p), l.trim())).unwrap(),
                None => (None, line),
            };
            let taken = guard.is_none_or(|p| match p.strip_prefix('!') {
                Some(p) => t.value(p) == 0,
                None => t.value(p) != 0,
            });
            if !taken {
                continue;
            }
            let (op, operands) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let operands: Vec<&str> = operands.split(',').map(str::trim).collect();
            match op {
                "ret" => break,
                "bra" | "bra.uni" => at = label(operands[0]),
                _ => t.execute(op, &operands),
            }
        }
    }
}

#[test]
fn the_fill_kernels_store_the_hosts_values_bit_for_bit_and_nothing_else() {
    let (heads, dim, capacity, positions) = (3u32, 40u32, 7u32, 5u32);
    let elements = (heads * dim * capacity) as usize;
    for (seed, layer, half) in
        [(1, 2, CacheHalf::Values), (u64::MAX, 0, CacheHalf::Keys), (7, 31, CacheHalf::Keys)]
    {
        let stream = stream(seed, layer, half);
        let mut expected = vec![f32::NAN; elements];
        let mut row = vec![0.0; dim as usize];
        for (i, out) in (0..).zip(expected.chunks_exact_mut(dim as usize)) {
            let (head, position) = (i / capacity, i % capacity);
            if position < positions {
                fill_row(stream, head, position, &mut row);
                out.copy_from_slice(&row);
            }
        }
        let halves = expected.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes());
        let whole = expected.iter().flat_map(|v| v.to_le_bytes());
        let sizes = [heads, dim, capacity, positions].map(u64::from);
        for (entry, expected, untouched) in [
            ("fill_cache_f16", halves.collect::<Vec<u8>>(), f16::NAN.to_le_bytes().to_vec()),
            ("fill_cache_f32", whole.collect(), f32::NAN.to_le_bytes().to_vec()),
        ] {
            for compute in [(8, 0), (9, 0)] {
                let mut memory = untouched.repeat(elements);
                let parameters = [&[BASE, stream][..], &sizes].concat();
                run(ptx("probe", compute).unwrap(), entry, &parameters, 64, &mut memory);
                assert!(memory == expected, "{entry}, compute {compute:?}, seed {seed}");
            }
        }
    }
}
