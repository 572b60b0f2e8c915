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
    Q2K,
    Q3KM,
    Iq4Nl,
    Iq4Xs,
}

impl Mix {
    pub(super) const ALL: [Self; 12] = [
        Self::Q4KM,
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5KM,
        Self::Q6K,
        Self::Q8_0,
        Self::Bf16,
        Self::F16,
        Self::Q2K,
        Self::Q3KM,
        Self::Iq4Nl,
        Self::Iq4Xs,
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
            Self::Q2K => "q2_k",
            Self::Q3KM => "q3_k_m",
            Self::Iq4Nl => "iq4_nl",
            Self::Iq4Xs => "iq4_xs",
        }
    }

    /// `general.file_type`.
    pub(super) fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q2K => 10,
            Self::Q3KM => 12,
            Self::Q4KM => 15,
            Self::Q5KM => 17,
            Self::Q6K => 18,
            Self::Iq4Nl => 25,
            Self::Iq4Xs => 30,
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
            Self::Q2K => QuantFormat::Q2K,
            Self::Q3KM => QuantFormat::Q3K,
            Self::Iq4Nl => QuantFormat::Iq4Nl,
            Self::Iq4Xs => QuantFormat::Iq4Xs,
        }
    }

    /// The format of the value projection of `layer`: more bits where few of them serve many
    /// queries.
    fn value(self, layer: u64, shape: &Shape) -> QuantFormat {
        let shared = shape.heads / shape.kv_heads >= 4;
        match self {
            Self::Q4KM | Self::Q5KM if more_bits(layer, shape.layers) => QuantFormat::Q6K,
            Self::Q2K if shared => QuantFormat::Q4K,
            Self::Q2K => QuantFormat::Q3K,
            Self::Q3KM if layer < 2 => QuantFormat::Q5K,
            Self::Q3KM => QuantFormat::Q4K,
            Self::Iq4Nl | Self::Iq4Xs if shared => QuantFormat::Q5K,
            _ => self.base(),
        }
    }

    /// The format of the down projection of `layer`.
    fn down(self, layer: u64, shape: &Shape) -> QuantFormat {
        match self {
            Self::Q4KM | Self::Q5KM if more_bits(layer, shape.layers) => QuantFormat::Q6K,
            Self::Q2K => QuantFormat::Q3K,
            Self::Q3KM if layer < shape.layers / 16 => QuantFormat::Q5K,
            Self::Q3KM => QuantFormat::Q4K,
            Self::Iq4Nl | Self::Iq4Xs if layer < shape.layers / 8 => QuantFormat::Q5K,
            _ => self.base(),
        }
    }

    /// Whether eight experts leave bits for the output projection of the attention.
    fn is_small(self) -> bool {
        matches!(self, Self::Q2K | Self::Q3KM | Self::Iq4Nl | Self::Iq4Xs | Self::Q4KM)
    }

    /// The format of the output projection of the attention.
    fn attention_output(self) -> QuantFormat {
        match self {
            Self::Q2K => QuantFormat::Q3K,
            Self::Q3KM => QuantFormat::Q4K,
            _ => self.base(),
        }
    }

    /// The format of `tensor`. Vectors are f32.
    ///
    /// The matrix that makes the logits has 6 bits; values, down projections and the attention's
    /// output have more than the rest in the mixtures of few bits; a row that is no whole number of
    /// blocks falls back to the next larger format with blocks of 32. Without an importance matrix.
    pub(super) fn format(self, shape: &Shape, tensor: &Tensor) -> QuantFormat {
        let base = self.base();
        let whole = |format: QuantFormat| {
            tensor.shape[0].is_multiple_of(format.describe().block_elements() as u64)
        };
        let attention_output = tensor.name.ends_with("attn_output.weight");
        let key = tensor.name.ends_with("attn_k.weight");
        let float = matches!(self, Self::F16 | Self::Bf16);
        let wanted = match tensor.role {
            Role::Vector => return QuantFormat::F32,
            _ if float => base,
            Role::Logits if !whole(base) => QuantFormat::Q8_0,
            Role::Logits if base != QuantFormat::Q8_0 => QuantFormat::Q6K,
            // Little beside eight experts' feed-forward blocks.
            Role::Value(_) if shape.has_eight_experts() => QuantFormat::Q8_0,
            Role::Matrix if key && shape.has_eight_experts() => QuantFormat::Q8_0,
            Role::Matrix if attention_output && shape.has_eight_experts() && self.is_small() => {
                QuantFormat::Q5K
            }
            Role::Value(layer) => self.value(layer, shape),
            Role::Down(layer) => self.down(layer, shape),
            Role::Matrix if attention_output => self.attention_output(),
            Role::Fused if matches!(self, Self::Q4KM) => QuantFormat::Q5K,
            Role::Fused if matches!(self, Self::Q5KM) => QuantFormat::Q6K,
            Role::Fused if matches!(self, Self::Q3KM) => QuantFormat::Q4K,
            Role::Logits | Role::Matrix | Role::Fused => base,
        };
        if whole(wanted) {
            return wanted;
        }
        let smaller_blocks = match wanted {
            QuantFormat::Q2K | QuantFormat::Q3K => QuantFormat::Q4_0,
            QuantFormat::Iq4Xs => QuantFormat::Iq4Nl,
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
