//! `synth`: synthetic weights as a file, for other engines to load.

use crate::args::SynthArgs;
use crate::environment::Environment;
use crate::output::note;
use crate::progress::Progress;
use crate::{Outcome, interrupt};
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec, write_gguf_while};
use decode_graph::error::Result;
use std::ops::ControlFlow;

pub(crate) fn run(args: &SynthArgs, environment: &Environment) -> Result<Outcome> {
    let spec = SyntheticSpec::parse(&args.spec)?;
    let spec = args.seed.map_or(spec, |seed| spec.with_seed(seed));
    let checkpoint = Checkpoint::synthetic(&spec)?;
    let bar = Progress::bytes("writing", environment);
    interrupt::watch();
    write_gguf_while(&checkpoint, &args.output, &mut |done, total| {
        bar.set(done, total);
        if interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    drop(bar);
    note(&format!("wrote {spec} to {}", args.output.display()));
    Ok(Outcome::Done)
}
