//! The tokenizer of a folder: `tokenizer.json` through the crate `tokenizers`, and what the files
//! beside it say of special tokens and chat.
//!
//! Encoding is the crate's. Decoding is this module's own table of bytes per token, so that text
//! can be streamed; it is made for the two kinds of vocabulary that published models have, byte
//! level and SentencePiece with byte fallback.

use super::byte_level::Alphabet;
use super::pattern::is_linear;
use super::special::SpecialTokens;
use super::vocabulary::{byte_value, ends_text};
use super::{Model, Tokenizer, spm};
use crate::checkpoint::{json_place, read_small_file, stands};
use crate::error::{Defect, Error, Result};
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// Most bytes of `tokenizer.json`; the largest published ones have a quarter of it.
const TOKENIZER_CAP: u64 = 128 << 20;
/// Most bytes of the other files.
const CONFIG_CAP: u64 = 16 << 20;
/// Most steps of normalising, splitting and decoding together, counted as JSON values.
const STEP_CAP: usize = 1024;
/// Ids are below this.
const ID_CAP: u32 = 1 << 22;

const FILE: &str = "tokenizer.json";

/// What is read of `tokenizer.json` beside the crate.
#[derive(Deserialize)]
struct Shape {
    model: Kind,
    #[serde(default)]
    decoder: Value,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(Deserialize)]
struct Kind {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
}

/// `tokenizer_config.json`, `config.json` and `generation_config.json`, as far as they matter.
#[derive(Default, Deserialize)]
struct Beside {
    #[serde(default)]
    bos_token: Value,
    #[serde(default)]
    eos_token: Value,
    #[serde(default)]
    eos_token_id: Value,
    #[serde(default)]
    add_bos_token: Option<bool>,
    #[serde(default)]
    chat_template: Value,
}

impl Tokenizer {
    /// The tokenizer of the files in `folder`.
    pub(super) fn from_folder(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let bad = |at: &str, place: Option<u64>, why: String| {
            Error::invalid(&path, at, place, Defect::BadVocab, why)
        };
        let bytes = read_small_file(&path, TOKENIZER_CAP)?;
        let shape: Shape = serde_json::from_slice(&bytes)
            .map_err(|e| bad("file", Some(json_place(&bytes, &e)), e.to_string()))?;
        check(&path, &shape)?;
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|e| bad("model", None, format!("is refused: {e}")))?;
        let beside = beside(folder, "tokenizer_config.json")?;
        let table = table(&inner, &shape, &path)?;

        let id = |text: &str| inner.token_to_id(text);
        let token = |value: &Value| text_of(value).and_then(|text| id(&text));
        let (bos, eos) = (token(&beside.bos_token), token(&beside.eos_token));
        let mut ends: Vec<u32> = eos.into_iter().collect();
        for file in ["config.json", "generation_config.json"] {
            let said = self::beside(folder, file)?.eos_token_id;
            let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
            ends.extend(one(&said));
            ends.extend(said.as_array().into_iter().flatten().filter_map(one));
        }
        ends.extend(shape.added_tokens.iter().filter(|t| ends_text(&t.content)).map(|t| t.id));
        ends.sort_unstable();
        ends.dedup();

        let begins = || inner.encode_fast("", true).ok().and_then(|e| e.get_ids().first().copied());
        let add_bos = match beside.add_bos_token {
            Some(add) => add,
            // The step after encoding puts it there.
            None => bos.is_some() && begins() == bos,
        };
        let (chat_template, template_at) = template(folder, &beside)?;
        Ok(Self {
            model: Model::Json(Box::new(inner)),
            specials: SpecialTokens::new(std::iter::empty()),
            swallowing: HashSet::new(),
            bytes: table,
            bos,
            eos,
            ends,
            add_bos,
            chat_template,
            template_at,
            path,
        })
    }
}

/// A text, or an object with the text under `content`.
fn text_of(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

fn beside(folder: &Path, file: &str) -> Result<Beside> {
    let path = folder.join(file);
    if !stands(&path)? {
        return Ok(Beside::default());
    }
    let bytes = read_small_file(&path, CONFIG_CAP)?;
    serde_json::from_slice(&bytes).map_err(|e| {
        let offset = Some(json_place(&bytes, &e));
        Error::invalid(&path, "file", offset, Defect::BadType, e.to_string())
    })
}

/// The chat template, and where it stands.
fn template(folder: &Path, beside: &Beside) -> Result<(Option<String>, &'static str)> {
    let file = "chat_template.jinja";
    let path = folder.join(file);
    if stands(&path)? {
        let bytes = read_small_file(&path, CONFIG_CAP)?;
        let text = String::from_utf8(bytes).map_err(|_| {
            Error::invalid(&path, "file", None, Defect::BadString, "the template is not UTF-8")
        })?;
        return Ok((Some(text), file));
    }
    let named = |one: &&Value| one.get("name").and_then(Value::as_str) == Some("default");
    let text = match &beside.chat_template {
        Value::Array(all) => all.iter().find(named).and_then(|one| one.get("template")),
        other => Some(other),
    };
    let text = text.and_then(Value::as_str).map(str::to_owned);
    Ok((text, "chat_template of tokenizer_config.json"))
}

/// That the crate is given nothing that takes it long or that this module cannot decode.
fn check(path: &Path, shape: &Shape) -> Result<()> {
    // Files of the first years do not name the model.
    let kind = shape.model.name.as_deref().unwrap_or("BPE");
    if kind != "BPE" {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            at: "model.type".to_owned(),
            what: format!("tokenizer \"{}\"", kind.escape_debug()),
            instead: "\"BPE\" is; token ids can be given instead of text".to_owned(),
        });
    }
    let steps: usize =
        [&shape.normalizer, &shape.pre_tokenizer, &shape.decoder].into_iter().map(count).sum();
    if steps > STEP_CAP {
        let why = format!("{steps} values describe how text is cut, at most {STEP_CAP} are read");
        return Err(Error::invalid(path, "pre_tokenizer", None, Defect::BadCount, why));
    }
    for (at, value) in [
        ("normalizer", &shape.normalizer),
        ("pre_tokenizer", &shape.pre_tokenizer),
        ("decoder", &shape.decoder),
    ] {
        if let Some(pattern) = patterns(value).into_iter().find(|p| !is_linear(p)) {
            return Err(Error::Unsupported {
                path: path.to_owned(),
                at: at.to_owned(),
                what: format!("the pattern \"{}\"", pattern.escape_debug()),
                instead:
                    "patterns without looks around (but for the alternative \\s+(?!\\S)), back \
                          references and atomic groups are; token ids can be given instead of text"
                        .to_owned(),
            });
        }
    }
    let mut ids = HashSet::new();
    match shape.added_tokens.iter().find(|t| !ids.insert(t.id)) {
        Some(twice) => {
            let why = format!("id {} is given to two tokens", twice.id);
            Err(Error::invalid(path, "added_tokens", None, Defect::Duplicate, why))
        }
        None => Ok(()),
    }
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(items) => items.values().map(count).sum(),
        _ => 0,
    }
}

/// Every text under `"Regex"` in `value`.
fn patterns(value: &Value) -> Vec<&str> {
    match value {
        Value::Array(items) => items.iter().flat_map(patterns).collect(),
        Value::Object(items) => {
            let own = items.get("Regex").and_then(Value::as_str);
            own.into_iter().chain(items.values().flat_map(patterns)).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether `value` has `{"type": kind}` somewhere.
fn has(value: &Value, kind: &str) -> bool {
    match value {
        Value::Array(items) => items.iter().any(|v| has(v, kind)),
        Value::Object(items) => {
            items.get("type").and_then(Value::as_str) == Some(kind)
                || items.values().any(|v| has(v, kind))
        }
        _ => false,
    }
}

/// The bytes of every token; U+FFFD for an id that none has.
fn table(inner: &tokenizers::Tokenizer, shape: &Shape, path: &Path) -> Result<Vec<Box<[u8]>>> {
    let byte_level = has(&shape.decoder, "ByteLevel");
    let pieces = ["Metaspace", "ByteFallback", "Replace"].iter().any(|k| has(&shape.decoder, k));
    if !byte_level && !pieces {
        return Err(Error::Unsupported {
            path: path.to_owned(),
            at: "decoder".to_owned(),
            what: "a decoder that is neither byte level nor SentencePiece's".to_owned(),
            instead: "token ids can be given instead of text".to_owned(),
        });
    }
    let vocabulary = inner.get_vocab(true);
    let bad = |why: String| Error::invalid(path, "model.vocab", None, Defect::BadVocab, why);
    let last = vocabulary.values().copied().max().ok_or_else(|| bad("has no tokens".to_owned()))?;
    if last >= ID_CAP {
        return Err(bad(format!("has an id {last}, expected ids below {ID_CAP}")));
    }
    let hole = || "\u{fffd}".as_bytes().to_vec().into_boxed_slice();
    let mut table = vec![hole(); last as usize + 1];
    let added: HashSet<u32> = shape.added_tokens.iter().map(|t| t.id).collect();
    let alphabet = Alphabet::new();
    for (text, id) in &vocabulary {
        let bytes = match byte_value(text) {
            _ if added.contains(id) => None,
            _ if byte_level => alphabet.bytes(text),
            Some(byte) => Some(vec![byte]),
            None => Some(text.replace(spm::SPACE, " ").into_bytes()),
        };
        table[*id as usize] = bytes.unwrap_or_else(|| text.as_bytes().to_vec()).into_boxed_slice();
    }
    Ok(table)
}
