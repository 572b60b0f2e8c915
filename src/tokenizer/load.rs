//! The tokenizer of a checkpoint: from the keys of a GGUF file, or the files of a folder.

use super::{Tokenizer, VocabSource};
use crate::checkpoint::{Checkpoint, Value};
use crate::error::{Error, Result};

impl VocabSource {
    /// What the keys `tokenizer.ggml.*` of a checkpoint say.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when there is no vocabulary; [`Error::InvalidModel`] naming a key of
    /// another type.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let metadata = checkpoint.metadata();
        let texts = |key: &str| -> Result<Option<Vec<String>>> {
            let strings = checkpoint.strings_key(key)?;
            // A token's text need not be UTF-8; what is not becomes U+FFFD and matches nothing.
            let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
            Ok(strings.map(|s| s.iter().map(text).collect()))
        };
        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            if let Some(Value::I32(-1)) = metadata.entry(&key).map(|e| e.value) {
                return Ok(Some(u32::MAX));
            }
            // An id that no 32 bits hold is in no vocabulary: the tokenizer says so.
            Ok(checkpoint.u64_key(&key)?.map(|id| u32::try_from(id).unwrap_or(u32::MAX - 1)))
        };
        let text = |key: &str| Ok::<_, Error>(checkpoint.str_key(key)?.map(str::to_owned));
        let Some(model) = text("tokenizer.ggml.model")? else {
            return Err(without_vocabulary(checkpoint, "tokenizer.ggml.model"));
        };
        // Phi-3's published tokens swallow the white space after them, which GGUF has no key for.
        let phi3 = checkpoint.str_key("general.architecture")? == Some("phi3");
        Ok(Self {
            specials_swallow_space: phi3 && model == "llama",
            model,
            pre: text("tokenizer.ggml.pre")?,
            tokens: texts("tokenizer.ggml.tokens")?
                .ok_or_else(|| metadata.missing("tokenizer.ggml.tokens"))?,
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
        })
    }
}

impl Tokenizer {
    /// The tokenizer that belongs to a checkpoint.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has none, or one of a kind that is not served; those of
    /// [`new`](Self::new) and of reading the files of a folder.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let folder = checkpoint.path();
        if !folder.is_dir() {
            return Self::new(VocabSource::of(checkpoint)?, folder);
        }
        if !folder.join("tokenizer.json").exists() {
            return Err(without_vocabulary(checkpoint, "tokenizer.json"));
        }
        Self::from_folder(folder)
    }
}

fn without_vocabulary(checkpoint: &Checkpoint, at: &str) -> Error {
    Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: at.to_owned(),
        what: "text for a model without a vocabulary".to_owned(),
        instead: "give token ids: --prompt-ids 1,2,3".to_owned(),
    }
}
