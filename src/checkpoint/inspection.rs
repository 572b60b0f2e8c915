//! What a model's files hold, also where this crate cannot run it.

use super::metadata::Metadata;
use crate::quant::QuantFormat;
use std::collections::BTreeMap;

/// A tensor as [`Checkpoint::inspect_only`](super::Checkpoint::inspect_only) lists it, of any type.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedTensor {
    /// Name in the file.
    pub name: String,
    /// Name of the type, `type 77` for an id that the format does not define.
    pub type_name: String,
    /// The type, where this crate serves it.
    pub format: Option<QuantFormat>,
    /// Elements per dimension, innermost first.
    pub shape: Vec<u64>,
    /// Size of the data, bytes; `None` for a type that the format does not define.
    pub bytes: Option<u64>,
}

/// What a model's files hold.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Inspection {
    /// The container: `GGUF 3`, `safetensors`.
    pub container: String,
    /// Files with tensors.
    pub files: usize,
    /// Size of those files, bytes.
    pub file_bytes: u64,
    /// Keys and values: a GGUF file's own, or those of `config.json`.
    pub metadata: Metadata,
    /// Tensors in file order.
    pub tensors: Vec<ListedTensor>,
}

impl Inspection {
    /// Name of the architecture, as the file has it.
    pub fn architecture(&self) -> Option<&str> {
        let key = |key| self.metadata.str_key(key).ok().flatten();
        key("general.architecture").or_else(|| key("model_type"))
    }

    /// Bytes of weights that a token has to read, by type: every matrix and vector once, of the
    /// embeddings one row (all of them once more where they are the output head too), of experts
    /// the share that is chosen.
    ///
    /// It is told from names, so that it can be told of a model that is not served; tensors of a
    /// type that the format does not define count nothing.
    pub fn read_per_token(&self) -> BTreeMap<&str, u64> {
        let tied = !self.tensors.iter().any(|t| is_head(&t.name));
        let (chosen, experts) = self.experts();
        let mut sums = BTreeMap::new();
        for t in &self.tensors {
            let all = t.bytes.unwrap_or(0);
            let rows: u64 = t.shape.iter().skip(1).product();
            let read = if is_embedding(&t.name) {
                all / rows.max(1) + if tied { all } else { 0 }
            } else if is_expert(&t.name) {
                // At most 2^63 bytes of 2^63 experts.
                (u128::from(all) * u128::from(chosen) / u128::from(experts)) as u64
            } else {
                all
            };
            let sum: &mut u64 = sums.entry(t.type_name.as_str()).or_default();
            *sum = sum.saturating_add(read);
        }
        sums
    }

    /// How many experts a token chooses, of how many; 1 of 1 where the keys do not say.
    fn experts(&self) -> (u64, u64) {
        let number = |key: &str| self.metadata.u64_key(key).ok().flatten();
        let gguf = |rest: &str| number(&format!("{}.{rest}", self.architecture()?));
        let all = gguf("expert_count")
            .or_else(|| number("num_local_experts"))
            .or_else(|| number("num_experts"));
        let chosen = gguf("expert_used_count").or_else(|| number("num_experts_per_tok"));
        match (chosen, all) {
            (Some(chosen), Some(all)) if chosen <= all && all > 0 => (chosen, all),
            _ => (1, 1),
        }
    }
}

fn is_embedding(name: &str) -> bool {
    name == "token_embd.weight" || name.ends_with("embed_tokens.weight")
}

fn is_head(name: &str) -> bool {
    name == "output.weight" || name.ends_with("lm_head.weight")
}

fn is_expert(name: &str) -> bool {
    name.contains("_exps.") || name.contains(".experts.")
}
