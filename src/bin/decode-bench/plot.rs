//! `plot`: results as SVG.

use crate::Outcome;
use crate::args::{PlotArgs, PlotKind};
use crate::output::print;
use decode_graph::bench::plot::{Kind, draw, natural};
use decode_graph::error::{Error, Result};

pub(crate) fn run(args: &PlotArgs) -> Result<Outcome> {
    let kind = match args.kind {
        Some(kind) => kind.kind(),
        None => natural(&args.results)?,
    };
    let svg = draw(kind, &args.results)?;
    match &args.output {
        Some(path) => std::fs::write(path, svg).map_err(|e| Error::io(path, "write", e))?,
        None => print(&svg)?,
    }
    Ok(Outcome::Done)
}

impl PlotKind {
    fn kind(self) -> Kind {
        match self {
            Self::Depth => Kind::Depth,
            Self::Trace => Kind::Trace,
            Self::Distribution => Kind::Distribution,
            Self::Kernels => Kind::Kernels,
            Self::Ab => Kind::Ab,
        }
    }
}
