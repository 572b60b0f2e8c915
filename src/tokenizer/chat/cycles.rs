//! Keeps a template from making a value that holds itself: to print or to compare it would not end
//! before the stack does, and that ends the process.
//!
//! Every value but a namespace is made of values that were there before. So a value holds itself only
//! after `{% set a.b = … %}` of something that has a namespace in it, and that is refused: whatever is
//! set goes through [`plain`] first. The engine has no place for such a check; it is written into the
//! template's text, before it is parsed.

use minijinja::value::{Value, ValueKind};
use minijinja::{Environment, ErrorKind, State};

/// Name of the check, which no template has a reason to use.
const NAME: &str = "without_namespaces";

/// Gives `engine` the check, as a function and as a filter.
pub(super) fn add_check(engine: &mut Environment<'_>) {
    engine.add_function(NAME, plain);
    engine.add_filter(NAME, plain);
}

/// The value, if there is no namespace in it.
fn plain(state: &State, value: Value) -> Result<Value, minijinja::Error> {
    let mut left = vec![value.clone()];
    while let Some(value) = left.pop() {
        state.consume_fuel(1)?;
        if value.as_object().is_some_and(|o| o.type_name().ends_with("::Namespace")) {
            let why = "a namespace may not hold a namespace";
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
        }
        match value.kind() {
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    state.consume_fuel(1)?;
                    left.push(item);
                }
            }
            ValueKind::Map => {
                for key in value.try_iter()? {
                    state.consume_fuel(1)?;
                    left.push(value.get_item(&key)?);
                }
            }
            _ => {}
        }
    }
    Ok(value)
}

/// What a tag has that sets an attribute: bytes of its text before which the check is written.
struct Place {
    /// After `=`; `None` where a block's text is set, through filters.
    value: Option<usize>,
    /// Before the end of the tag.
    end: usize,
}

/// `template` with the check around all that is set as an attribute.
///
/// Tags are looked for wherever they could begin, in comments and texts too: there the check is
/// written in vain. None is missed, and where one ends depends on nothing before it.
pub(super) fn checked(template: &str) -> String {
    let mut written: Vec<(usize, String)> = Vec::new();
    for (start, _) in template.match_indices("{%") {
        let Some(place) = place(template, start + 2) else { continue };
        match place.value {
            Some(value) => {
                written.push((value, format!(" {NAME}((")));
                written.push((place.end, "))".to_owned()));
            }
            None => written.push((place.end, format!("|{NAME} "))),
        }
    }
    written.sort_by_key(|(at, _)| *at);
    let (mut out, mut done) = (String::with_capacity(template.len()), 0);
    for (at, text) in written {
        out.push_str(template.get(done..at).unwrap_or_default());
        out.push_str(&text);
        done = at;
    }
    out.push_str(template.get(done..).unwrap_or_default());
    out
}

/// Where the tag whose text begins at byte `start` needs the check, if it sets an attribute.
fn place(template: &str, start: usize) -> Option<Place> {
    let text = template.get(start..)?;
    let inner = text.strip_prefix(['-', '+']).unwrap_or(text).trim_start();
    let rest = inner.strip_prefix("set").filter(|r| !r.starts_with(is_word))?;
    let target = rest.find(['=', '|', '%', '\'', '"'])?;
    if !rest.get(..target)?.contains('.') {
        return None;
    }
    let at = template.len() - rest.len() + target;
    let after = template.get(at + 1..)?;
    let end = at + 1 + end_of_tag(after)?;
    match template.as_bytes().get(at)? {
        b'=' => Some(Place { value: Some(at + 1), end }),
        b'|' => Some(Place { value: None, end }),
        _ => None,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Bytes of `text`, which is within a tag, before `%}` or `-%}`; texts in quotes are passed over.
fn end_of_tag(text: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (i, c) in text.char_indices() {
        match (quote, c) {
            _ if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if q == c => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '%') if text.get(i + 1..).is_some_and(|t| t.starts_with('}')) => {
                let before = text.get(..i)?;
                return Some(before.strip_suffix(['-', '+']).unwrap_or(before).len());
            }
            _ => {}
        }
    }
    None
}
