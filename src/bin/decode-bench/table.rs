//! Tables that a person reads, and Markdown too.

/// A Markdown table whose columns are as wide as their widest cell; those that `is_text` are aligned
/// to the left.
pub(crate) fn table(
    titles: &[&str],
    rows: &[Vec<String>],
    is_text: impl Fn(usize) -> bool,
) -> String {
    let width = |(column, title): (usize, &&str)| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count());
        cells.chain([title.chars().count(), 3]).max().unwrap_or(3)
    };
    let widths: Vec<usize> = titles.iter().enumerate().map(width).collect();
    let pad = |(i, text): (usize, &str)| {
        let width = widths[i];
        if is_text(i) { format!("{text:<width$}") } else { format!("{text:>width$}") }
    };
    let rule = |(i, width): (usize, &usize)| {
        if is_text(i) { "-".repeat(*width) } else { format!("{}:", "-".repeat(width - 1)) }
    };
    let line = |cells: Vec<String>| format!("| {} |\n", cells.join(" | "));
    let mut out = line(titles.iter().copied().enumerate().map(pad).collect());
    out.push_str(&line(widths.iter().enumerate().map(rule).collect()));
    for row in rows {
        // A cell without a title would have no width.
        let cells = row.iter().take(widths.len()).map(String::as_str);
        out.push_str(&line(cells.enumerate().map(pad).collect()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_numbers_end_at_the_right() {
        let rows = [["down × 2", "1.5"], ["e", "10.25"]].map(|r| r.map(str::to_owned).to_vec());
        let text = table(&["kernel", "us"], &rows, |i| i == 0);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "| kernel   |    us |");
        assert_eq!(lines[1], "| -------- | ----: |");
        assert_eq!(lines[2], "| down × 2 |   1.5 |");
        assert_eq!(lines[3], "| e        | 10.25 |");
    }
}
