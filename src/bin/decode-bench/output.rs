//! stdout, where only data goes, and notes on stderr.

use decode_graph::error::{Error, Result};
use std::io::{self, ErrorKind, Write};
use std::path::Path;

const STDOUT: &str = "<stdout>";

/// A failure to write to stdout.
pub(crate) fn failed(source: io::Error) -> Error {
    Error::io(Path::new(STDOUT), "write", source)
}

/// Whether the reader of stdout went away (`decode-bench … | head`): no failure of ours.
pub(crate) fn is_closed_pipe(error: &Error) -> bool {
    matches!(error, Error::Io { path, source, .. }
        if path == Path::new(STDOUT) && source.kind() == ErrorKind::BrokenPipe)
}

/// Writes `text` and hands it on at once.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(failed)
}

/// What clap has to say on stdout, by itself in colour on a terminal.
pub(crate) fn help(told: &clap::Error) -> Result<()> {
    told.print().and_then(|()| io::stdout().flush()).map_err(failed)
}

/// A note to the user, on stderr.
pub(crate) fn note(text: &str) {
    // A closed stderr is no reason to fail.
    let _ = writeln!(io::stderr(), "{}", one_line(text));
}

/// Text from a file or a driver in one line, without what a terminal would obey.
pub(crate) fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_closed_stdout_is_quiet() {
        let broken = || io::Error::from(ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&failed(broken())));
        assert!(!is_closed_pipe(&failed(io::Error::from(ErrorKind::StorageFull))));
        assert!(!is_closed_pipe(&Error::io(Path::new("x.gguf"), "write", broken())));
    }

    #[test]
    fn escape_sequences_of_a_file_do_not_reach_the_terminal() {
        assert_eq!(one_line("a\u{1b}[2J\nb"), "a [2J b");
    }
}
