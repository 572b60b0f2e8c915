//! Every tensor type that GGUF defines: sizes are needed to check offsets also of tensors that
//! are then refused by name.

/// A tensor type of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GgmlType {
    /// Id in the file.
    pub(crate) id: u32,
    /// Name as GGUF tools print it.
    pub(crate) name: &'static str,
    /// Elements per block.
    pub(crate) elements: u64,
    /// Bytes per block.
    pub(crate) bytes: u64,
}

const fn row(id: u32, name: &'static str, elements: u64, bytes: u64) -> GgmlType {
    GgmlType { id, name, elements, bytes }
}

const TYPES: [GgmlType; 35] = [
    row(0, "F32", 1, 4),
    row(1, "F16", 1, 2),
    row(2, "Q4_0", 32, 18),
    row(3, "Q4_1", 32, 20),
    row(6, "Q5_0", 32, 22),
    row(7, "Q5_1", 32, 24),
    row(8, "Q8_0", 32, 34),
    row(9, "Q8_1", 32, 36),
    row(10, "Q2_K", 256, 84),
    row(11, "Q3_K", 256, 110),
    row(12, "Q4_K", 256, 144),
    row(13, "Q5_K", 256, 176),
    row(14, "Q6_K", 256, 210),
    row(15, "Q8_K", 256, 292),
    row(16, "IQ2_XXS", 256, 66),
    row(17, "IQ2_XS", 256, 74),
    row(18, "IQ3_XXS", 256, 98),
    row(19, "IQ1_S", 256, 50),
    row(20, "IQ4_NL", 32, 18),
    row(21, "IQ3_S", 256, 110),
    row(22, "IQ2_S", 256, 82),
    row(23, "IQ4_XS", 256, 136),
    row(24, "I8", 1, 1),
    row(25, "I16", 1, 2),
    row(26, "I32", 1, 4),
    row(27, "I64", 1, 8),
    row(28, "F64", 1, 8),
    row(29, "IQ1_M", 256, 56),
    row(30, "BF16", 1, 2),
    row(34, "TQ1_0", 256, 54),
    row(35, "TQ2_0", 256, 66),
    row(39, "MXFP4", 32, 17),
    row(40, "NVFP4", 64, 36),
    row(41, "Q1_0", 128, 18),
    row(42, "Q2_0", 64, 18),
];

/// Ids that once were types and no longer are.
const REMOVED: [u32; 8] = [4, 5, 31, 32, 33, 36, 37, 38];

/// The type with this id.
pub(super) fn by_id(id: u32) -> Option<GgmlType> {
    TYPES.into_iter().find(|t| t.id == id)
}

/// Why an id is not a type.
pub(super) fn why_unknown(id: u32) -> &'static str {
    if REMOVED.contains(&id) {
        "a type that was removed from the format; convert the model again"
    } else {
        "not a type that the format defines up to id 42; a newer writer, or a damaged file"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::QuantFormat;

    #[test]
    fn sizes_agree_with_the_formats_that_are_served() {
        for format in QuantFormat::ALL {
            let f = format.describe();
            let t = by_id(f.ggml_id()).unwrap();
            assert_eq!(
                (t.name, t.elements, t.bytes),
                (f.name(), f.block_elements() as u64, f.block_bytes() as u64)
            );
        }
    }

    #[test]
    fn ids_are_unique_and_disjoint_from_removed_ones() {
        for (i, t) in TYPES.iter().enumerate() {
            assert!(TYPES[..i].iter().all(|u| u.id < t.id), "{} out of order", t.name);
            assert!(!REMOVED.contains(&t.id), "{}", t.name);
        }
    }
}
