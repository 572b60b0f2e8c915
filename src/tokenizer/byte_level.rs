//! Byte-level byte-pair encoding (`tokenizer.ggml.model` = `gpt2`).
//!
//! Text is cut into pieces, every byte of a piece is written as a printable character
//! ([`Alphabet`]), and the pair with the lowest merge rank is joined until none is left.

use std::collections::HashSet;

use tokenizers::Model;
use tokenizers::models::bpe::{BPE, BpeBuilder, Vocab};

use super::pretokenize::{Family, Splitter};
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};

/// GPT-2's printable spelling of the 256 bytes: itself for a byte that is a printable Latin-1
/// character, otherwise U+0100 and up, in order.
#[derive(Debug)]
pub(super) struct Alphabet {
    to_char: [char; 256],
    /// Indexed by code point.
    to_byte: [Option<u8>; 0x144],
}

impl Alphabet {
    pub(super) fn new() -> Self {
        let mut alphabet = Self { to_char: ['\0'; 256], to_byte: [None; 0x144] };
        let mut spare = '\u{100}'..;
        for byte in 0..=u8::MAX {
            let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
            let spelled = if printable { char::from(byte) } else { spare.next().unwrap_or('\0') };
            alphabet.to_char[usize::from(byte)] = spelled;
            alphabet.to_byte[spelled as usize] = Some(byte);
        }
        alphabet
    }

    fn spell(&self, text: &str) -> String {
        text.bytes().map(|byte| self.to_char[usize::from(byte)]).collect()
    }

    /// The bytes that `token` spells, or `None` if it has a character that spells no byte.
    pub(super) fn bytes(&self, token: &str) -> Option<Vec<u8>> {
        token.chars().map(|c| self.to_byte.get(c as usize).copied().flatten()).collect()
    }
}

/// The encoder.
pub(super) struct ByteLevel {
    alphabet: Alphabet,
    splitter: Splitter,
    model: BPE,
    ignore_merges: bool,
    /// Whether the vocabulary has a token for this one byte.
    has_byte: [bool; 256],
}

impl ByteLevel {
    /// Merges that are malformed or name tokens outside the vocabulary are left out with a
    /// warning; of a merge that is given twice the first rank counts.
    pub(super) fn new(vocabulary: &Vocabulary, merges: &[String], family: &Family) -> Result<Self> {
        let vocab: Vocab = vocabulary.by_text();
        let mut seen = HashSet::with_capacity(merges.len());
        let mut kept = Vec::with_capacity(merges.len());
        let (mut skipped, mut joined) = (0usize, String::new());
        for merge in merges {
            let pair = halves(merge).and_then(|(left, right)| {
                joined.clear();
                joined.push_str(left);
                joined.push_str(right);
                vocab.get(joined.as_str())?;
                Some(((left, right), (*vocab.get(left)?, *vocab.get(right)?)))
            });
            match pair {
                Some((texts, ids)) if seen.insert(ids) => kept.push(texts),
                _ => skipped += 1,
            }
        }
        if skipped > 0 {
            log::warn!(
                "tokenizer.ggml.merges: {skipped} of {} are malformed, repeated or name tokens \
                 outside the vocabulary, and are left out",
                merges.len()
            );
        }
        let kept = kept.into_iter().map(|(l, r)| (l.to_owned(), r.to_owned())).collect();

        let alphabet = Alphabet::new();
        let has_byte =
            alphabet.to_char.map(|c| vocab.contains_key(c.encode_utf8(&mut [0; 4]) as &str));
        let ignore_merges = family.ignore_merges;
        let model = BpeBuilder::new()
            .vocab_and_merges(vocab, kept)
            .build()
            .map_err(|e| Error::Internal(format!("byte-pair encoder: {e}")))?;
        let splitter = Splitter::new(family)?;
        Ok(Self { alphabet, splitter, model, ignore_merges, has_byte })
    }

    /// Appends the ids of `text`; the inner error is a byte that no token stands for.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<Result<(), u8>> {
        for piece in self.splitter.split(text) {
            let spelled = self.alphabet.spell(piece);
            if self.ignore_merges
                && let Some(id) = self.model.token_to_id(&spelled)
            {
                ids.push(id);
                continue;
            }
            // The encoder would leave such a byte out without a word.
            if let Some(byte) = piece.bytes().find(|&byte| !self.has_byte[usize::from(byte)]) {
                return Ok(Err(byte));
            }
            let tokens = self
                .model
                .tokenize(&spelled)
                .map_err(|e| Error::Internal(format!("byte-pair encoder: {e}")))?;
            ids.extend(tokens.iter().map(|token| token.id));
        }
        Ok(Ok(()))
    }
}

/// A merge is two texts with a space between; a text may begin with a space, so the first
/// character is never the separator.
fn halves(merge: &str) -> Option<(&str, &str)> {
    let first = merge.chars().next()?.len_utf8();
    let at = first + merge.get(first..)?.find(' ')?;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    (!right.is_empty()).then_some((left, right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_spells_every_byte_once_and_as_gpt2_does() {
        let alphabet = Alphabet::new();
        assert_eq!(alphabet.spell(" \n\u{7f}Aé"), "ĠĊġAÃ©");
        assert_eq!(alphabet.to_char[0xad], '\u{143}');
        for byte in 0..=u8::MAX {
            let spelled = alphabet.to_char[usize::from(byte)].to_string();
            assert_eq!(alphabet.bytes(&spelled), Some(vec![byte]));
        }
        assert_eq!(alphabet.bytes("a b"), None);
        assert_eq!(alphabet.bytes("\u{144}"), None);
    }

    #[test]
    fn a_merge_is_split_at_the_first_space_after_its_first_character() {
        assert_eq!(halves("a b"), Some(("a", "b")));
        assert_eq!(halves("  b"), Some((" ", "b")));
        assert_eq!(halves("é b c"), Some(("é", "b c")));
        for malformed in ["", "a", " ", "ab", "a ", " b"] {
            assert_eq!(halves(malformed), None, "{malformed:?}");
        }
    }
}
