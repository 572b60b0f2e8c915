//! A model's tokenizer, from the keys of its file.

use decode_graph::checkpoint::{Checkpoint, Value};
use decode_graph::error::{Error, Result};
use decode_graph::tokenizer::{Tokenizer, VocabSource};

/// The tokenizer of `checkpoint`.
pub(crate) fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
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
    let Some(model) = text("tokenizer.ggml.model")? else {
        return Err(Error::Unsupported {
            path: checkpoint.path().to_owned(),
            at: "tokenizer.ggml.model".to_owned(),
            what: "text for a model without a vocabulary".to_owned(),
            instead: "give token ids: --prompt-ids 1,2,3".to_owned(),
        });
    };
    let source = VocabSource {
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
    };
    Tokenizer::new(source, checkpoint.path())
}

/// `prompt` as a user's turn in ChatML, for a model whose template is of that kind. The template
/// itself is untrusted code and is not evaluated.
pub(crate) fn chat(tokenizer: &Tokenizer, checkpoint: &Checkpoint, prompt: &str) -> Result<String> {
    if tokenizer.chat_template().is_some_and(|template| template.contains("<|im_start|>")) {
        return Ok(format!("<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"));
    }
    Err(Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: "tokenizer.chat_template".to_owned(),
        what: "a chat template other than ChatML".to_owned(),
        instead: "write the turns into -p yourself".to_owned(),
    })
}
