//! Text to token ids and back, from the vocabulary that a GGUF file or a folder carries.
//!
//! Two models are served: byte-level byte-pair encoding (`gpt2`) and SentencePiece byte-pair
//! encoding (`llama`); of a folder, `tokenizer.json` of these kinds. A run of synthetic ids never
//! needs a tokenizer.
//!
//! Special tokens that are written in a prompt (`<|im_start|>`) become their ids: a prompt is
//! trusted to structure itself. Time is linear in the prompt (times the logarithm of its longest
//! word), whatever it contains. A chat template is run only when a conversation is to be encoded.
//!
//! Source of keys, defaults and pre-tokenizer names: the GGUF specification and llama.cpp.

use std::collections::HashSet;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::checkpoint::Checkpoint;
use crate::error::{Defect, Error, Result};

mod byte_level;
mod chat;
mod json;
mod load;
mod pattern;
mod pretokenize;
mod source;
mod special;
mod spm;
mod stream;
mod vocabulary;

pub use chat::{ChatContext, Message, render_chat};
pub use source::VocabSource;
pub use stream::StreamDecoder;

use byte_level::{Alphabet, ByteLevel};
use special::{Part, SpecialTokens};
use spm::SentencePiece;
use vocabulary::{Defaults, Kind, Vocabulary, byte_value};

/// Special tokens that leave the white space after them where the others take it along.
const PLAIN_SPECIALS: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

enum Model {
    ByteLevel(Box<ByteLevel>),
    SentencePiece(SentencePiece),
    Json(Box<tokenizers::Tokenizer>),
}

/// Text to token ids and back.
pub struct Tokenizer {
    path: PathBuf,
    model: Model,
    /// None for [`Model::Json`], which finds them itself.
    specials: SpecialTokens,
    /// Special tokens that take the white space after them along.
    swallowing: HashSet<u32>,
    /// `[tokens]` bytes that a token stands for.
    bytes: Vec<Box<[u8]>>,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Sorted.
    ends: Vec<u32>,
    add_bos: bool,
    chat_template: Option<String>,
    /// Where the template stands in the file, or beside it.
    template_at: &'static str,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("tokens", &self.bytes.len())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Builds the tokenizer of the file at `path` (which is named in errors and not read).
    ///
    /// Of a token text that occurs twice, the first id is the one that text becomes. Merges that
    /// are malformed or name absent tokens, token types outside 1 to 6, and a missing pre-tokenizer
    /// are warned about and passed over.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model other than `gpt2` and `llama`, and for a pre-tokenizer
    /// that is not known; [`Error::InvalidModel`]
    /// with [`Defect::BadVocab`] for lists that cannot be used, and with [`Defect::BadValue`] for
    /// an id, or the default that stands in for an absent one, outside the vocabulary.
    pub fn new(mut source: VocabSource, path: &Path) -> Result<Self> {
        let defaults = match source.model.as_str() {
            "gpt2" => Defaults { bos: 11, eos: 11, unknown: None },
            "llama" => Defaults { bos: 1, eos: 2, unknown: Some(0) },
            other => {
                return Err(Error::Unsupported {
                    path: path.to_owned(),
                    at: "tokenizer.ggml.model".to_owned(),
                    what: format!("tokenizer {:?}", other.chars().take(64).collect::<String>()),
                    instead: "\"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece) are; \
                              token ids can be given instead of text"
                        .to_owned(),
                });
            }
        };
        let vocabulary = Vocabulary::take(&mut source, defaults, path)?;
        let (model, add_bos) = if source.model == "gpt2" {
            if source.merges.is_empty() {
                let why = "byte-level BPE needs merges; the file must be converted anew";
                let at = "tokenizer.ggml.merges";
                return Err(Error::invalid(path, at, None, Defect::BadVocab, why));
            }
            let family = pretokenize::family(source.pre.as_deref(), path)?;
            let model = ByteLevel::new(&vocabulary, &source.merges, family)?;
            (Model::ByteLevel(Box::new(model)), family.add_bos)
        } else {
            let space = source.add_space_prefix.unwrap_or(true);
            let model = SentencePiece::new(&vocabulary, source.scores.take(), space, path)?;
            (Model::SentencePiece(model), true)
        };
        let swallow = |text: &str| source.specials_swallow_space && !PLAIN_SPECIALS.contains(&text);
        let swallowing =
            vocabulary.specials().filter(|(text, _)| swallow(text)).map(|(_, id)| id).collect();
        Ok(Self {
            path: path.to_owned(),
            specials: SpecialTokens::new(vocabulary.specials()),
            bytes: spelled_out(&vocabulary, &model),
            model,
            bos: vocabulary.bos,
            eos: vocabulary.eos,
            ends: vocabulary.ends,
            add_bos: source.add_bos.unwrap_or(add_bos),
            chat_template: source.chat_template,
            template_at: "tokenizer.chat_template",
            swallowing,
        })
    }

    /// The tokenizer of `checkpoint`, from its keys; `None` where the file names none.
    ///
    /// # Errors
    /// As [`VocabSource::read`] and [`new`](Self::new), with the place of the key's value.
    pub fn read(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let Some(source) = VocabSource::read(checkpoint)? else { return Ok(None) };
        let placed = |error| match error {
            Error::InvalidModel { path, at, offset: None, defect, why } => {
                let offset = checkpoint.metadata().entry(&at).and_then(|e| e.offset);
                Error::InvalidModel { path, at, offset, defect, why }
            }
            other => other,
        };
        Self::new(source, checkpoint.path()).map(Some).map_err(placed)
    }

    /// Ids of `text`. With `add_special`, the BOS token comes first if the model was trained so.
    ///
    /// # Errors
    /// [`Defect::BadValue`] for a byte that neither a token nor an unknown token stands for.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 1);
        if let Some(bos) = self.bos.filter(|_| add_special && self.add_bos) {
            ids.push(bos);
        }
        if let Model::Json(model) = &self.model {
            let encoded = model.encode_fast(text, false).map_err(|e| {
                let why = format!("the text cannot be encoded: {e}");
                Error::invalid(&self.path, "model", None, Defect::BadValue, why)
            })?;
            ids.extend(encoded.get_ids());
            return Ok(ids);
        }
        let mut swallow = false;
        for part in self.specials.split(text) {
            let encoded = match (part, &self.model) {
                (Part::Token(id), _) => {
                    ids.push(id);
                    swallow = self.swallowing.contains(&id);
                    Ok(())
                }
                (Part::Text(text), model) => {
                    let text = if swallow { text.trim_start() } else { text };
                    match model {
                        _ if text.is_empty() => Ok(()),
                        Model::ByteLevel(model) => model.encode(text, &mut ids)?,
                        Model::SentencePiece(model) => model.encode(text, &mut ids),
                        // Encoded above, as a whole.
                        Model::Json(_) => Ok(()),
                    }
                }
            };
            encoded.map_err(|byte| {
                let why = format!(
                    "no token stands for byte {byte:#04X} of the text; leave the character out"
                );
                Error::invalid(&self.path, vocabulary::TOKENS, None, Defect::BadValue, why)
            })?;
        }
        Ok(ids)
    }

    /// Ids of a conversation: the model's own template renders it, and what it writes is encoded
    /// with special tokens where it spells them. BOS comes first if the model was trained so, once,
    /// also where the template writes it. `now` is seconds since 1970, for a template that asks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a model without a template; those of [`render_chat`] and
    /// [`encode`](Self::encode).
    pub fn encode_chat(&self, messages: &[Message], now: u64) -> Result<Vec<u32>> {
        let Some(template) = &self.chat_template else {
            return Err(Error::Unsupported {
                path: self.path.clone(),
                at: self.template_at.to_owned(),
                what: "a conversation with a model that has no chat template".to_owned(),
                instead: "write the turns into -p yourself".to_owned(),
            });
        };
        let spell = |id: Option<u32>| id.map(|id| self.decode(&[id])).unwrap_or_default();
        let (bos, eos) = (spell(self.bos), spell(self.eos));
        let context = ChatContext { bos: &bos, eos: &eos, add_generation_prompt: true, now };
        let text = render_chat(template, messages, context, &self.path, self.template_at)?;
        let mut ids = self.encode(&text, false)?;
        if let Some(bos) = self.bos.filter(|bos| self.add_bos && ids.first() != Some(bos)) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Text of `ids`, special tokens as they are spelled: `decode(encode(x)) == x` for byte-level
    /// BPE; SentencePiece gives back the space that it put before the text. Bytes that are not
    /// UTF-8, and an id outside the vocabulary (a model may be padded), become U+FFFD.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// Bytes of `ids`, as [`Tokenizer::decode`] before it makes them text.
    #[must_use]
    pub fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.bytes_of(id)).copied().collect()
    }

    /// Decodes tokens one by one.
    #[must_use]
    pub fn stream(&self) -> StreamDecoder<'_> {
        StreamDecoder::new(self)
    }

    /// Bytes that token `id` stands for; U+FFFD for an id outside the vocabulary.
    #[must_use]
    pub fn bytes_of(&self, id: u32) -> &[u8] {
        let found = usize::try_from(id).ok().and_then(|id| self.bytes.get(id));
        found.map_or("\u{fffd}".as_bytes(), |bytes| bytes)
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    #[must_use]
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether a generation ends with `id`: the end of a text or of a turn, by the file's ids or
    /// by the spelling that published chat models use.
    #[must_use]
    pub fn is_end_of_generation(&self, id: u32) -> bool {
        self.ends.binary_search(&id).is_ok()
    }

    /// Number of tokens.
    #[must_use]
    pub fn vocab_len(&self) -> usize {
        self.bytes.len()
    }

    /// The Jinja template of a chat, as the file has it: untrusted, and run only by
    /// [`encode_chat`](Self::encode_chat).
    #[must_use]
    pub fn chat_template(&self) -> Option<&str> {
        self.chat_template.as_deref()
    }
}

/// The bytes of every token. A token that spells no bytes (a control token, text that is not in
/// the byte alphabet) stands for its own text.
fn spelled_out(vocabulary: &Vocabulary, model: &Model) -> Vec<Box<[u8]>> {
    let alphabet = Alphabet::new();
    let decode = |(text, kind): (&String, &Kind)| -> Box<[u8]> {
        let bytes = match (kind, model) {
            (Kind::Control | Kind::Unknown, _) => None,
            (Kind::UserDefined, Model::ByteLevel(_)) => None,
            (_, Model::ByteLevel(_)) => alphabet.bytes(text),
            (Kind::Byte, Model::SentencePiece(_) | Model::Json(_)) => {
                byte_value(text).map(|byte| vec![byte])
            }
            (_, Model::SentencePiece(_) | Model::Json(_)) => {
                Some(text.replace(spm::SPACE, " ").into_bytes())
            }
        };
        bytes.unwrap_or_else(|| text.as_bytes().to_vec()).into_boxed_slice()
    };
    vocabulary.tokens.iter().zip(&vocabulary.kinds).map(decode).collect()
}

#[cfg(test)]
mod tests;
