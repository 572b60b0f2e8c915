//! A model's tokenizer, from the keys of its file.

use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::tokenizer::Tokenizer;

/// The tokenizer of `checkpoint`.
pub(crate) fn tokenizer(checkpoint: &Checkpoint) -> Result<Tokenizer> {
    Tokenizer::read(checkpoint)?.ok_or_else(|| Error::Unsupported {
        path: checkpoint.path().to_owned(),
        at: "tokenizer.ggml.model".to_owned(),
        what: "text for a model without a vocabulary".to_owned(),
        instead: "give token ids: --prompt-ids 1,2,3".to_owned(),
    })
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
