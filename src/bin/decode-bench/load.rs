//! From flags to a session: which model, which backend, with what fallback.

use crate::args::{Backend, EngineArgs, Kv, ModeArg, ModelArgs};
use crate::environment::Environment;
use crate::interrupt;
use crate::output::note;
use crate::progress::Progress;
use decode_graph::checkpoint::{Checkpoint, SyntheticSpec};
use decode_graph::error::{Error, Result};
use decode_graph::ops::{KvType, Sampling};
use decode_graph::session::{BackendChoice, DebugLevel, DecodeSession, Mode, SessionOptions};

/// What is measured on a GPU when no model is named.
const DEFAULT_ON_GPU: &str = "llama-3.2-1b:q4_k_m";
/// As [`DEFAULT_ON_GPU`], where the CPU must do it.
const DEFAULT_ON_CPU: &str = "tiny";

/// The model that the flags name, if they name one.
pub(crate) fn named(args: &ModelArgs) -> Result<Option<Checkpoint>> {
    match (&args.model, &args.synthetic) {
        (Some(path), _) => Checkpoint::open(path).map(Some),
        (None, Some(spec)) => synthetic(spec).map(Some),
        (None, None) => Ok(None),
    }
}

/// The model that the flags name; one must be named.
pub(crate) fn required(args: &ModelArgs) -> Result<Checkpoint> {
    named(args)?.ok_or_else(|| {
        let what = "which model? -m FILE, or --synthetic SHAPE[:QUANT] for seeded random weights";
        Error::Usage(what.to_owned())
    })
}

fn synthetic(spec: &str) -> Result<Checkpoint> {
    Checkpoint::synthetic(&SyntheticSpec::parse(spec)?)
}

/// A session of the named model, or of the default one, with a cache of `capacity` positions.
pub(crate) fn session(
    model: Option<Checkpoint>,
    args: &EngineArgs,
    capacity: u32,
    environment: &Environment,
) -> Result<(Checkpoint, DecodeSession)> {
    sampling_session(model, args, capacity, None, environment)
}

/// As [`session`], choosing tokens by `sampling`.
pub(crate) fn sampling_session(
    model: Option<Checkpoint>,
    args: &EngineArgs,
    capacity: u32,
    sampling: Option<Sampling>,
    environment: &Environment,
) -> Result<(Checkpoint, DecodeSession)> {
    warn_ignored(args);
    let base = SessionOptions { sampling, ..options(args, capacity, environment)? };
    let on = |backend, model: Option<Checkpoint>, default| {
        let model = model.map_or_else(|| synthetic(default), Ok)?;
        let session = open(&model, &SessionOptions { backend, ..base.clone() }, environment)?;
        Ok((model, session))
    };
    let cuda = || BackendChoice::Cuda;
    match args.backend {
        Backend::Cuda => on(cuda(), model, DEFAULT_ON_GPU),
        Backend::Cpu => on(BackendChoice::Cpu, model, DEFAULT_ON_CPU),
        Backend::Auto => match answering_device(args.device) {
            Ok(()) => on(cuda(), model, DEFAULT_ON_GPU),
            Err(Error::NoDevice(why)) => {
                let named = if model.is_some() { "" } else { " and the tiny model" };
                note(&format!("warning: {why}: using the CPU reference{named}"));
                on(BackendChoice::Cpu, model, DEFAULT_ON_CPU)
            }
            Err(other) => Err(other),
        },
    }
}

/// Whether CUDA would work, found out before anything is loaded for it.
fn answering_device(ordinal: u32) -> Result<()> {
    decode_graph::cuda::driver::Device::get(ordinal).map(drop)
}

/// A session with exactly these options.
pub(crate) fn open(
    model: &Checkpoint,
    options: &SessionOptions,
    environment: &Environment,
) -> Result<DecodeSession> {
    let bar = Progress::bytes("loading", environment);
    let mut session = interrupt::at_once(|| {
        DecodeSession::new(model, options, &mut |done, total| bar.set(done, total))
    })?;
    if options.debug != DebugLevel::Off {
        session.debug_to(Box::new(std::io::stderr()));
    }
    Ok(session)
}

/// The flags as options of a session; the backend is left open.
pub(crate) fn options(
    args: &EngineArgs,
    capacity: u32,
    environment: &Environment,
) -> Result<SessionOptions> {
    let debugging = environment.debug != DebugLevel::Off;
    let mode = match args.mode {
        ModeArg::Graph if !debugging => Mode::Graph,
        ModeArg::Graph | ModeArg::Eager => Mode::Eager,
        ModeArg::Both => {
            return Err(Error::Usage(
                "only run measures --mode both, without GPU_DEBUG".to_owned(),
            ));
        }
    };
    Ok(SessionOptions {
        backend: BackendChoice::Auto,
        mode,
        device: args.device,
        capacity,
        kv: kv_type(args)?,
        fused: !args.no_fuse,
        sampling: None,
        debug: environment.debug,
        persistent: args.kernels.persistent(),
        trace: false,
        red_zones: false,
    })
}

/// The backend of a session, by what the session calls it.
pub(crate) fn named_backend(name: &str) -> BackendChoice {
    if name == "cuda" { BackendChoice::Cuda } else { BackendChoice::Cpu }
}

fn kv_type(args: &EngineArgs) -> Result<Option<KvType>> {
    match (args.cache_type_k, args.cache_type_v) {
        (Some(k), Some(v)) if k != v => Err(Error::Usage(
            "-ctk and -ctv differ: keys and values are cached in one type".to_owned(),
        )),
        (k, v) => Ok(k.or(v).map(Kv::element)),
    }
}

impl Kv {
    /// The library's name for it.
    pub(crate) fn element(self) -> KvType {
        match self {
            Self::F16 => KvType::F16,
            Self::F32 => KvType::F32,
        }
    }
}

fn warn_ignored(args: &EngineArgs) {
    let given = args.ignored.given();
    if !given.is_empty() {
        note(&format!("note: ignored, without a meaning here: {}", given.join(" ")));
    }
}
