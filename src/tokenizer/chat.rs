//! Chat templates: a conversation as the text that a model was trained on.
//!
//! A template is a program in Jinja that comes with the model's file, so it is not trusted. It can
//! do nothing but render: there is no file, no other template and no function beyond those of the
//! language, `raise_exception` and `strftime_now`. Its work, and the data that it makes, are paid
//! from one budget ([`fuel`]): about 64 bytes or one instruction a unit. That misses a list that
//! holds another one twice, which holds another one twice, and so on: to print or to compare it is
//! one instruction. So the template runs on a thread of its own, and is given up when it takes
//! longer than [`MOST_TIME`], or the process more memory than [`MOST_MEMORY`]. The stack of that
//! thread fits the deepest value that the budget can make; no value may hold itself (`cycles`).
//!
//! Language and variables are those of `apply_chat_template` of the `transformers` project:
//! `trim_blocks` and `lstrip_blocks`, methods of Python's types, `messages`, `tools` and `documents`
//! (none), `bos_token`, `eos_token`, `add_generation_prompt`.

mod cycles;

use crate::error::{Defect, Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, ErrorKind, State, context};
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest template that is run, bytes; published ones have less than a tenth of it.
pub(super) const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Units that every rendering may use: published templates need less than a hundredth.
const BASE_FUEL: u64 = 250_000;
/// Longest rendered text, bytes beyond 8 times the conversation's.
const BASE_OUTPUT: usize = 1 << 20;
/// Stack of the thread that renders, bytes of address space. A unit of fuel makes at most one level
/// of nesting, and dropping a level takes less than a kilobyte.
const STACK: usize = 512 << 20;
/// Longest that a rendering may take; published templates take milliseconds.
const MOST_TIME: Duration = Duration::from_secs(3);
/// Most memory that the process may gain meanwhile, bytes.
const MOST_MEMORY: u64 = 256 << 20;
/// How often both are looked at.
const LOOK: Duration = Duration::from_millis(5);
/// Deepest value that `tojson` writes.
const JSON_DEPTH: u32 = 64;

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What a rendering needs to know beside the messages.
#[derive(Clone, Copy, Debug, Default)]
pub struct ChatContext<'a> {
    /// Text of the token that begins a text, empty for none.
    pub bos: &'a str,
    /// Text of the token that ends one, empty for none.
    pub eos: &'a str,
    /// Whether the text ends with the start of the assistant's turn.
    pub add_generation_prompt: bool,
    /// What `strftime_now` tells: seconds since 1970-01-01 00:00 UTC.
    pub now: u64,
}

/// Units for a conversation of `bytes` bytes: the base, and to copy all of it some sixty times.
fn fuel(bytes: usize) -> u64 {
    BASE_FUEL.saturating_add(bytes as u64)
}

/// Renders `template`, which stands under `at` of the file at `path`.
///
/// A template that is given up because of its time or memory goes on in its thread until the
/// process ends: whoever gets that error should not stay around.
///
/// # Errors
/// [`Defect::BadTemplate`] when the template is over-long, no Jinja, fails, or uses up its budget;
/// [`Error::Usage`] with the template's own words when it refuses the messages.
pub fn render_chat(
    template: &str,
    messages: &[Message],
    chat: ChatContext<'_>,
    path: &Path,
    at: &str,
) -> Result<String> {
    let bad = |why: String| Error::invalid(path, at, None, Defect::BadTemplate, why);
    if template.len() > MAX_TEMPLATE_BYTES {
        let bytes = template.len();
        return Err(bad(format!("has {bytes} bytes, at most {MAX_TEMPLATE_BYTES} are run")));
    }
    let (start, before) = (Instant::now(), resident_bytes());
    let (send, receive) = channel();
    let refusal = Arc::new(Mutex::new(None));
    let (said, template, messages) = (Arc::clone(&refusal), template.to_owned(), messages.to_vec());
    let (bos, eos) = (chat.bos.to_owned(), chat.eos.to_owned());
    let ChatContext { add_generation_prompt, now, .. } = chat;
    let run = move || {
        let chat = ChatContext { bos: &bos, eos: &eos, add_generation_prompt, now };
        // Nobody waits any more when the time is over.
        let _ = send.send(render(&template, &messages, chat, &said));
    };
    std::thread::Builder::new()
        .name("chat template".to_owned())
        .stack_size(STACK)
        .spawn(run)
        .map_err(|e| Error::io(path, "start a thread for the template", e))?;
    let rendered = loop {
        match receive.recv_timeout(LOOK) {
            Ok(rendered) => break rendered,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(Error::Internal("the template engine panicked".to_owned()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if start.elapsed() > MOST_TIME || resident_bytes().saturating_sub(before) > MOST_MEMORY {
            return Err(bad(OVER_BUDGET.to_owned()));
        }
    };
    rendered.map_err(|e| match refusal.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(words) => Error::Usage(format!("the model's chat template refuses this: {words}")),
        None => bad(explain(&e)),
    })
}

/// Memory of this process, bytes; 0 where the system does not say.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    // Pages of 4 KiB: where they are larger, the limit is looser.
    pages.unwrap_or(0).saturating_mul(4096)
}

const OVER_BUDGET: &str = "uses more time or memory than a chat template may";

/// The engine's error in one line.
fn explain(e: &minijinja::Error) -> String {
    if e.kind() == ErrorKind::OutOfFuel {
        return OVER_BUDGET.to_owned();
    }
    let line = e.line().map(|n| format!("line {n}: ")).unwrap_or_default();
    let detail = e.detail().map(|d| format!(": {d}")).unwrap_or_default();
    // A template may put a megabyte into an error.
    format!("{line}{}{detail}", e.kind()).chars().take(400).collect()
}

fn render(
    template: &str,
    messages: &[Message],
    chat: ChatContext<'_>,
    refusal: &Arc<Mutex<Option<String>>>,
) -> Result<String, minijinja::Error> {
    let bytes = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
    let mut engine = Environment::new();
    engine.set_fuel(Some(fuel(bytes)));
    engine.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    engine.set_unknown_method_callback(method);
    engine.add_filter("tojson", tojson);
    cycles::add_check(&mut engine);
    let said = Arc::clone(refusal);
    engine.add_function("raise_exception", move |words: String| -> Result<Value, _> {
        let short = words.chars().take(400).collect();
        *said.lock().unwrap_or_else(PoisonError::into_inner) = Some(short);
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "the template raised an exception"))
    });
    let now = chat.now;
    engine.add_function("strftime_now", move |format: &str| strftime(format, now));

    let turns: Vec<Value> = messages
        .iter()
        .map(|m| context! { role => m.role.as_str(), content => m.content.as_str() })
        .collect();
    let variables = context! {
        messages => turns,
        tools => Value::from(()),
        documents => Value::from(()),
        bos_token => chat.bos,
        eos_token => chat.eos,
        add_generation_prompt => chat.add_generation_prompt,
    };
    let text = engine.template_from_str(&cycles::checked(template))?.render(variables)?;
    let most = bytes.saturating_mul(8).saturating_add(BASE_OUTPUT);
    if text.len() > most {
        let why = format!("{} bytes of text, at most {most} are taken", text.len());
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
    }
    Ok(text)
}

/// Methods of Python's strings, lists and dictionaries. They are not paid for by the engine, so
/// what they read and may make is paid before they run.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let size = |v: &Value| match v.as_str() {
        Some(text) => text.len(),
        None => v.len().unwrap_or(0).saturating_mul(64),
    };
    let mut bytes = args.iter().map(size).fold(size(value), usize::saturating_add);
    if let (Some(text), "replace") = (value.as_str(), name)
        && let (Some(old), Some(new)) = (args.first(), args.get(1))
    {
        let places = text.len() / size(old).max(1) + 1;
        bytes = bytes.saturating_add(places.saturating_mul(size(new)));
    }
    if let (Some(text), "format") = (value.as_str(), name) {
        // Widths, which are written in the text or given as numbers.
        let written = text.split(|c: char| !c.is_ascii_digit()).filter(|n| !n.is_empty());
        let widths = written.map(|n| n.parse().unwrap_or(usize::MAX));
        let given = args.iter().filter_map(|v| usize::try_from(v.clone()).ok());
        bytes = widths.chain(given).fold(bytes, usize::saturating_add);
    }
    if let (Some(gap), "join", Some(items)) = (value.as_str(), name, args.first()) {
        for item in items.try_iter()? {
            state.consume_fuel(1)?;
            bytes = bytes.saturating_add(gap.len()).saturating_add(size(&item));
        }
    }
    state.consume_fuel(bytes as u64 / 64 + 1)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`. The engine's own filter writes for HTML.
fn tojson(state: &State, value: &Value, args: Kwargs) -> Result<Value, minijinja::Error> {
    let indent = args.get::<Option<usize>>("indent")?.map(|n| n.min(16));
    args.assert_all_used()?;
    let mut out = String::new();
    write_json(state, value, indent, 0, &mut out)?;
    Ok(Value::from_safe_string(out))
}

fn write_json(
    state: &State,
    value: &Value,
    indent: Option<usize>,
    depth: u32,
    out: &mut String,
) -> Result<(), minijinja::Error> {
    let fail = |why: &'static str| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    if depth > JSON_DEPTH {
        return Err(fail("tojson: the value is nested too deeply"));
    }
    state.consume_fuel(1 + value.as_str().map_or(0, |s| s.len() as u64 / 32))?;
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let gap = |out: &mut String, first: bool, depth: u32| match indent {
        Some(n) => {
            out.push_str(if first { "\n" } else { ",\n" });
            out.push_str(&" ".repeat(n * depth as usize));
        }
        None => out.push_str(if first { "" } else { ", " }),
    };
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&value.to_string()),
        ValueKind::String => out.push_str(&quoted(value.as_str().unwrap_or_default())),
        kind @ (ValueKind::Map | ValueKind::Seq | ValueKind::Iterable) => {
            let (open, close) = if kind == ValueKind::Map { ('{', '}') } else { ('[', ']') };
            out.push(open);
            let mut first = true;
            for item in value.try_iter()? {
                gap(out, first, depth + 1);
                first = false;
                let item = if kind == ValueKind::Map {
                    let key = item.as_str().map_or_else(|| item.to_string(), str::to_owned);
                    state.consume_fuel(1 + key.len() as u64 / 32)?;
                    out.push_str(&quoted(&key));
                    out.push_str(": ");
                    value.get_item(&item)?
                } else {
                    item
                };
                write_json(state, &item, indent, depth + 1, out)?;
            }
            if let (Some(n), false) = (indent, first) {
                out.push('\n');
                out.push_str(&" ".repeat(n * depth as usize));
            }
            out.push(close);
        }
        _ => return Err(fail("tojson: a value that JSON does not have")),
    }
    Ok(())
}

/// Names that Python gives in its own locale.
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// `datetime.now().strftime(format)` at `now` seconds since 1970, in UTC.
fn strftime(format: &str, now: u64) -> Result<String, minijinja::Error> {
    let (days, second) = (now / 86_400, now % 86_400);
    let (year, month, day, of_year) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(c) = letters.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let letter = letters.next();
        let (bare, letter) = match letter {
            Some('-') => (true, letters.next()),
            other => (false, other),
        };
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        match letter {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&two(year % 100)),
            Some('m') => out.push_str(&two(month as u64)),
            Some('d') => out.push_str(&two(day)),
            Some('e') => out.push_str(&format!("{day:2}")),
            Some('j') => out.push_str(&format!("{of_year:03}")),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('H') => out.push_str(&two(hour)),
            Some('I') => out.push_str(&two((hour + 11) % 12 + 1)),
            Some('M') => out.push_str(&two(minute)),
            Some('S') => out.push_str(&two(second)),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('Z') => out.push_str("UTC"),
            Some('%') => out.push('%'),
            other => {
                let why = format!("strftime_now: %{} is not known", other.unwrap_or(' '));
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, why));
            }
        }
    }
    Ok(out)
}

/// Year, month (1 to 12), day of the month and of the year (from 1) of a day since 1970.
fn date(days: u64) -> (u64, usize, u64, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    // Whole cycles of 400 years at once: what is left is counted year by year.
    const CYCLE: u64 = 146_097;
    let (mut year, mut left) = (1970 + days / CYCLE * 400, days % CYCLE);
    let of_year = |y| if leap(y) { 366 } else { 365 };
    while left >= of_year(year) {
        left -= of_year(year);
        year += 1;
    }
    let (ordinal, mut month) = (left + 1, 1);
    for length in [31, if leap(year) { 29 } else { 28 }, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1, ordinal)
}

#[cfg(test)]
mod tests;
