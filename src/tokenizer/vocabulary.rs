//! The vocabulary of a model file: checked once, then trusted.

use std::collections::HashMap;
use std::path::Path;

use super::VocabSource;
use crate::error::{Defect, Error, Result};

/// Longest token text that is accepted, in bytes.
pub(super) const MAX_TOKEN_BYTES: usize = 65_536;
/// Ids are signed 32-bit in some readers of the format; a vocabulary beyond that is malformed.
const MAX_TOKENS: usize = i32::MAX as usize;
/// A file writes "there is none" as −1, which reads as this.
const NONE: u32 = u32::MAX;

pub(super) const TOKENS: &str = "tokenizer.ggml.tokens";
const SCORES: &str = "tokenizer.ggml.scores";
const TOKEN_TYPES: &str = "tokenizer.ggml.token_type";

/// Token texts that end a turn or a document in one of the published models. A file names at most
/// two such tokens by id, while chat models are trained to end with several.
const END_TEXTS: [&str; 21] = [
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|eom|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<\u{ff5c}end\u{2581}of\u{2581}sentence\u{ff5c}>",
];

/// What a token is for: `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text.
    Normal,
    /// Stands for what the vocabulary lacks.
    Unknown,
    /// Structure of a prompt, such as the start of a turn.
    Control,
    /// Text that is never split.
    UserDefined,
    /// A reserved id.
    Unused,
    /// One byte.
    Byte,
}

/// Checked tokens and ids. Every id in here is below `tokens.len()`.
#[derive(Debug)]
pub(super) struct Vocabulary {
    /// `[tokens]` texts as the file spells them.
    pub(super) tokens: Vec<String>,
    /// `[tokens]`.
    pub(super) kinds: Vec<Kind>,
    pub(super) bos: Option<u32>,
    pub(super) eos: Option<u32>,
    pub(super) unknown: Option<u32>,
    /// Sorted ids that end a generation.
    pub(super) ends: Vec<u32>,
}

/// Ids that the format assumes when the key is absent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    pub(super) bos: u32,
    pub(super) eos: u32,
    pub(super) unknown: Option<u32>,
}

impl Vocabulary {
    /// Checks `source` and takes its tokens out of it.
    ///
    /// # Errors
    /// [`Defect::BadVocab`] for no tokens, an over-long one, or a list shorter than the tokens;
    /// [`Defect::BadValue`] for an id outside the vocabulary.
    pub(super) fn take(source: &mut VocabSource, defaults: Defaults, path: &Path) -> Result<Self> {
        let bad = |at: &str, why: String| Error::invalid(path, at, None, Defect::BadVocab, why);
        let tokens = std::mem::take(&mut source.tokens);
        let count = tokens.len();
        if count == 0 {
            return Err(bad(TOKENS, "the vocabulary has no tokens".to_owned()));
        }
        if count > MAX_TOKENS {
            let why = format!("{count} tokens, at most {MAX_TOKENS} can be numbered");
            return Err(Error::invalid(path, TOKENS, None, Defect::BadValue, why));
        }
        if let Some((id, text)) = tokens.iter().enumerate().find(|(_, t)| t.len() > MAX_TOKEN_BYTES)
        {
            let why = format!(
                "token {id} has {} bytes, at most {MAX_TOKEN_BYTES} are accepted",
                text.len()
            );
            return Err(bad(TOKENS, why));
        }
        // Longer lists occur in the wild and are harmless; shorter ones would be read past the end.
        let lengths = [
            (SCORES, source.scores.as_ref().map(Vec::len)),
            (TOKEN_TYPES, source.token_types.as_ref().map(Vec::len)),
        ];
        for (key, length) in lengths {
            if let Some(length) = length.filter(|&length| length < count) {
                return Err(bad(key, format!("{length} entries for {count} tokens")));
            }
        }

        let id = |key: &str, given, default| special_id(path, key, given, default, count);
        let bos = id("tokenizer.ggml.bos_token_id", source.bos, Some(defaults.bos))?;
        let eos = id("tokenizer.ggml.eos_token_id", source.eos, Some(defaults.eos))?;
        let eot = id("tokenizer.ggml.eot_token_id", source.eot, None)?;
        let unknown = id("tokenizer.ggml.unknown_token_id", source.unknown, defaults.unknown)?;

        let mut kinds = match &source.token_types {
            Some(types) => kinds(&types[..count]),
            None => untyped(&tokens, &[bos, eos, eot], unknown),
        };
        let mut ends: Vec<u32> = eos.into_iter().chain(eot).collect();
        for (id, text) in (0u32..).zip(&tokens) {
            if ends_text(text) {
                ends.push(id);
                // Some files mark an end of turn as ordinary text; it never is.
                if kinds[id as usize] == Kind::Normal {
                    kinds[id as usize] = Kind::Control;
                }
            }
        }
        ends.sort_unstable();
        ends.dedup();
        Ok(Self { tokens, kinds, bos, eos, unknown, ends })
    }

    /// Texts that stand for one token wherever they are written in a prompt, with their ids; the
    /// first id of a text that occurs twice.
    pub(super) fn specials(&self) -> impl Iterator<Item = (&str, u32)> {
        let special = |kind| matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
        (0u32..)
            .zip(&self.tokens)
            .zip(&self.kinds)
            .filter(move |(_, kind)| special(**kind))
            .map(|((id, text), _)| (text.as_str(), id))
    }

    /// Text to id; the first id of a text that occurs twice. Empty texts match nothing.
    pub(super) fn by_text<M: Default + Extend<(String, u32)>>(&self) -> M {
        let mut first: HashMap<&str, u32> = HashMap::with_capacity(self.tokens.len());
        for (id, text) in (0u32..).zip(&self.tokens).filter(|(_, text)| !text.is_empty()) {
            first.entry(text).or_insert(id);
        }
        let mut map = M::default();
        map.extend(first.into_iter().map(|(text, id)| (text.to_owned(), id)));
        map
    }
}

fn special_id(
    path: &Path,
    key: &str,
    given: Option<u32>,
    default: Option<u32>,
    count: usize,
) -> Result<Option<u32>> {
    let outside = |id: u32| usize::try_from(id).map_or(true, |id| id >= count);
    match (given, default) {
        (Some(NONE), _) | (None, None) => Ok(None),
        (Some(id), _) if outside(id) => {
            let why = format!("id {id} is outside the vocabulary of {count} tokens");
            Err(Error::invalid(path, key, None, Defect::BadValue, why))
        }
        (None, Some(id)) if outside(id) => {
            let why = format!(
                "the key is absent and its default, id {id}, is outside the vocabulary of {count} \
                 tokens; the file must name the token ({NONE} for none)"
            );
            Err(Error::invalid(path, key, None, Defect::BadValue, why))
        }
        (Some(id), _) => Ok(Some(id)),
        (None, Some(id)) => {
            log::warn!("{}: {key} is absent; id {id} is assumed", path.display());
            Ok(Some(id))
        }
    }
}

fn kinds(types: &[i32]) -> Vec<Kind> {
    let mut odd = 0usize;
    let kinds = types
        .iter()
        .map(|&value| match value {
            1 => Kind::Normal,
            2 => Kind::Unknown,
            3 => Kind::Control,
            4 => Kind::UserDefined,
            5 => Kind::Unused,
            6 => Kind::Byte,
            _ => {
                odd += 1;
                Kind::Normal
            }
        })
        .collect();
    if odd > 0 {
        log::warn!("{TOKEN_TYPES}: {odd} values outside 1 to 6 are taken as ordinary text");
    }
    kinds
}

/// Kinds of a file that lists none: what the ids say, and bytes by their spelling.
fn untyped(tokens: &[String], control: &[Option<u32>], unknown: Option<u32>) -> Vec<Kind> {
    let kind = |(id, text): (u32, &String)| {
        if unknown == Some(id) {
            Kind::Unknown
        } else if control.contains(&Some(id)) {
            Kind::Control
        } else if byte_value(text).is_some() {
            Kind::Byte
        } else {
            Kind::Normal
        }
    };
    (0u32..).zip(tokens).map(kind).collect()
}

/// Whether a token of this text ends a turn or a document.
pub(super) fn ends_text(text: &str) -> bool {
    END_TEXTS.contains(&text)
}

/// The byte that a token spelled `<0x41>` stands for: two hexadecimal digits exactly.
pub(super) fn byte_value(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if hexadecimal { u8::from_str_radix(digits, 16).ok() } else { None }
}
