//! llama-bench's spelling made clap's: single-dash flags of several letters, and no subcommand.

use crate::args::Cli;
use clap::CommandFactory;
use std::ffi::OsString;

/// llama-bench's flag, and the long flag that it is here.
const FLAGS: [(&str, &str); 10] = [
    ("-pg", "--pg"),
    ("-ctk", "--cache-type-k"),
    ("-ctv", "--cache-type-v"),
    ("-oe", "--output-err"),
    ("-ngl", "--n-gpu-layers"),
    ("-fa", "--flash-attn"),
    ("-ub", "--ubatch-size"),
    ("-mmp", "--mmap"),
    ("-sm", "--split-mode"),
    ("-lm", "--load-mode"),
];

/// The arguments as clap is to see them. What follows `--`, or is a prompt's text, is left alone.
pub(crate) fn normalise(argv: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut argv = argv.into_iter();
    let mut out: Vec<OsString> = argv.next().into_iter().collect();
    let rest: Vec<OsString> = argv.collect();
    if wants_run(rest.first()) {
        out.push("run".into());
    }
    let text_follows = |flag: &OsString| flag == "--prompt" || flag == "-p";
    let mut verbatim = false;
    for (i, argument) in rest.iter().enumerate() {
        verbatim |= argument == "--";
        let is_text = i > 0 && text_follows(&rest[i - 1]);
        let long = FLAGS.iter().find(|(short, _)| argument == *short);
        out.push(match long {
            Some((_, long)) if !verbatim && !is_text => long.into(),
            _ => argument.clone(),
        });
    }
    out
}

/// Whether the first argument is neither a subcommand nor about the program as a whole.
fn wants_run(first: Option<&OsString>) -> bool {
    let Some(first) = first else { return true };
    let whole = ["-h", "--help", "-V", "--version"];
    // A word that is no subcommand is left for clap to refuse by name.
    first.to_string_lossy().starts_with('-') && !whole.iter().any(|flag| first == flag)
}

/// The parser, for completions and the manual.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn normal(line: &str) -> String {
        let argv = line.split_whitespace().map(OsString::from);
        let out = normalise(argv).into_iter().map(|s| s.into_string().unwrap());
        out.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn no_subcommand_is_run() {
        assert_eq!(normal("decode-bench"), "decode-bench run");
        assert_eq!(normal("decode-bench -m x"), "decode-bench run -m x");
        assert_eq!(normal("decode-bench --help"), "decode-bench --help");
        assert_eq!(normal("decode-bench generate -n 1"), "decode-bench generate -n 1");
        assert_eq!(normal("decode-bench typo"), "decode-bench typo");
    }

    #[test]
    fn a_line_of_llama_bench_is_understood() {
        let line = "decode-bench -m x -ngl 99 -fa 1 -t 8 -b 2048 -ub 512 -mmp 0 -sm none -lm mmap \
                    -pg 512,128 -ctk f16 -ctv f16 -oe json -p 0 -n 128 -d 0,4096 -r 5 -o md";
        let argv = normalise(line.split_whitespace().map(OsString::from));
        let cli = Cli::try_parse_from(argv).unwrap();
        let crate::args::Command::Run(args) = cli.command else { panic!("not run") };
        let ignored = ["-ngl", "-fa", "-t", "-b", "-ub", "-mmp", "-sm", "-lm"];
        assert_eq!(args.engine.ignored.given(), ignored);
        assert_eq!(args.prompt_gen[0].values(), [512, 128]);
        assert_eq!(args.n_depth[0].values(), [0, 4096]);
        assert_eq!(args.output_err, Some(crate::args::ReportFormat::Json));
    }

    #[test]
    fn a_prompts_text_and_what_follows_two_dashes_are_left_alone() {
        assert_eq!(normal("b generate -p -fa -fa 1"), "b generate -p -fa --flash-attn 1");
        assert_eq!(normal("b run -- -fa"), "b run -- -fa");
    }

    #[test]
    fn the_parser_is_consistent() {
        command().debug_assert();
    }
}
