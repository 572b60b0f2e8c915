//! `completions` and `man`: generated from the parser, so they cannot be out of date.

use crate::Outcome;
use crate::argv::command;
use crate::output::{failed, print};
use clap_complete::Shell;
use decode_graph::error::Result;

pub(crate) fn completions(shell: Shell) -> Result<Outcome> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut command(), "decode-bench", &mut text);
    print(&String::from_utf8_lossy(&text))?;
    Ok(Outcome::Done)
}

pub(crate) fn man() -> Result<Outcome> {
    let mut text = Vec::new();
    let command = command();
    clap_mangen::Man::new(command.clone()).render(&mut text).map_err(failed)?;
    for mut sub in command.get_subcommands().cloned() {
        let name = format!("decode-bench {}", sub.get_name());
        sub = sub.display_name(&name).bin_name(name);
        clap_mangen::Man::new(sub).render(&mut text).map_err(failed)?;
    }
    print(&String::from_utf8_lossy(&text))?;
    Ok(Outcome::Done)
}
