//! What a result row says about the model: file, type, size, parameters.

use crate::checkpoint::Checkpoint;
use crate::error::Result;
use std::collections::BTreeMap;

/// A model in a result row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFacts {
    /// File, or `SHAPE:QUANT` for synthetic weights.
    pub filename: String,
    /// Architecture, size and type in words, for example `llama 8B Q4_K - Medium`.
    pub kind: String,
    /// Sum of the tensors' sizes, bytes.
    pub bytes: u64,
    /// Sum of the tensors' elements.
    pub parameters: u64,
}

impl ModelFacts {
    /// Reads them.
    ///
    /// # Errors
    /// Those of reading a key of the wrong type.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        // Frequency tables are computed, not learnt.
        let learnt = checkpoint.tensors().iter().filter(|t| !t.name.starts_with("rope_"));
        let parameters = learnt.map(|t| t.columns().saturating_mul(t.rows())).sum();
        let size = match checkpoint.str_key("general.size_label")? {
            Some(label) => label.to_owned(),
            None => size_label(parameters),
        };
        let architecture = checkpoint.architecture()?;
        Ok(Self {
            filename: checkpoint.path().display().to_string(),
            kind: format!("{architecture} {size} {}", file_type(checkpoint)?),
            bytes: checkpoint.tensors().iter().map(|t| t.bytes).sum(),
            parameters,
        })
    }
}

/// A parameter count as models are called: `135M`, `8B`.
fn size_label(parameters: u64) -> String {
    let millions = (parameters as f64 / 1e6).round();
    if millions < 950.0 { format!("{millions}M") } else { format!("{}B", (millions / 1e3).round()) }
}

/// The mixture of weight formats in llama.cpp's words; the format with most bytes, marked as a
/// guess, where the file does not say.
fn file_type(checkpoint: &Checkpoint) -> Result<String> {
    let said = match checkpoint.u64_key("general.file_type")? {
        Some(0) => "all F32",
        Some(1) => "F16",
        Some(2) => "Q4_0",
        Some(3) => "Q4_1",
        Some(7) => "Q8_0",
        Some(8) => "Q5_0",
        Some(9) => "Q5_1",
        Some(14) => "Q4_K - Small",
        Some(15) => "Q4_K - Medium",
        Some(16) => "Q5_K - Small",
        Some(17) => "Q5_K - Medium",
        Some(18) => "Q6_K",
        Some(32) => "BF16",
        _ => return Ok(format!("(guessed) {}", dominant_format(checkpoint))),
    };
    Ok(said.to_owned())
}

fn dominant_format(checkpoint: &Checkpoint) -> &'static str {
    let mut bytes = BTreeMap::new();
    for tensor in checkpoint.tensors() {
        *bytes.entry(tensor.format).or_insert(0) += tensor.bytes;
    }
    bytes.into_iter().max_by_key(|(_, n)| *n).map_or("empty", |(format, _)| format.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::SyntheticSpec;

    #[test]
    fn a_model_is_called_as_its_published_file_is() {
        let spec = SyntheticSpec::parse("llama-3.2-1b:q4_k_m").unwrap();
        let facts = ModelFacts::of(&Checkpoint::synthetic(&spec).unwrap()).unwrap();
        assert_eq!(facts.kind, "llama 1B Q4_K - Medium");
        assert_eq!(facts.parameters, 1_235_814_400);
    }

    #[test]
    fn sizes_are_rounded_as_models_are_called() {
        assert_eq!(size_label(134_515_008), "135M");
        assert_eq!(size_label(8_030_261_248), "8B");
    }
}
