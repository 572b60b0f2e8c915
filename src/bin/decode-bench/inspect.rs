//! `inspect`: what a model file holds, and whether it is served.

use crate::Outcome;
use crate::args::InspectArgs;
use crate::load;
use crate::output::{one_line, print};
use decode_graph::arch::{self, PlanOptions};
use decode_graph::checkpoint::{Checkpoint, Metadata, Value};
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::plan::fuse::fuse;
use std::collections::BTreeMap;
use std::fmt::Write;

pub(crate) fn run(args: &InspectArgs) -> Result<Outcome> {
    let mut out = String::new();
    // A file is listed also where it cannot be run; only then is it asked why.
    let opened = match &args.model.model {
        Some(path) => {
            let found = Checkpoint::inspect_only(path)?;
            let _ = writeln!(
                out,
                "file         {} ({} bytes, GGUF {})",
                path.display(),
                found.file_bytes,
                found.version
            );
            keys(&mut out, &found.metadata);
            let tensors = found.tensors.iter();
            list(
                &mut out,
                args.verbose,
                tensors
                    .map(|t| (t.name.as_str(), t.type_name.as_str(), t.shape.as_slice(), t.bytes)),
            );
            Checkpoint::open(path)
        }
        None => {
            let model = load::required(&args.model)?;
            let _ = writeln!(out, "synthetic    {}", model.path().display());
            keys(&mut out, model.metadata());
            let tensors = model.tensors().iter();
            list(
                &mut out,
                args.verbose,
                tensors
                    .map(|t| (t.name.as_str(), t.format.name(), t.shape.as_slice(), Some(t.bytes))),
            );
            Ok(model)
        }
    };
    match opened.and_then(|model| traffic(&model)) {
        Ok(lines) => out.push_str(&lines),
        // The answer to what was asked, not a failure to give it.
        Err(error @ (Error::Unsupported { .. } | Error::InvalidModel { .. })) => {
            let _ = writeln!(out, "supported    no: {}", one_line(&error.to_string()));
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

/// A tensor: name, type, shape, bytes.
type Listed<'a> = (&'a str, &'a str, &'a [u64], Option<u64>);

/// Tensors by type; with `verbose` each of them.
fn list<'a>(out: &mut String, verbose: bool, tensors: impl Iterator<Item = Listed<'a>>) {
    let mut by_type: BTreeMap<&str, (usize, u64)> = BTreeMap::new();
    for (name, kind, shape, bytes) in tensors {
        let sum = by_type.entry(kind).or_default();
        *sum = (sum.0 + 1, sum.1.saturating_add(bytes.unwrap_or(0)));
        if verbose {
            let _ = writeln!(out, "tensor       {name} {kind} {shape:?}");
        }
    }
    for (kind, (count, bytes)) in by_type {
        let _ = writeln!(out, "tensors      {kind}: {count}, {bytes} bytes");
    }
}

/// What a token costs, for a model that is served.
fn traffic(model: &Checkpoint) -> Result<String> {
    let plan = fuse(&arch::record(model, PlanOptions { capacity: 4096, kv: KvType::F16 })?);
    let (start, deep) = (plan.traffic(0), plan.traffic(4095));
    let mut out = String::from("supported    yes\n");
    let _ = writeln!(out, "read a token {} bytes of weights", start.weights);
    let _ = writeln!(
        out,
        "cache        {} bytes moved at position 0, {} at 4095 (f16)",
        start.kv, deep.kv
    );
    let _ = writeln!(out, "plan         {} steps a token", plan.steps.len());
    Ok(out)
}
