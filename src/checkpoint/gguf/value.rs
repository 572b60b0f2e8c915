//! Metadata values of a GGUF file, read into owned data.

use super::super::metadata::{Array, StringArray, Value};
use super::cursor::Cursor;
use crate::error::{Defect, Result};
use std::fmt::Arguments;

/// Most bytes of a string value.
pub(super) const STRING_CAP: u64 = 16 << 20;

/// Most elements of an array value.
const ARRAY_CAP: u64 = 16 << 20;

/// Bytes of an array read at a time.
const CHUNK: usize = 64 << 10;

/// Reads a value of type id `kind`, whose id field stood at `kind_offset`.
pub(super) fn read(
    c: &mut Cursor<'_>,
    kind: u32,
    kind_offset: u64,
    at: Arguments<'_>,
) -> Result<Value> {
    Ok(match kind {
        0 => Value::U8(c.u8(at)?),
        1 => Value::I8(c.u8(at)?.cast_signed()),
        2 => Value::U16(c.u16(at)?),
        3 => Value::I16(c.u16(at)?.cast_signed()),
        4 => Value::U32(c.u32(at)?),
        5 => Value::I32(c.u32(at)?.cast_signed()),
        6 => Value::F32(f32::from_bits(c.u32(at)?)),
        7 => {
            let offset = c.position();
            match c.u8(at)? {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                other => {
                    let why = format!("a bool is 0 or 1, found {other}");
                    return Err(c.error(at, offset, Defect::BadValue, why));
                }
            }
        }
        8 => Value::String(string(c, STRING_CAP, Defect::BadString, at)?),
        9 => Value::Array(array(c, at)?),
        10 => Value::U64(c.u64(at)?),
        11 => Value::I64(c.u64(at)?.cast_signed()),
        12 => Value::F64(f64::from_bits(c.u64(at)?)),
        other => {
            let why = format!("value type {other} is not defined; the last one is 12 (f64)");
            return Err(c.error(at, kind_offset, Defect::BadType, why));
        }
    })
}

/// Reads a length and that many bytes. A length beyond `cap` is `over_cap`, one beyond
/// [`STRING_CAP`] is always [`Defect::BadString`].
pub(super) fn string(
    c: &mut Cursor<'_>,
    cap: u64,
    over_cap: Defect,
    at: Arguments<'_>,
) -> Result<Vec<u8>> {
    let length = string_length(c, cap, over_cap, at)?;
    Ok(c.take(length, at)?.to_vec())
}

fn string_length(
    c: &mut Cursor<'_>,
    cap: u64,
    over_cap: Defect,
    at: Arguments<'_>,
) -> Result<usize> {
    let offset = c.position();
    let length = c.u64(at)?;
    if length > cap {
        let defect = if length > STRING_CAP { Defect::BadString } else { over_cap };
        let why = format!("a length of {length} bytes is over the limit of {cap}");
        return Err(c.error(at, offset, defect, why));
    }
    // Within 16 MiB: fits usize.
    Ok(length as usize)
}

fn array(c: &mut Cursor<'_>, at: Arguments<'_>) -> Result<Array> {
    let start = c.position();
    let kind = c.u32(at)?;
    let Some(element_bytes) = least_element_bytes(kind) else {
        let why = match kind {
            9 => "nested arrays are not read".to_owned(),
            _ => format!("element type {kind} is not defined; the last one is 12 (f64)"),
        };
        return Err(c.error(at, start, Defect::BadArray, why));
    };
    let offset = c.position();
    let count = c.u64(at)?;
    if count > ARRAY_CAP {
        let why = format!("{count} elements are over the limit of {ARRAY_CAP}");
        return Err(c.error(at, offset, Defect::BadArray, why));
    }
    // What is reserved below is what the file has been seen to hold.
    c.need(count * element_bytes, at)?;
    let count = count as usize;
    Ok(match kind {
        0 => Array::U8(numbers(c, count, at, u8::from_le_bytes)?),
        1 => Array::I8(numbers(c, count, at, i8::from_le_bytes)?),
        2 => Array::U16(numbers(c, count, at, u16::from_le_bytes)?),
        3 => Array::I16(numbers(c, count, at, i16::from_le_bytes)?),
        4 => Array::U32(numbers(c, count, at, u32::from_le_bytes)?),
        5 => Array::I32(numbers(c, count, at, i32::from_le_bytes)?),
        6 => Array::F32(numbers(c, count, at, f32::from_le_bytes)?),
        7 => {
            let first = c.position();
            let bytes = numbers(c, count, at, u8::from_le_bytes)?;
            if let Some(i) = bytes.iter().position(|&b| b > 1) {
                let why = format!("a bool is 0 or 1, element {i} is {}", bytes[i]);
                return Err(c.error(at, first + i as u64, Defect::BadValue, why));
            }
            Array::Bool(bytes.into_iter().map(|b| b == 1).collect())
        }
        8 => {
            let mut strings = StringArray::with_capacity(count);
            for i in 0..count {
                let length =
                    string_length(c, STRING_CAP, Defect::BadString, format_args!("{at}[{i}]"))?;
                strings.push(c.take(length, format_args!("{at}[{i}]"))?);
            }
            Array::String(strings)
        }
        10 => Array::U64(numbers(c, count, at, u64::from_le_bytes)?),
        11 => Array::I64(numbers(c, count, at, i64::from_le_bytes)?),
        _ => Array::F64(numbers(c, count, at, f64::from_le_bytes)?),
    })
}

/// Bytes that an element of type `kind` takes at the least; `None` for what no array may hold.
fn least_element_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        8 | 10..=12 => Some(8),
        _ => None,
    }
}

fn numbers<T, const N: usize>(
    c: &mut Cursor<'_>,
    count: usize,
    at: Arguments<'_>,
    decode: fn([u8; N]) -> T,
) -> Result<Vec<T>> {
    let mut out = Vec::with_capacity(count);
    while out.len() < count {
        let now = (count - out.len()).min(CHUNK / N);
        let (words, _) = c.take(now * N, at)?.as_chunks::<N>();
        out.extend(words.iter().map(|&word| decode(word)));
    }
    Ok(out)
}
