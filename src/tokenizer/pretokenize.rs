//! Pre-tokenizers: how text is cut into pieces before byte pairs are merged.
//!
//! A family is a row of [`FAMILIES`]: the values of `tokenizer.ggml.pre` that name it and a
//! sequence of stages. A stage's pattern is searched from left to right in every piece that the
//! stage before left; each match and each gap between matches becomes a piece.
//!
//! The published patterns end in `\s+(?!\S)|\s+`: a run of white space leaves its last character
//! to the word that follows. The look-ahead forces a backtracking matcher, whose stack and step
//! limits a long run exceeds. Here the patterns end in plain `\s+`, and [`Trailing`] hands the
//! last character back after the match, so every pattern is a regular expression without
//! look-around and is searched in linear time.
//!
//! Source of the patterns: the models' own `tokenizer.json`, and llama.cpp's table of names.

use std::path::Path;
use tokenizers::utils::SysRegex;

use crate::error::{Error, Result};

/// What happens to a match that is white space only and stands before other text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trailing {
    /// The pattern has no look-ahead: the match stands.
    Keep,
    /// `\s+(?!\S)|\s+`: the last character is handed back if it is not the only one.
    GiveBack,
    /// The same after `\s*[\r\n]+`: a match that ends in a line break stands.
    GiveBackAfterNewlines,
}

/// One pattern of a sequence.
#[derive(Clone, Copy, Debug)]
struct Stage {
    pattern: &'static str,
    trailing: Trailing,
}

/// A pre-tokenizer and what the models that use it take for granted.
#[derive(Debug)]
pub(super) struct Family {
    /// Values of `tokenizer.ggml.pre`.
    names: &'static [&'static str],
    stages: &'static [Stage],
    /// A piece that is itself a token becomes that token, whatever the merges say.
    pub(super) ignore_merges: bool,
    /// Whether a prompt begins with the BOS token when the file does not say.
    pub(super) add_bos: bool,
}

macro_rules! stage {
    ($trailing:ident, $($part:expr),+) => {
        Stage { pattern: concat!($($part),+), trailing: Trailing::$trailing }
    };
}
/// Contractions in either case.
macro_rules! contraction {
    () => {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    };
}
/// GPT-2: contractions, then words, numbers and symbols with one space before them.
macro_rules! gpt2 {
    () => {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
    };
}
/// Words that tell upper case from lower case, each part optional in turn.
macro_rules! cased_word {
    ($suffix:expr) => {
        concat!(
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
            $suffix,
            r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
            $suffix
        )
    };
}
/// Cased letters as DeepSeek LLM lists them: fewer than today's `\p{Lu}\p{Ll}\p{Lt}`.
macro_rules! cased_letters {
    () => {
        "A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\
         \u{1c4}-\u{293}\u{295}-\u{2af}\u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\
         \u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\u{3a3}-\u{3f5}\
         \u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\
         \u{13a0}-\u{13f5}\u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\
         \u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\u{1e00}-\u{1f15}\
         \u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\
         \u{1f5b}\u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\
         \u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\
         \u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\
         \u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\
         \u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\u{213c}-\u{213f}\u{2145}-\u{2149}\
         \u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\u{2ceb}-\u{2cee}\
         \u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\
         \u{a771}-\u{a787}\u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\
         \u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\u{10400}-\u{1044f}\
         \u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\
         \u{118a0}-\u{118df}\u{1e900}-\u{1e943}"
    };
}
/// Line breaks with the white space before them, then other white space.
macro_rules! spaces {
    () => {
        r"|\s*[\r\n]+|\s+"
    };
}
/// Symbols with one space before and line breaks after, then [`spaces!`].
macro_rules! symbols {
    () => {
        concat!(r"| ?[^\s\p{L}\p{N}]+[\r\n]*", spaces!())
    };
}
/// [`symbols!`], where slashes are taken along with the line breaks.
macro_rules! symbols_slash {
    () => {
        concat!(r"| ?[^\s\p{L}\p{N}]+[\r\n/]*", spaces!())
    };
}

/// The name under which a file without `tokenizer.ggml.pre` is split.
const DEFAULT: &str = "default";

static FAMILIES: &[Family] = &[
    Family {
        names: &[
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
        ],
        stages: &[stage!(
            GiveBackAfterNewlines,
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            symbols!()
        )],
        ignore_merges: true,
        add_bos: true,
    },
    Family {
        // The same pieces, without what the models of the first row take for granted.
        names: &["dbrx", "smaug-bpe"],
        stages: &[stage!(
            GiveBackAfterNewlines,
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            symbols!()
        )],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"],
        stages: &[stage!(
            GiveBackAfterNewlines,
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            symbols!()
        )],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["qwen35"],
        stages: &[stage!(
            GiveBackAfterNewlines,
            contraction!(),
            r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            spaces!()
        )],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
        stages: &[stage!(Keep, r"\p{N}"), stage!(GiveBack, gpt2!())],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &[
            "gpt-2",
            "phi-2",
            "mellum",
            "modern-bert",
            "roberta-bpe",
            "olmo",
            "mpt",
            "jais",
            "gigachat",
            "a.x-4.0",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "trillion",
            "granite-docling",
        ],
        stages: &[stage!(GiveBack, gpt2!())],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &[DEFAULT],
        stages: &[
            stage!(Keep, r"[\p{P}\$\+<=>\^~\|]+"),
            stage!(GiveBack, gpt2!()),
            stage!(Keep, r"\p{N}+"),
            stage!(Keep, r"[0-9][0-9][0-9]"),
        ],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["tekken"],
        stages: &[stage!(GiveBackAfterNewlines, cased_word!(""), r"|\p{N}", symbols_slash!())],
        ignore_merges: true,
        add_bos: true,
    },
    Family {
        names: &["gpt-4o", "llama4", "kanana2", "talkie"],
        stages: &[stage!(
            GiveBackAfterNewlines,
            cased_word!(concat!(contraction!(), "?")),
            r"|\p{N}{1,3}",
            symbols_slash!()
        )],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["deepseek-llm"],
        stages: &[
            stage!(Keep, r"[\r\n]"),
            stage!(Keep, r"\s?[", cased_letters!(), "]+"),
            // ASCII punctuation, the same in full width, quotation marks, ideographic stops.
            stage!(
                Keep,
                "\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+"
            ),
            stage!(Keep, r"\s+$"),
            stage!(Keep, "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
            stage!(Keep, r"\p{N}+"),
        ],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["deepseek-coder"],
        stages: &[
            stage!(Keep, r"[\r\n]"),
            stage!(Keep, r"\s?\p{L}+"),
            stage!(Keep, r"\s?\p{P}+"),
            stage!(Keep, "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+"),
            stage!(Keep, r"\p{N}"),
        ],
        ignore_merges: false,
        add_bos: false,
    },
    Family {
        names: &["deepseek-v3"],
        stages: &[
            stage!(Keep, r"\p{N}{1,3}"),
            // Han, Hiragana, Katakana.
            stage!(Keep, "[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
            stage!(
                GiveBackAfterNewlines,
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
                r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
                spaces!()
            ),
        ],
        ignore_merges: false,
        add_bos: false,
    },
];

/// The row for a value of `tokenizer.ggml.pre`; an absent one is warned about and split as
/// `default`, which is what files without the key were made for.
///
/// # Errors
/// [`Error::Unsupported`] for a name that no row has: other pieces would be other ids.
pub(super) fn family(pre: Option<&str>, path: &Path) -> Result<&'static Family> {
    let key = "tokenizer.ggml.pre";
    if pre.is_none() {
        log::warn!(
            "{key} is missing; text is split as for \"default\" and may give other ids than the \
             model was trained on"
        );
    }
    let name = pre.unwrap_or(DEFAULT);
    FAMILIES.iter().find(|family| family.names.contains(&name)).ok_or_else(|| {
        let shown: String = name.chars().take(64).collect();
        Error::Unsupported {
            path: path.to_owned(),
            at: key.to_owned(),
            what: format!("pre-tokenizer {shown:?}"),
            instead: "token ids can be given instead of text: --prompt-ids 1,2,3".to_owned(),
        }
    })
}

/// A family with its patterns compiled.
#[derive(Debug)]
pub(super) struct Splitter {
    stages: Vec<(SysRegex, Trailing)>,
}

impl Splitter {
    /// Compiles a family's patterns.
    pub(super) fn new(family: &Family) -> Result<Self> {
        let compile = |stage: &Stage| {
            SysRegex::new(stage.pattern)
                .map(|regex| (regex, stage.trailing))
                .map_err(|e| Error::Internal(format!("pattern {:?}: {e}", stage.pattern)))
        };
        Ok(Self { stages: family.stages.iter().map(compile).collect::<Result<_>>()? })
    }

    /// The pieces of `text`: in order, none empty, and together the whole text.
    pub(super) fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = Vec::new();
        if !text.is_empty() {
            pieces.push(text);
        }
        for (regex, trailing) in &self.stages {
            let mut finer = Vec::with_capacity(pieces.len());
            for piece in pieces {
                split_once(regex, *trailing, piece, &mut finer);
            }
            pieces = finer;
        }
        pieces
    }
}

fn split_once<'t>(regex: &SysRegex, trailing: Trailing, text: &'t str, out: &mut Vec<&'t str>) {
    let mut rest = text;
    while let Some((start, end)) = regex.find_iter(rest).next() {
        let end = end - handed_back(trailing, &rest[start..end], &rest[end..]);
        if end == 0 {
            break;
        }
        if start > 0 {
            out.push(&rest[..start]);
        }
        if end > start {
            out.push(&rest[start..end]);
        }
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        out.push(rest);
    }
}

/// Bytes at the end of `matched` that belong to the next match: `\s+(?!\S)` without look-ahead.
fn handed_back(trailing: Trailing, matched: &str, after: &str) -> usize {
    let stands = match trailing {
        Trailing::Keep => true,
        Trailing::GiveBack => false,
        Trailing::GiveBackAfterNewlines => matched.ends_with(['\r', '\n']),
    };
    if stands || after.is_empty() || !matched.chars().all(char::is_whitespace) {
        return 0;
    }
    match matched.chars().next_back() {
        Some(last) if last.len_utf8() < matched.len() => last.len_utf8(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
