//! `decode-bench`: how long a language model's next token takes, and whether it is the right one.
//!
//! ```text
//! argv ── argv.rs (llama-bench's spelling) ── args.rs (clap) ──▶ one file a subcommand
//!                                                                   │
//!              load.rs: model + backend ──▶ DecodeSession ◀─────────┘ tokens, times, logits
//! ```
//!
//! A token's way: `run.rs` (or `generate.rs`) calls `DecodeSession::decode`, whose sink gets each
//! token as it is chosen. Data goes to stdout (`output.rs`), all else to stderr.

mod args;
mod argv;
mod compare;
mod doctor;
mod environment;
mod generate;
mod golden;
mod graph;
mod inspect;
mod interrupt;
mod lists;
mod load;
mod output;
mod passage;
mod plot;
mod profile;
mod progress;
mod run;
mod shell;
mod stop;
mod synth;
mod table;
mod top;
mod verify;

use args::{Cli, Command};
use clap::Parser;
use decode_graph::error::Result;
use environment::Environment;
use std::process::ExitCode;

/// How a command ends that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// All that was asked for was done.
    Done,
    /// The new result is slower than the bound allows.
    Regression,
    /// The samples do not tell.
    TooNoisy,
    /// Ctrl-C: what was measured until then is printed.
    Interrupted,
}

impl Outcome {
    fn exit_code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Regression => 9,
            Self::TooNoisy => 10,
            Self::Interrupted => 130,
        }
    }
}

fn main() -> ExitCode {
    let argv = argv::normalise(std::env::args_os());
    let ended = match Cli::try_parse_from(argv) {
        Ok(cli) => dispatch(cli),
        // What was asked for, like any other data.
        Err(told) if !told.use_stderr() => output::help(&told).map(|()| Outcome::Done),
        Err(wrong) => wrong.exit(),
    };
    ExitCode::from(match ended {
        Ok(outcome) => outcome.exit_code(),
        Err(error) if output::is_closed_pipe(&error) => 0,
        Err(error) => {
            output::note(&format!("error: {error}"));
            error.exit_code()
        }
    })
}

fn dispatch(cli: Cli) -> Result<Outcome> {
    let environment = Environment::read()?;
    interrupt::install()?;
    match cli.command {
        Command::Run(args) => run::run(&args, &environment),
        Command::Generate(args) => generate::run(&args, &environment),
        Command::Verify(args) => verify::run(&args, &environment),
        Command::Inspect(args) => inspect::run(&args),
        Command::Graph(args) => graph::run(&args, &environment),
        Command::Profile(args) => profile::run(&args, &environment),
        Command::Compare(args) => compare::run(&args),
        Command::Plot(args) => plot::run(&args),
        Command::Synth(args) => synth::run(&args, &environment),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions { shell } => shell::completions(shell),
        Command::Man => shell::man(),
    }
}
