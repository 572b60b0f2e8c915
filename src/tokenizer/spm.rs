//! SentencePiece byte-pair encoding (`tokenizer.ggml.model` = `llama`).
//!
//! Spaces are written as U+2581; the adjacent pair whose joined text is the token of the highest
//! score is joined, the leftmost on a tie, until no joined pair is a token. A character that is
//! no token becomes the tokens of its bytes (`<0x41>`), or the unknown token.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::path::Path;

use super::vocabulary::{Kind, Vocabulary, byte_value};
use crate::error::{Defect, Error, Result};

/// How a space is spelled in a token.
pub(super) const SPACE: char = '\u{2581}';

/// The encoder.
#[derive(Debug)]
pub(super) struct SentencePiece {
    by_text: HashMap<String, u32>,
    /// `[tokens]`, none of them NaN.
    scores: Vec<f32>,
    /// `[256]` ids of the byte tokens.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
    /// Length of the longest token, bytes: no longer pair needs to be looked up.
    longest: usize,
    /// Whether text at the start, and after a special token, gets a space before it.
    add_space_prefix: bool,
}

/// A stretch of the text in the doubly linked list of those that are left.
#[derive(Clone, Copy, Debug)]
struct Symbol {
    start: usize,
    /// Bytes; 0 once it has been joined to its left neighbour.
    length: usize,
    previous: Option<usize>,
    next: Option<usize>,
}

/// Two neighbours whose joined text is a token.
#[derive(Clone, Copy, Debug)]
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when the pair was found: another length means that it is out of date.
    length: usize,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then_with(|| other.left.cmp(&self.left))
    }
}
impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Pair {}

impl SentencePiece {
    /// # Errors
    /// [`Defect::BadVocab`] for a file without scores or with a score that is not a number.
    pub(super) fn new(
        vocabulary: &Vocabulary,
        scores: Option<Vec<f32>>,
        add_space_prefix: bool,
        path: &Path,
    ) -> Result<Self> {
        let bad = |why: String| {
            Error::invalid(path, "tokenizer.ggml.scores", None, Defect::BadVocab, why)
        };
        let Some(mut scores) = scores else {
            return Err(bad("a SentencePiece vocabulary needs a score for every token".to_owned()));
        };
        scores.truncate(vocabulary.tokens.len());
        // A score of −0 would sort below 0 in the total order.
        scores.iter_mut().for_each(|score| *score += 0.0);
        if let Some(id) = scores.iter().position(|score| score.is_nan()) {
            return Err(bad(format!("the score of token {id} is not a number")));
        }
        let mut bytes = vec![None; 256];
        let typed = (0u32..).zip(&vocabulary.tokens).zip(&vocabulary.kinds);
        for ((id, text), _) in typed.filter(|(_, kind)| **kind == Kind::Byte) {
            if let Some(value) = byte_value(text) {
                bytes[usize::from(value)].get_or_insert(id);
            }
        }
        let longest = vocabulary.tokens.iter().map(String::len).max().unwrap_or(0);
        let (by_text, unknown) = (vocabulary.by_text(), vocabulary.unknown);
        Ok(Self { by_text, scores, bytes, unknown, longest, add_space_prefix })
    }

    /// Appends the ids of `text`, which stands at the start of a prompt or after a special token;
    /// the error is a byte that no token stands for.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) -> Result<(), u8> {
        let mut spelled = String::with_capacity(text.len() + SPACE.len_utf8());
        if self.add_space_prefix {
            spelled.push(SPACE);
        }
        spelled.extend(text.chars().map(|c| if c == ' ' { SPACE } else { c }));

        let symbols = self.join(&spelled);
        for symbol in symbols.iter().filter(|symbol| symbol.length > 0) {
            let piece = &spelled[symbol.start..symbol.start + symbol.length];
            match self.by_text.get(piece) {
                Some(&id) => ids.push(id),
                None => self.fall_back(piece, ids)?,
            }
        }
        Ok(())
    }

    /// Joins pairs until none is left; of n characters at most 3n pairs are ever queued.
    fn join(&self, text: &str) -> Vec<Symbol> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(index, (start, c))| Symbol {
                start,
                length: c.len_utf8(),
                previous: index.checked_sub(1),
                next: (start + c.len_utf8() < text.len()).then_some(index + 1),
            })
            .collect();
        let mut queue: BinaryHeap<Pair> = (1..symbols.len())
            .filter_map(|right| self.pair(text, &symbols, Some(right - 1), Some(right)))
            .collect();
        while let Some(Pair { left, right, length, .. }) = queue.pop() {
            let (a, b) = (symbols[left], symbols[right]);
            if a.length == 0 || b.length == 0 || a.length + b.length != length {
                continue;
            }
            symbols[left] = Symbol { length, next: b.next, ..a };
            symbols[right].length = 0;
            if let Some(next) = b.next {
                symbols[next].previous = Some(left);
            }
            queue.extend(self.pair(text, &symbols, a.previous, Some(left)));
            queue.extend(self.pair(text, &symbols, Some(left), b.next));
        }
        symbols
    }

    fn pair(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
    ) -> Option<Pair> {
        let (left, right) = (left?, right?);
        let (start, length) = (symbols[left].start, symbols[left].length + symbols[right].length);
        if length > self.longest {
            return None;
        }
        let id = *self.by_text.get(&text[start..start + length])?;
        let score = self.scores.get(usize::try_from(id).ok()?).copied()?;
        Some(Pair { score, left, right, length })
    }

    fn fall_back(&self, piece: &str, ids: &mut Vec<u32>) -> Result<(), u8> {
        for byte in piece.bytes() {
            ids.push(self.bytes[usize::from(byte)].or(self.unknown).ok_or(byte)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use crate::error::{Defect, Error};
    use crate::tokenizer::{Tokenizer, VocabSource};

    /// `<unk>`, BOS, EOS, the bytes of "é", and texts with scores.
    fn source() -> VocabSource {
        let rows = [
            ("<unk>", 0.0, 2),
            ("<s>", 0.0, 3),
            ("</s>", 0.0, 3),
            ("<0xC3>", 0.0, 6),
            ("<0xA9>", 0.0, 6),
            ("\u{2581}", -10.0, 1),
            ("a", -11.0, 1),
            ("b", -12.0, 1),
            ("c", -13.0, 1),
            ("ab", -2.0, 1),
            ("bc", -1.0, 1),
            ("\u{2581}a", -3.0, 1),
            ("abc", -4.0, 1),
            ("\u{2581}abc", -5.0, 1),
        ];
        VocabSource {
            model: "llama".to_owned(),
            tokens: rows.iter().map(|row| row.0.to_owned()).collect(),
            scores: Some(rows.iter().map(|row| row.1).collect()),
            token_types: Some(rows.iter().map(|row| row.2).collect()),
            ..VocabSource::default()
        }
    }

    fn tokenizer(source: VocabSource) -> Tokenizer {
        Tokenizer::new(source, Path::new("tiny.gguf")).unwrap()
    }

    #[test]
    fn the_pair_of_the_highest_score_is_joined_first() {
        let t = tokenizer(VocabSource { add_space_prefix: Some(false), ..source() });
        // "bc" (-1) before "ab" (-2), then "a" + "bc" is "abc".
        assert_eq!(t.encode("abc", false).unwrap(), [12]);
        // "bc" leaves "ab" unjoined: no pair of "ab" + "bc" is a token.
        assert_eq!(t.encode("abbc", false).unwrap(), [9, 10]);
    }

    #[test]
    fn a_space_is_put_before_text_at_the_start_and_after_a_special_token() {
        let t = tokenizer(source());
        assert_eq!(t.encode("abc", true).unwrap(), [1, 13]);
        assert_eq!(t.encode("abc</s>a", false).unwrap(), [13, 2, 11]);
        assert_eq!(t.decode(&[13, 11]), " abc a");
    }

    /// Gemma: no space before the text; runs of spaces and line breaks are tokens that are never
    /// split, whatever the scores say.
    #[test]
    fn user_defined_pieces_are_taken_whole_and_gemma_puts_no_space_before_text() {
        let mut gemma = source();
        for text in ["  ", "\n\n", "\u{2581}b"] {
            gemma.tokens.push(text.to_owned());
            gemma.scores.as_mut().unwrap().push(-1000.0);
            gemma.token_types.as_mut().unwrap().push(4);
        }
        let t = tokenizer(VocabSource { add_space_prefix: Some(false), ..gemma });
        assert_eq!(t.encode("a  b\n\nab", true).unwrap(), [1, 6, 14, 7, 15, 9]);
        assert_eq!(t.decode(&[6, 14, 7, 15, 9]), "a  b\n\nab");
    }

    /// Phi-3: white space after a special token is not the text's.
    #[test]
    fn special_tokens_may_swallow_the_white_space_after_them() {
        let t = tokenizer(VocabSource { specials_swallow_space: true, ..source() });
        assert_eq!(t.encode("abc</s>\n abc", false).unwrap(), [13, 2, 13]);
        assert_eq!(t.encode("abc</s>\n", false).unwrap(), [13, 2]);
        // The token that begins a text leaves it alone.
        assert_eq!(t.encode("<s> a", false).unwrap(), [1, 5, 11]);
        let plain = tokenizer(source());
        assert_eq!(plain.encode("abc</s> a", false).unwrap(), [13, 2, 5, 11]);
    }

    #[test]
    fn a_character_outside_the_vocabulary_falls_back_to_its_bytes_then_to_unknown() {
        let t = tokenizer(VocabSource { add_space_prefix: Some(false), ..source() });
        assert_eq!(t.encode("éb", false).unwrap(), [3, 4, 7]);
        assert_eq!(t.decode(&[3, 4, 7]), "éb");
        assert_eq!(t.encode("z", false).unwrap(), [0]);
        let strict = VocabSource { unknown: Some(u32::MAX), ..source() };
        let error = tokenizer(strict).encode("z", false).unwrap_err();
        assert!(
            matches!(&error, Error::InvalidModel { defect: Defect::BadValue, why, .. }
                if why.contains("0x7A")),
            "{error}"
        );
    }

    #[test]
    fn malformed_byte_spellings_are_ordinary_tokens() {
        let mut odd = source();
        for (id, text) in [(3, "<0x-1>"), (4, "<0xZZ>"), (5, "<0x1>")] {
            odd.tokens[id] = text.to_owned();
        }
        let t = tokenizer(VocabSource { add_space_prefix: Some(false), ..odd });
        assert_eq!(t.encode("é", false).unwrap(), [0, 0]);
        assert_eq!(t.decode(&[3, 4, 5]), "<0x-1><0xZZ><0x1>");
    }

    #[test]
    fn missing_or_nan_scores_are_refused() {
        let nan = source().scores.map(|mut s| {
            s[7] = f32::NAN;
            s
        });
        for scores in [None, nan] {
            let error =
                Tokenizer::new(VocabSource { scores, ..source() }, Path::new("x")).unwrap_err();
            assert!(
                matches!(error, Error::InvalidModel { defect: Defect::BadVocab, ref at, .. }
                    if at == "tokenizer.ggml.scores"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_long_run_that_merges_to_the_end_takes_linear_time() {
        let mut grown = source();
        for power in 0..12 {
            grown.tokens.push("Z".repeat(1 << power));
            grown.scores.as_mut().unwrap().push(-(power as f32));
            grown.token_types.as_mut().unwrap().push(1);
        }
        let t = tokenizer(VocabSource { add_space_prefix: Some(false), ..grown });
        assert_eq!(t.encode("ZZZ", false).unwrap(), [15, 14], "of equal scores the leftmost");
        let start = std::time::Instant::now();
        assert_eq!(t.encode(&"Z".repeat(131_072), false).unwrap(), vec![25; 64]);
        assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
    }
}
