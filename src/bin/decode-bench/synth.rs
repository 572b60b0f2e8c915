//! `synth`: synthetic weights as a file, for other engines to load.

use crate::Outcome;
use crate::args::SynthArgs;
use crate::environment::Environment;
use crate::output::note;
use crate::progress::Progress;
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec, write_gguf};
use decode_graph::error::Result;

pub(crate) fn run(args: &SynthArgs, environment: &Environment) -> Result<Outcome> {
    let spec = SyntheticSpec::parse(&args.spec)?;
    let spec = args.seed.map_or(spec, |seed| spec.with_seed(seed));
    let checkpoint = Checkpoint::synthetic(&spec)?;
    let bar = Progress::bytes("writing", environment);
    write_gguf(&checkpoint, &args.output, &mut |done, total| bar.set(done, total))?;
    drop(bar);
    note(&format!("wrote {spec} to {}", args.output.display()));
    Ok(Outcome::Done)
}
