//! The crate's one error type: every cause says what failed, where, and what to do about it.
//!
//! The variants are the causes a caller can act on; [`Error::exit_code`] is the contract of the
//! command line.

use std::io;
use std::path::{Path, PathBuf};

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with a model file: the class that a caller can match on.
///
/// The text that goes with it (limit, value found) is in [`Error::InvalidModel`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Defect {
    /// The file ends before the field does.
    Truncated,
    /// The first bytes are not those of the format.
    BadMagic,
    /// A version of the format that is not read.
    BadVersion,
    /// A count that the file cannot hold, or beyond the cap.
    BadCount,
    /// A string length beyond the cap, or text that must be UTF-8 and is not.
    BadString,
    /// An empty, over-long or non-ASCII key.
    BadKey,
    /// A key, tensor or entry that stands twice.
    Duplicate,
    /// A value of a type that the key does not have.
    BadType,
    /// An array of the wrong element type, length or nesting.
    BadArray,
    /// An alignment that is not a power of two within bounds.
    BadAlignment,
    /// A tensor name that is too long or has illegal characters.
    BadName,
    /// Dimensions that no weight can have.
    BadShape,
    /// A product of sizes that does not fit 64 bits.
    SizeOverflow,
    /// A tensor type id that the format does not define.
    UnknownType,
    /// A data offset outside the file, misaligned or overlapping.
    BadOffset,
    /// A required key is absent.
    MissingKey,
    /// A key's value is outside what a model can have.
    BadValue,
    /// A required tensor is absent.
    MissingTensor,
    /// A tensor is there with another shape than the configuration asks for.
    ShapeMismatch,
    /// A part of a split model is absent, stands twice or belongs to another model.
    BadSplit,
    /// A chat template is no template, fails, or asks for too much.
    BadTemplate,
    /// The vocabulary cannot be used.
    BadVocab,
    /// Not a regular file of a known model format.
    NotAModel,
}

/// Everything that can go wrong, one variant per cause a caller can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The command line or a library argument is wrong.
    #[error("{0}")]
    Usage(String),

    /// The operating system refused.
    #[error("{}: cannot {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, an infinitive: "open", "read 4096 bytes at 128".
        action: String,
        /// The operating system's word.
        #[source]
        source: io::Error,
    },

    /// The model file is malformed or does not describe a model.
    #[error("{}: {at}{}: {why}", path.display(), offset.map(|o| format!(" at byte {o}")).unwrap_or_default())]
    InvalidModel {
        /// The file.
        path: PathBuf,
        /// The field, key or tensor.
        at: String,
        /// Where in the file, bytes from its start, when known.
        offset: Option<u64>,
        /// The class of the defect.
        defect: Defect,
        /// Value found, limit, and what is expected.
        why: String,
    },

    /// A well-formed model that this crate does not run: architecture, tensor type, feature.
    #[error("{}: {at}: {what} is not supported; {instead}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key or tensor that asks for it.
        at: String,
        /// What is not supported, by name.
        what: String,
        /// What is supported, or what to do.
        instead: String,
    },

    /// No driver or no usable device.
    #[error("no usable CUDA device: {0}")]
    NoDevice(String),

    /// The device does not hold the model.
    #[error("GPU out of memory: {what} needs {need} bytes, {free} bytes are free; {advice}")]
    OutOfMemory {
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        need: u64,
        /// Bytes free at that time.
        free: u64,
        /// What to do.
        advice: String,
    },

    /// A driver call failed.
    #[error("{at}: {call} failed: {name} ({code})")]
    Driver {
        /// Plan label or activity.
        at: String,
        /// The driver entry point.
        call: &'static str,
        /// The numeric result, of any driver version.
        code: u32,
        /// The driver's own name and text for it.
        name: String,
        /// Whether the context is lost with it.
        fatal: bool,
    },

    /// The device reported a status instead of a token (capacity, token range, non-finite logits).
    #[error("position {position}: {what}")]
    Decode {
        /// Position of the token that could not be computed.
        position: u32,
        /// Which check failed.
        what: String,
    },

    /// A comparison exceeded its bound.
    #[error("verification failed: {0}")]
    Verification(String),

    /// A bug of this crate: an invariant of the plan, a kernel table or a launch does not hold.
    #[error("internal: {0}")]
    Internal(String),

    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
}

impl Error {
    /// An I/O failure on `path` while trying to `action`.
    pub fn io(path: &Path, action: impl Into<String>, source: io::Error) -> Self {
        Self::Io { path: path.to_owned(), action: action.into(), source }
    }

    /// A defect of a model file.
    pub fn invalid(
        path: &Path,
        at: impl Into<String>,
        offset: Option<u64>,
        defect: Defect,
        why: impl Into<String>,
    ) -> Self {
        Self::InvalidModel { path: path.to_owned(), at: at.into(), offset, defect, why: why.into() }
    }

    /// Adds the plan label or activity to a driver error; leaves every other error as it is.
    #[must_use]
    pub fn at(self, label: &str) -> Self {
        match self {
            Self::Driver { at, call, code, name, fatal } => {
                let at = if at.is_empty() { label.to_owned() } else { format!("{label}: {at}") };
                Self::Driver { at, call, code, name, fatal }
            }
            other => other,
        }
    }

    /// The process exit code that the command line promises for this cause.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Io { .. } => 74,
            Self::InvalidModel { .. } => 3,
            Self::Unsupported { .. } => 4,
            Self::NoDevice(_) => 5,
            Self::OutOfMemory { .. } => 6,
            Self::Driver { fatal: true, .. } => 7,
            Self::Driver { .. } | Self::Decode { .. } | Self::Internal(_) => 1,
            Self::Verification(_) => 8,
            Self::Interrupted => 130,
        }
    }
}
