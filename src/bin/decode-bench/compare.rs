//! `compare`: did a change make it slower, and is that sure?

use crate::Outcome;
use crate::args::CompareArgs;
use crate::output::{note, print};
use crate::table::table;
use decode_graph::bench::baseline::resolve;
use decode_graph::bench::compare::{
    Comparison, LEVEL, MARGIN_PERCENT, Ratio, Verdict, compare, read,
};
use decode_graph::error::{Error, Result};

pub(crate) fn run(args: &CompareArgs) -> Result<Outcome> {
    let percent = args.fail_on_regression.unwrap_or(MARGIN_PERCENT);
    if !percent.is_finite() || percent < 0.0 {
        return Err(Error::Usage("--fail-on-regression is a percentage from 0 on".to_owned()));
    }
    let [base_file, new_file] = [&args.base, &args.new].map(|f| resolve(&args.baselines, f));
    let (base, new) = (read(&base_file)?, read(&new_file)?);
    let mut compared = Vec::new();
    for row in &new {
        let Some(before) = base.iter().find(|b| b.name == row.name) else {
            note(&format!("note: only in {}: {}", new_file.display(), row.name));
            continue;
        };
        if before.device != row.device && !args.across_devices {
            return Err(Error::Usage(format!(
                "{}: measured on another device: \"{}\", not \"{}\"; --across-devices compares \
                 them all the same",
                base_file.display(),
                before.device,
                row.device
            )));
        }
        compared.push(compare(before, row, percent));
    }
    if compared.is_empty() {
        return Err(Error::Usage("the files have no test in common".to_owned()));
    }
    print(&text(&compared))?;
    if compared.iter().any(|c| c.cycles.is_none()) {
        note("note: without the clocks of both, throttling cannot be told from a regression");
    }
    let any = |test: fn(&Comparison) -> bool| compared.iter().any(test);
    let doubtful: fn(&Comparison) -> bool =
        |c| matches!(c.verdict, Verdict::CannotTell(_)) && c.may_be_slower;
    Ok(match args.fail_on_regression {
        Some(_) if any(|c| c.verdict == Verdict::Slower) => Outcome::Regression,
        Some(_) if any(doubtful) => Outcome::TooNoisy,
        Some(_) | None => Outcome::Done,
    })
}

fn text(compared: &[Comparison]) -> String {
    let interval = format!("{} % interval", 100.0 * LEVEL);
    let titles = ["test", "base ms", "new ms", "new/base", &interval, "cycles", "verdict"];
    let ratio = |r: &Ratio| format!("{:.4}", r.value);
    let row = |c: &Comparison| {
        let (low, high) = c.time.interval;
        vec![
            c.name.clone(),
            format!("{:.4}", c.ms.0),
            format!("{:.4}", c.ms.1),
            ratio(&c.time),
            format!("{low:.4} to {high:.4}"),
            c.cycles.as_ref().map_or_else(|| "-".to_owned(), ratio),
            c.verdict.to_string(),
        ]
    };
    let last = titles.len() - 1;
    table(&titles, &compared.iter().map(row).collect::<Vec<_>>(), |i| i == 0 || i == last)
}
