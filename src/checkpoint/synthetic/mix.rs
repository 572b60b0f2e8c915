//! Which weight format each tensor has in the mixtures that GGUF files are published in: the
//! choice of llama.cpp's quantiser, so that a synthetic model moves the bytes of a real one.

use super::shapes::{Role, Shape, Tensor};
use crate::quant::QuantFormat;

/// A mixture of weight formats, named as GGUF files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mix {
    Q4KM,
    Q4_0,
    Q4_1,
    Q5KM,
    Q6K,
    Q8_0,
    Bf16,
    F16,
}

impl Mix {
    pub(super) const ALL: [Self; 8] = [
        Self::Q4KM,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5KM,
        Self::Q6K,
        Self::Q8_0,
        Self::Bf16,
        Self::F16,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Q4KM => "q4_k_m",
            Self::Q4_0 => "q4_0",
            Self::Q4_1 => "q4_1",
            Self::Q5KM => "q5_k_m",
            Self::Q6K => "q6_k",
            Self::Q8_0 => "q8_0",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    /// `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Bf16 => 32,
        }
    }

    /// The format that most matrices have.
    fn base(self) -> QuantFormat {
        match self {
            Self::Q4KM => QuantFormat::Q4K,
            Self::Q4_0 => QuantFormat::Q4_0,
            Self::Q4_1 => QuantFormat::Q4_1,
            Self::Q5KM => QuantFormat::Q5K,
            Self::Q6K => QuantFormat::Q6K,
            Self::Q8_0 => QuantFormat::Q8_0,
            Self::Bf16 => QuantFormat::Bf16,
            Self::F16 => QuantFormat::F16,
        }
    }

    /// The format of `tensor`. Vectors are f32.
    ///
    /// The matrix that makes the logits has 6 bits, values and down projections have 6 bits in
    /// the `_m` mixtures' more sensitive layers, and query, key and value in one have one bit more
    /// there; a row that is no whole number of blocks falls
    /// back to the next larger format with blocks of 32.
    pub(super) fn format(self, shape: &Shape, tensor: &Tensor) -> QuantFormat {
        let base = self.base();
        let whole = |format: QuantFormat| {
            tensor.shape[0].is_multiple_of(format.describe().block_elements() as u64)
        };
        let medium = matches!(self, Self::Q4KM | Self::Q5KM);
        let float = matches!(self, Self::F16 | Self::Bf16);
        let wanted = match tensor.role {
            Role::Vector => return QuantFormat::F32,
            _ if float => base,
            Role::Logits if !whole(base) => QuantFormat::Q8_0,
            Role::Logits if base != QuantFormat::Q8_0 => QuantFormat::Q6K,
            Role::Value(layer) | Role::Down(layer) if medium && more_bits(layer, shape.layers) => {
                QuantFormat::Q6K
            }
            Role::Fused if self == Self::Q4KM => QuantFormat::Q5K,
            Role::Fused if self == Self::Q5KM => QuantFormat::Q6K,
            Role::Logits | Role::Value(_) | Role::Down(_) | Role::Matrix | Role::Fused => base,
        };
        if whole(wanted) {
            return wanted;
        }
        let smaller_blocks = match wanted {
            QuantFormat::Q4K => QuantFormat::Q5_0,
            QuantFormat::Q5K => QuantFormat::Q5_1,
            QuantFormat::Q6K => QuantFormat::Q8_0,
            other => other,
        };
        if whole(smaller_blocks) { smaller_blocks } else { QuantFormat::F16 }
    }
}

/// The layers that the `_m` mixtures give more bits: the first and last eighth, and every third
/// in between. Integer division, as there.
fn more_bits(layer: u64, layers: u64) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}
