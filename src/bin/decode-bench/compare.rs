//! `compare`: did a change make it slower, and is that sure?

use crate::Outcome;
use crate::args::CompareArgs;
use crate::output::{note, print};
use decode_graph::bench::compare::{Verdict, compare, read};
use decode_graph::error::{Error, Result};

pub(crate) fn run(args: &CompareArgs) -> Result<Outcome> {
    let percent = args.fail_on_regression.unwrap_or(0.0);
    if !percent.is_finite() || percent < 0.0 {
        return Err(Error::Usage("--fail-on-regression is a percentage from 0 on".to_owned()));
    }
    let (base, new) = (read(&args.base)?, read(&args.new)?);
    let mut verdicts = Vec::new();
    let mut table = String::from(
        "| test | base ms | new ms | new/base | 95 % interval | verdict |\n\
         | --- | ---: | ---: | ---: | ---: | --- |\n",
    );
    for row in &new {
        let Some(before) = base.iter().find(|b| b.name == row.name) else {
            note(&format!("note: only in {}: {}", args.new.display(), row.name));
            continue;
        };
        let c = compare(before, row, percent);
        let verdict = match c.verdict {
            Verdict::Slower => "SLOWER",
            Verdict::Faster => "faster",
            Verdict::Same => "same",
            Verdict::Noisy => "too noisy",
        };
        table.push_str(&format!(
            "| {} | {:.4} | {:.4} | {:.4} | {:.4} to {:.4} | {verdict} |\n",
            c.name, c.base_ms, c.new_ms, c.ratio, c.interval.0, c.interval.1
        ));
        verdicts.push(c.verdict);
    }
    if verdicts.is_empty() {
        return Err(Error::Usage("the files have no test in common".to_owned()));
    }
    print(&table)?;
    note("note: clocks are not in the results, so throttling cannot be told from a regression");
    Ok(match args.fail_on_regression {
        Some(_) if verdicts.contains(&Verdict::Slower) => Outcome::Regression,
        Some(_) if verdicts.contains(&Verdict::Noisy) => Outcome::TooNoisy,
        Some(_) | None => Outcome::Done,
    })
}
