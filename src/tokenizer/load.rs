//! The tokenizer of a checkpoint: from the keys of a GGUF file, or the files of a folder.

use super::Tokenizer;
use crate::checkpoint::{Checkpoint, stands};
use crate::error::{Error, Result};

impl Tokenizer {
    /// The tokenizer that belongs to a checkpoint.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when it has none, or one of a kind that is not served; those of
    /// [`new`](Self::new) and of reading the files of a folder.
    pub fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let folder = checkpoint.path();
        if !folder.is_dir() {
            let none = || without_vocabulary(checkpoint, "tokenizer.ggml.model");
            return Self::read(checkpoint)?.ok_or_else(none);
        }
        if !stands(&folder.join("tokenizer.json"))? {
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
