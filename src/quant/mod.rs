//! Weight formats: block layout in the file, decoding, and the tiled layout on the device.
//!
//! [`QuantFormat`] is closed and every dispatch on it is exhaustive; a format is a
//! [`Format`] implementation here (one file a family), one enum arm with its line in
//! [`QuantFormat::ALL`] and in `visit`, and a struct in a header under `ptx/formats/`.

pub mod tile;

mod codebook;
mod float;
mod k_quants;
mod legacy;
mod low_k_quants;
mod planes;
mod random;

pub use tile::{RowOrder, TileLayout};

/// A weight format that every path of this crate serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum QuantFormat {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// 4 bits, one f16 scale per 32.
    Q4_0,
    /// 4 bits, f16 scale and f16 minimum per 32.
    Q4_1,
    /// 5 bits, one f16 scale per 32.
    Q5_0,
    /// 5 bits, f16 scale and f16 minimum per 32.
    Q5_1,
    /// 8 bits, one f16 scale per 32.
    Q8_0,
    /// 2 bits, 4-bit scales and minima per 16, f16 scale and minimum per 256.
    Q2K,
    /// 3 bits, 6-bit scales per 16, one f16 scale per 256.
    Q3K,
    /// 4 bits, 6-bit scales and minima per 32, f16 scale and minimum per 256.
    Q4K,
    /// 5 bits, 6-bit scales and minima per 32, f16 scale and minimum per 256.
    Q5K,
    /// 6 bits, 8-bit scales per 16, one f16 scale per 256.
    Q6K,
    /// 4-bit codes of unevenly spaced values, one f16 scale per 32.
    Iq4Nl,
    /// 4-bit codes of unevenly spaced values, 6-bit scales per 32, one f16 scale per 256.
    Iq4Xs,
    /// 4-bit floats (E2M1), one power of two per 32.
    Mxfp4,
}

/// How the device kernels multiply a format: decides activation staging and unit geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DotKind {
    /// Integer tensor-core product of the quants with 16-bit fixed-point activations.
    Integer,
    /// Floating tensor-core product with activations split into several 16-bit terms.
    Half,
    /// f32 multiply-add.
    Single,
}

/// What is fixed about a weight format.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    /// Name as GGUF tools print it, for example `Q4_K`.
    pub name: &'static str,
    /// Suffix of kernel names, for example `q4_k`.
    pub suffix: &'static str,
    /// Type id in GGUF.
    pub ggml_id: u32,
    /// Elements per block of the file.
    pub block_elements: usize,
    /// Bytes per block of the file.
    pub block_bytes: usize,
    /// How the device multiplies it.
    pub dot_kind: DotKind,
    /// Columns of a full unit of the device layout ([`tile`]).
    pub unit_columns: usize,
}

impl Facts {
    /// Those of a format of blocks, which all are multiplied as integers.
    const fn of_blocks(
        name: &'static str,
        suffix: &'static str,
        ggml_id: u32,
        block_elements: usize,
        block_bytes: usize,
    ) -> Self {
        let (dot_kind, unit_columns) = (DotKind::Integer, planes::UNIT_COLUMNS);
        Self { name, suffix, ggml_id, block_elements, block_bytes, dot_kind, unit_columns }
    }
}

/// What a weight format answers: [`facts`](Self::facts) to [`synthesize`](Self::synthesize), none of
/// which has a default. The rest is read off the facts.
pub trait Format: Sync {
    /// What is fixed.
    fn facts(&self) -> Facts;
    /// Decodes whole blocks, bit for bit as the GGUF reference does: f32, one rounding per written
    /// operation, no fused multiply-add. `blocks` is `[n, block_bytes]`, `out` is
    /// `[n, block_elements]`; what is left of the longer one is not touched.
    fn decode(&self, blocks: &[u8], out: &mut [f32]);
    /// Packs one unit: 16 rows, each the file's blocks of `columns` columns (an empty slice is a
    /// row past the end of the matrix: zeros), into `out` `[unit_bytes(columns)]`. `columns` is at
    /// most `unit_columns` and a multiple of [`tile::COLUMN_STEP`].
    fn pack_unit(&self, rows: &[&[u8]; tile::ROWS], columns: usize, out: &mut [u8]);
    /// Writes whole blocks `[n, block_bytes]` of seeded random weights with zero mean and standard
    /// deviation `sigma`. `bits` is an endless source of uniform 32-bit words.
    fn synthesize(&self, sigma: f32, bits: &mut dyn FnMut() -> u32, blocks: &mut [u8]);

    /// Name as GGUF tools print it, for example `Q4_K`.
    fn name(&self) -> &'static str {
        self.facts().name
    }

    /// Suffix of kernel names, for example `q4_k`.
    fn suffix(&self) -> &'static str {
        self.facts().suffix
    }

    /// Type id in GGUF.
    fn ggml_id(&self) -> u32 {
        self.facts().ggml_id
    }

    /// Elements per block of the file.
    fn block_elements(&self) -> usize {
        self.facts().block_elements
    }

    /// Bytes per block of the file.
    fn block_bytes(&self) -> usize {
        self.facts().block_bytes
    }

    /// How the device multiplies it.
    fn dot_kind(&self) -> DotKind {
        self.facts().dot_kind
    }

    /// Columns of a full unit of the device layout ([`tile`]).
    fn unit_columns(&self) -> usize {
        self.facts().unit_columns
    }

    /// Bytes of a unit of `columns` columns: the file's bytes of 16 rows of so many.
    fn unit_bytes(&self, columns: usize) -> usize {
        let f = self.facts();
        columns.div_ceil(f.block_elements) * f.block_bytes * tile::ROWS
    }
}

/// What is to be done with a format as a type, so that its decoding is compiled into the loop
/// that uses it.
pub(crate) trait FormatVisitor {
    /// What comes out.
    type Out;
    /// Does it.
    fn visit<F: Format>(self, format: &'static F) -> Self::Out;
}

impl QuantFormat {
    /// Every format, in the order of the enum.
    pub const ALL: [Self; 16] = [
        Self::F32,
        Self::F16,
        Self::Bf16,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
        Self::Iq4Nl,
        Self::Iq4Xs,
        Self::Mxfp4,
    ];

    /// The format's answers.
    pub fn describe(self) -> &'static dyn Format {
        struct Describe;
        impl FormatVisitor for Describe {
            type Out = &'static dyn Format;

            fn visit<F: Format>(self, format: &'static F) -> Self::Out {
                format
            }
        }
        self.visit(Describe)
    }

    /// Calls `visitor` with the format's type.
    pub(crate) fn visit<V: FormatVisitor>(self, visitor: V) -> V::Out {
        match self {
            Self::F32 => visitor.visit(&float::F32),
            Self::F16 => visitor.visit(&float::F16),
            Self::Bf16 => visitor.visit(&float::BF16),
            Self::Q4_0 => visitor.visit(&legacy::Q4_0),
            Self::Q4_1 => visitor.visit(&legacy::Q4_1),
            Self::Q5_0 => visitor.visit(&legacy::Q5_0),
            Self::Q5_1 => visitor.visit(&legacy::Q5_1),
            Self::Q8_0 => visitor.visit(&legacy::Q8_0),
            Self::Q2K => visitor.visit(&low_k_quants::Q2K),
            Self::Q3K => visitor.visit(&low_k_quants::Q3K),
            Self::Q4K => visitor.visit(&k_quants::Q4K),
            Self::Q5K => visitor.visit(&k_quants::Q5K),
            Self::Q6K => visitor.visit(&k_quants::Q6K),
            Self::Iq4Nl => visitor.visit(&codebook::IQ4_NL),
            Self::Iq4Xs => visitor.visit(&codebook::Iq4Xs),
            Self::Mxfp4 => visitor.visit(&codebook::MXFP4),
        }
    }

    /// The format with this GGUF type id, if it is one of ours.
    pub fn from_ggml_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|f| f.describe().ggml_id() == id)
    }

    /// Name as GGUF tools print it.
    pub fn name(self) -> &'static str {
        self.describe().name()
    }

    /// Suffix of kernel names.
    pub fn suffix(self) -> &'static str {
        self.describe().suffix()
    }

    /// Bytes of one row of `columns` elements in the file; `None` when a row is no whole number
    /// of blocks or the size does not fit.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let f = self.describe();
        (columns.is_multiple_of(f.block_elements()))
            .then(|| (columns / f.block_elements()).checked_mul(f.block_bytes()))
            .flatten()
    }

    /// Decodes one row: `row` `[row_bytes(out.len())]` into `out` `[columns]`.
    pub fn decode_row(self, row: &[u8], out: &mut [f32]) {
        self.describe().decode(row, out);
    }
}

impl std::fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
