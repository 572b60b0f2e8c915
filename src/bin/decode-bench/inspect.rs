//! `inspect`: what a model file holds, and whether it is served.

use crate::Outcome;
use crate::args::InspectArgs;
use crate::load;
use crate::output::{one_line, print};
use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::{Checkpoint, Inspection, Metadata, Value};
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::plan::fuse::fuse;
use std::collections::BTreeMap;
use std::fmt::Write;

pub(crate) fn run(args: &InspectArgs) -> Result<Outcome> {
    let mut out = String::new();
    // Files are listed also where they cannot be run; only then is it asked why.
    let (found, opened) = match &args.model.model {
        Some(path) => {
            let found = Checkpoint::inspect_only(path)?;
            let (files, bytes) = (found.files, found.file_bytes);
            let many = if files == 1 { String::new() } else { format!(" in {files} files") };
            let container = &found.container;
            let _ =
                writeln!(out, "file         {} ({container}{many}, {bytes} bytes)", path.display());
            (found, Checkpoint::open(path))
        }
        None => {
            let model = load::required(&args.model)?;
            let _ = writeln!(out, "synthetic    {}", model.path().display());
            (model.inspect(), Ok(model))
        }
    };
    let architecture = found.architecture().unwrap_or("not said");
    let _ = writeln!(out, "architecture {}", one_line(architecture));
    keys(&mut out, &found.metadata);
    list(&mut out, args.verbose, &found);
    match opened.and_then(|model| plan(&model)) {
        Ok(lines) => out.push_str(&lines),
        // The answer to what was asked, not a failure to give it.
        Err(error @ (Error::Unsupported { .. } | Error::InvalidModel { .. })) => {
            let _ = writeln!(out, "supported    no: {}", one_line(&error.to_string()));
            blocks(&mut out, &found);
        }
        Err(other) => return Err(other),
    }
    print(&out)?;
    Ok(Outcome::Done)
}

/// Scalars as they are; of a list its length.
fn keys(out: &mut String, metadata: &Metadata) {
    for entry in metadata.entries() {
        let value = match entry.value {
            Value::String(text) => {
                let text = String::from_utf8_lossy(text);
                let short: String = text.chars().take(60).collect();
                let more = if short.len() < text.len() { "…" } else { "" };
                format!("\"{}\"{more}", one_line(&short))
            }
            Value::Array(array) => format!("[{} {}]", array.len(), array.element_type()),
            Value::U8(x) => x.to_string(),
            Value::I8(x) => x.to_string(),
            Value::U16(x) => x.to_string(),
            Value::I16(x) => x.to_string(),
            Value::U32(x) => x.to_string(),
            Value::I32(x) => x.to_string(),
            Value::U64(x) => x.to_string(),
            Value::I64(x) => x.to_string(),
            Value::F32(x) => x.to_string(),
            Value::F64(x) => x.to_string(),
            Value::Bool(x) => x.to_string(),
        };
        let _ = writeln!(out, "key          {} = {value}", entry.key);
    }
}

/// Tensors by type, and what a token reads of them; with `verbose` each of them.
fn list(out: &mut String, verbose: bool, found: &Inspection) {
    let mut by_type: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for t in &found.tensors {
        let sum = by_type.entry(&t.type_name).or_default();
        *sum = (sum.0 + 1, sum.1.saturating_add(t.bytes.unwrap_or(0)));
        if verbose {
            let _ =
                writeln!(out, "tensor       {} {} {:?}", one_line(&t.name), t.type_name, t.shape);
        }
    }
    let read = found.read_per_token();
    for (kind, (count, bytes)) in by_type {
        let a_token = read.get(kind).copied().unwrap_or(0);
        let _ = writeln!(
            out,
            "tensors      {kind}: {count}, {bytes} bytes, of them {a_token} read a token"
        );
    }
    let sum = read.values().fold(0u64, |sum, n| sum.saturating_add(*n));
    let _ = writeln!(out, "read a token {sum} bytes of weights");
}

/// Everything that is told from types and architecture alone: the error above is the first of them.
fn blocks(out: &mut String, found: &Inspection) {
    // A folder's architecture is a `model_type`, of which the error has the list.
    let named = found.container.starts_with("GGUF").then(|| found.architecture()).flatten();
    if let Some(name) = named.filter(|name| !arch::SUPPORTED.contains(name)) {
        let known = arch::SUPPORTED.join(", ");
        let name = one_line(name);
        let _ = writeln!(out, "blocked by   architecture {name}; supported are {known}");
    }
    let mut types: BTreeMap<&str, (usize, &str)> = BTreeMap::new();
    for t in found.tensors.iter().filter(|t| t.format.is_none()) {
        types.entry(&t.type_name).or_insert((0, &t.name)).0 += 1;
    }
    for (kind, (count, first)) in types {
        let first = one_line(first);
        let _ = writeln!(out, "blocked by   type {kind} of {count} tensors, the first is {first}");
    }
}

/// What a model that is served does for a token.
fn plan(model: &Checkpoint) -> Result<String> {
    let plan = fuse(&arch::record(model, PlanOptions { capacity: 4096, kv: KvType::F16 })?);
    let (start, deep) = (plan.traffic(0), plan.traffic(4095));
    let mut out = String::from("supported    yes\n");
    let _ = writeln!(
        out,
        "cache        {} bytes moved at position 0, {} at 4095 (f16)",
        start.kv, deep.kv
    );
    let _ = writeln!(out, "plan         {} steps a token", plan.steps.len());
    Ok(out)
}
