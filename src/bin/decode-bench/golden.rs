//! `verify --golden`: outside truth, a file of logits along a text and of greedy continuations.

use crate::args::EngineArgs;
use crate::environment::Environment;
use crate::output::print;
use crate::progress::Progress;
use crate::{Outcome, load};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::verify::{Golden, GoldenBounds, compare};
use std::path::Path;

pub(crate) fn run(
    path: &Path,
    model: Checkpoint,
    args: &EngineArgs,
    environment: &Environment,
) -> Result<Outcome> {
    let golden = Golden::open(path)?;
    let capacity = u32::try_from(golden.capacity())
        .map_err(|_| Error::Usage(format!("{}: too many positions", path.display())))?;
    let (_, mut session) = load::session(Some(model), args, capacity, environment)?;
    let exact = session.backend() == "cpu" && session.plan().cache.kind == KvType::F32;
    let bar = Progress::tokens("golden".to_owned(), environment, 0);
    let report = compare(&mut session, &golden, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    let text = serde_json::to_string_pretty(&report)
        .map_err(|e| Error::Internal(format!("the report is no JSON: {e}")))?;
    // The report first: what broke a bound is to be read in it.
    print(&format!("{text}\n"))?;
    report.check(if exact { &GoldenBounds::EXACT } else { &GoldenBounds::ROUNDED })?;
    Ok(Outcome::Done)
}
