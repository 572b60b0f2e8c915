//! What a file says about its tokenizer, read from its keys.

use super::vocabulary::TOKENS;
use crate::checkpoint::{Checkpoint, Value};
use crate::error::Result;

/// What a file says about its tokenizer: the values of the keys `tokenizer.ggml.*`.
///
/// An id of `u32::MAX` (−1 in the file) means "none"; an absent one means the format's default.
#[derive(Clone, Debug, Default)]
pub struct VocabSource {
    /// `model`: `gpt2` or `llama`.
    pub model: String,
    /// `pre`: name of the pre-tokenizer.
    pub pre: Option<String>,
    /// `tokens`: `[tokens]` texts.
    pub tokens: Vec<String>,
    /// `token_type`: at least `[tokens]`; 1 normal, 2 unknown, 3 control, 4 user-defined,
    /// 5 unused, 6 byte.
    pub token_types: Option<Vec<i32>>,
    /// `scores`: at least `[tokens]`; a pair of higher score is joined earlier.
    pub scores: Option<Vec<f32>>,
    /// `merges`: two texts with a space between, the most urgent first.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`.
    pub eot: Option<u32>,
    /// `unknown_token_id`.
    pub unknown: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`; read for `llama` only.
    pub add_space_prefix: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl VocabSource {
    /// Reads the keys of `checkpoint`; `None` where the file names no tokenizer.
    ///
    /// # Errors
    /// [`Error::InvalidModel`](crate::error::Error::InvalidModel) naming the key that is absent or
    /// of another type, and where its value stands.
    pub fn read(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let metadata = checkpoint.metadata();
        let texts = |key: &str| -> Result<Option<Vec<String>>> {
            let strings = checkpoint.strings_key(key)?;
            // A token's text need not be UTF-8; what is not becomes U+FFFD and matches nothing.
            Ok(strings.map(|s| s.iter().map(|b| String::from_utf8_lossy(b).into_owned()).collect()))
        };
        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let Some(Value::I32(-1)) = metadata.entry(&key).map(|e| e.value) {
                return Ok(Some(u32::MAX));
            }
            // An id that no 32 bits hold is in no vocabulary: the tokenizer says so.
            Ok(checkpoint.u64_key(&key)?.map(|id| u32::try_from(id).unwrap_or(u32::MAX - 1)))
        };
        let text = |key: &str| Ok(checkpoint.str_key(key)?.map(str::to_owned));
        let Some(model) = text("tokenizer.ggml.model")? else { return Ok(None) };
        Ok(Some(Self {
            model,
            pre: text("tokenizer.ggml.pre")?,
            tokens: texts(TOKENS)?.ok_or_else(|| metadata.missing(TOKENS))?,
            token_types: checkpoint.i32_array_key("tokenizer.ggml.token_type")?,
            scores: checkpoint.f32_array_key("tokenizer.ggml.scores")?,
            merges: texts("tokenizer.ggml.merges")?.unwrap_or_default(),
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            unknown: id("unknown")?,
            add_bos: checkpoint.bool_key("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: checkpoint.bool_key("tokenizer.ggml.add_space_prefix")?,
            chat_template: text("tokenizer.chat_template")?,
        }))
    }
}
