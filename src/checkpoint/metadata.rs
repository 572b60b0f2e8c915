//! Metadata of a checkpoint: ordered, typed, and read through getters that say which key of
//! which file is wrong, and at which byte.

use crate::error::{Defect, Error, Result};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

/// A metadata value, of one of the container's types.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the type that its name says")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// UTF-8 by the format's description, kept as the bytes that stand in the file.
    String(Vec<u8>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array value, packed.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "each variant is the element type that its name says")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(StringArray),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Strings end to end in one buffer: a vocabulary of 10^5 tokens is two allocations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StringArray {
    bytes: Vec<u8>,
    /// End of each string in `bytes`.
    ends: Vec<usize>,
}

impl StringArray {
    /// An empty array with room for `count` strings.
    pub fn with_capacity(count: usize) -> Self {
        Self { bytes: Vec::new(), ends: Vec::with_capacity(count) }
    }

    /// Appends a string.
    pub fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len());
    }

    /// Number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// String `i` as it stands in the file; UTF-8 is not guaranteed.
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let end = *self.ends.get(i)?;
        let start = i.checked_sub(1).map_or(0, |before| self.ends[before]);
        self.bytes.get(start..end)
    }

    /// All strings in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i).unwrap_or_default())
    }
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Self::U8(v) => v.len(),
            Self::I8(v) => v.len(),
            Self::U16(v) => v.len(),
            Self::I16(v) => v.len(),
            Self::U32(v) => v.len(),
            Self::I32(v) => v.len(),
            Self::F32(v) => v.len(),
            Self::Bool(v) => v.len(),
            Self::String(v) => v.len(),
            Self::U64(v) => v.len(),
            Self::I64(v) => v.len(),
            Self::F64(v) => v.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Name of the element type.
    pub fn element_type(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    /// Element `i` as an integer, if it is one.
    fn integer(&self, i: usize) -> Option<i128> {
        match self {
            Self::U8(v) => v.get(i).map(|&x| x.into()),
            Self::I8(v) => v.get(i).map(|&x| x.into()),
            Self::U16(v) => v.get(i).map(|&x| x.into()),
            Self::I16(v) => v.get(i).map(|&x| x.into()),
            Self::U32(v) => v.get(i).map(|&x| x.into()),
            Self::I32(v) => v.get(i).map(|&x| x.into()),
            Self::U64(v) => v.get(i).map(|&x| x.into()),
            Self::I64(v) => v.get(i).map(|&x| x.into()),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) => None,
        }
    }
}

impl Value {
    /// Name of the type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::U8(_) => "u8",
            Self::I8(_) => "i8",
            Self::U16(_) => "u16",
            Self::I16(_) => "i16",
            Self::U32(_) => "u32",
            Self::I32(_) => "i32",
            Self::F32(_) => "f32",
            Self::Bool(_) => "bool",
            Self::String(_) => "string",
            Self::Array(_) => "array",
            Self::U64(_) => "u64",
            Self::I64(_) => "i64",
            Self::F64(_) => "f64",
        }
    }

    fn integer(&self) -> Option<i128> {
        match *self {
            Self::U8(x) => Some(x.into()),
            Self::I8(x) => Some(x.into()),
            Self::U16(x) => Some(x.into()),
            Self::I16(x) => Some(x.into()),
            Self::U32(x) => Some(x.into()),
            Self::I32(x) => Some(x.into()),
            Self::U64(x) => Some(x.into()),
            Self::I64(x) => Some(x.into()),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => None,
        }
    }
}

/// Scalars and text as they are (text lossily where it is not UTF-8), arrays as type and length.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32(x) => number(f, x, f64::from(*x)),
            Self::F64(x) => number(f, x, *x),
            Self::Bool(x) => write!(f, "{x}"),
            Self::String(x) => f.write_str(&String::from_utf8_lossy(x)),
            Self::Array(x) => write!(f, "[{}; {}]", x.element_type(), x.len()),
            other => write!(f, "{}", other.integer().unwrap_or_default()),
        }
    }
}

/// `x` in digits, or with an exponent where digits would be a row of hundreds of zeros.
fn number<T>(f: &mut fmt::Formatter<'_>, x: &T, value: f64) -> fmt::Result
where
    T: fmt::Display + fmt::LowerExp,
{
    let usual = value == 0.0 || !value.is_finite() || (1e-9..1e16).contains(&value.abs());
    if usual { write!(f, "{x}") } else { write!(f, "{x:e}") }
}

/// A key with its value, as [`Metadata::entries`] gives it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The key.
    pub key: &'a str,
    /// The value.
    pub value: &'a Value,
    /// Where the value stands, bytes from the start of the file; `None` when it is in no file.
    pub offset: Option<u64>,
}

/// The keys and values of a checkpoint, in file order.
///
/// Getters accept every integer width that loses nothing; a `*_key` getter gives `None` for an
/// absent key, a `required_*` getter [`Defect::MissingKey`].
#[derive(Clone, Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: Vec<(String, Option<u64>, Value)>,
    index: HashMap<String, usize>,
    /// What a key that was derived is called where it comes from.
    origins: HashMap<String, &'static str>,
}

impl Metadata {
    pub(super) fn new(path: &Path) -> Self {
        let (entries, index, origins) = Default::default();
        Self { path: path.to_owned(), entries, index, origins }
    }

    /// Adds a key; the caller has checked that it is new.
    pub(super) fn push(&mut self, key: String, offset: Option<u64>, value: Value) {
        self.index.insert(key.clone(), self.entries.len());
        self.entries.push((key, offset, value));
    }

    /// Adds a key that is derived from another file's key `origin`, which errors then name.
    pub(super) fn derive(&mut self, key: String, origin: &'static str, value: Value) {
        self.origins.insert(key.clone(), origin);
        self.push(key, None, value);
    }

    /// The same keys in the same order without those that `drop` picks.
    pub(super) fn without(&self, drop: impl Fn(&str) -> bool) -> Self {
        let mut kept = Self::new(&self.path);
        for (key, offset, value) in self.entries.iter().filter(|(key, ..)| !drop(key)) {
            kept.push(key.clone(), *offset, value.clone());
        }
        kept
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the key is there.
    pub fn contains(&self, key: &str) -> bool {
        self.index.contains_key(key)
    }

    /// All keys in file order.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = Entry<'_>> {
        self.entries.iter().map(|(key, offset, value)| Entry { key, value, offset: *offset })
    }

    /// One key.
    pub fn entry(&self, key: &str) -> Option<Entry<'_>> {
        let (key, offset, value) = self.entries.get(*self.index.get(key)?)?;
        Some(Entry { key, value, offset: *offset })
    }

    /// A defect of `key`, with the file and the byte offset of its value.
    pub fn error(&self, key: &str, defect: Defect, why: impl Into<String>) -> Error {
        let offset = self.entry(key).and_then(|e| e.offset);
        let at = match self.origins.get(key) {
            Some(origin) => format!("{origin} ({key})"),
            None => key.to_owned(),
        };
        Error::invalid(&self.path, at, offset, defect, why)
    }

    /// The error of an absent key.
    pub fn missing(&self, key: &str) -> Error {
        self.error(key, Defect::MissingKey, "the file does not have this key")
    }

    fn wrong(&self, entry: Entry<'_>, expected: &str) -> Error {
        let found = match entry.value {
            Value::Array(a) => format!("an array of {}", a.element_type()),
            other => other.type_name().to_owned(),
        };
        self.error(entry.key, Defect::BadType, format!("is {found}, expected {expected}"))
    }

    fn array<'a>(&self, entry: Entry<'a>, expected: &str) -> Result<&'a Array> {
        match entry.value {
            Value::Array(array) => Ok(array),
            _ => Err(self.wrong(entry, expected)),
        }
    }

    fn narrow<T: TryFrom<i128>>(&self, key: &str, value: i128, i: Option<usize>) -> Result<T> {
        T::try_from(value).map_err(|_| {
            let which = i.map(|i| format!("element {i} is ")).unwrap_or_default();
            let why =
                format!("{which}{value}, outside the range of {}", std::any::type_name::<T>());
            self.error(key, Defect::BadValue, why)
        })
    }

    /// A non-negative integer of any width.
    ///
    /// # Errors
    /// [`Defect::BadType`] for anything but an integer, [`Defect::BadValue`] for a negative one.
    pub fn u64_key(&self, key: &str) -> Result<Option<u64>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        let value = entry.value.integer().ok_or_else(|| self.wrong(entry, "an integer"))?;
        self.narrow(key, value, None).map(Some)
    }

    /// A real number: f32, f64 rounded to nearest, or an integer that f32 holds exactly. NaN and
    /// infinities are passed on.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types, [`Defect::BadValue`] for an integer of too many digits.
    pub fn f32_key(&self, key: &str) -> Result<Option<f32>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        Ok(Some(match *entry.value {
            Value::F32(x) => x,
            Value::F64(x) => x as f32,
            ref other => match other.integer() {
                None => return Err(self.wrong(entry, "a number")),
                Some(x) if x.unsigned_abs() <= 1 << 24 => x as f32,
                Some(x) => {
                    let why = format!("{x} has more digits than an f32 keeps");
                    return Err(self.error(key, Defect::BadValue, why));
                }
            },
        }))
    }

    /// A bool.
    ///
    /// # Errors
    /// [`Defect::BadType`] for anything else.
    pub fn bool_key(&self, key: &str) -> Result<Option<bool>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        match *entry.value {
            Value::Bool(x) => Ok(Some(x)),
            _ => Err(self.wrong(entry, "a bool")),
        }
    }

    /// Text.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types, [`Defect::BadString`] when it is not UTF-8.
    pub fn str_key(&self, key: &str) -> Result<Option<&str>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        let Value::String(bytes) = entry.value else {
            return Err(self.wrong(entry, "a string"));
        };
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(e) => {
                let why = format!("byte {} of the text is not UTF-8", e.valid_up_to());
                Err(self.error(key, Defect::BadString, why))
            }
        }
    }

    /// An array of strings, as bytes: token texts need not be UTF-8.
    ///
    /// # Errors
    /// [`Defect::BadType`] for anything else.
    pub fn strings_key(&self, key: &str) -> Result<Option<&StringArray>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        match self.array(entry, "an array of strings")? {
            Array::String(strings) => Ok(Some(strings)),
            _ => Err(self.wrong(entry, "an array of strings")),
        }
    }

    /// An array of strings, as text.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types, [`Defect::BadString`] naming the element that is not
    /// UTF-8.
    pub fn str_array_key(&self, key: &str) -> Result<Option<Vec<&str>>> {
        let Some(strings) = self.strings_key(key)? else { return Ok(None) };
        let text = |(i, bytes)| {
            std::str::from_utf8(bytes).map_err(|_| {
                self.error(key, Defect::BadString, format!("element {i} is not UTF-8"))
            })
        };
        strings.iter().enumerate().map(text).collect::<Result<_>>().map(Some)
    }

    /// An array of i32; u32 is accepted where each value fits.
    ///
    /// Other widths are refused: what is read this way (token types) has one type by its
    /// description, and another one is the mark of a damaged or hostile file.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types, [`Defect::BadValue`] naming the element that does not
    /// fit.
    pub fn i32_array_key(&self, key: &str) -> Result<Option<Vec<i32>>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        match self.array(entry, "an array of i32")? {
            Array::I32(v) => Ok(Some(v.clone())),
            Array::U32(v) => {
                let fit = |(i, &x): (usize, &u32)| self.narrow(key, x.into(), Some(i));
                v.iter().enumerate().map(fit).collect::<Result<_>>().map(Some)
            }
            _ => Err(self.wrong(entry, "an array of i32")),
        }
    }

    /// An array of f32; i32 is accepted (some writers store token scores so), rounded to nearest.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types.
    pub fn f32_array_key(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        match self.array(entry, "an array of f32")? {
            Array::F32(v) => Ok(Some(v.clone())),
            Array::I32(v) => Ok(Some(v.iter().map(|&x| x as f32).collect())),
            _ => Err(self.wrong(entry, "an array of f32")),
        }
    }

    /// An array of bool.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types.
    pub fn bool_array_key(&self, key: &str) -> Result<Option<&[bool]>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        match self.array(entry, "an array of bool")? {
            Array::Bool(v) => Ok(Some(v)),
            _ => Err(self.wrong(entry, "an array of bool")),
        }
    }

    /// An array of non-negative integers of any width.
    ///
    /// # Errors
    /// [`Defect::BadType`] for other types, [`Defect::BadValue`] naming a negative element.
    pub fn u64_array_key(&self, key: &str) -> Result<Option<Vec<u64>>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        let array = self.array(entry, "an array of integers")?;
        let element = |i| {
            let value =
                array.integer(i).ok_or_else(|| self.wrong(entry, "an array of integers"))?;
            self.narrow(key, value, Some(i))
        };
        (0..array.len()).map(element).collect::<Result<_>>().map(Some)
    }

    /// One non-negative integer per layer: an array of `layers` elements, or a scalar that holds
    /// for all of them.
    ///
    /// # Errors
    /// As [`u64_key`](Self::u64_key); [`Defect::BadArray`] for an array of another length.
    pub fn u64_per_layer_key(&self, key: &str, layers: usize) -> Result<Option<Vec<u64>>> {
        match self.entry(key) {
            Some(Entry { value: Value::Array(array), .. }) if array.len() != layers => {
                let why = format!("has {} elements for {layers} layers", array.len());
                Err(self.error(key, Defect::BadArray, why))
            }
            Some(Entry { value: Value::Array(_), .. }) => self.u64_array_key(key),
            _ => Ok(self.u64_key(key)?.map(|value| vec![value; layers])),
        }
    }

    /// [`u64_key`](Self::u64_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_u64(&self, key: &str) -> Result<u64> {
        self.u64_key(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`f32_key`](Self::f32_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_f32(&self, key: &str) -> Result<f32> {
        self.f32_key(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`bool_key`](Self::bool_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_bool(&self, key: &str) -> Result<bool> {
        self.bool_key(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`str_key`](Self::str_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_str(&self, key: &str) -> Result<&str> {
        self.str_key(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`strings_key`](Self::strings_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_strings(&self, key: &str) -> Result<&StringArray> {
        self.strings_key(key)?.ok_or_else(|| self.missing(key))
    }

    /// [`u64_per_layer_key`](Self::u64_per_layer_key), present.
    ///
    /// # Errors
    /// As there, and [`Defect::MissingKey`].
    pub fn required_u64_per_layer(&self, key: &str, layers: usize) -> Result<Vec<u64>> {
        self.u64_per_layer_key(key, layers)?.ok_or_else(|| self.missing(key))
    }
}
