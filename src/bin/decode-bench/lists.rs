//! Lists and ranges of numbers, as llama-bench writes them: `0,4096`, `a-b`, `a-b+s`, `a-b*m`.

use std::str::FromStr;

/// Values that one flag may name: more is a slip of the pen.
const MOST: usize = 10_000;

/// The values of one flag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct List(Vec<u32>);

impl List {
    /// In the order written.
    pub(crate) fn values(&self) -> &[u32] {
        &self.0
    }

    /// Of all occurrences of a flag.
    pub(crate) fn all(lists: &[Self]) -> Vec<u32> {
        lists.iter().flat_map(|l| &l.0).copied().collect()
    }
}

impl FromStr for List {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut values = Vec::new();
        for item in text.split(',') {
            append(item.trim(), &mut values)?;
        }
        Ok(Self(values))
    }
}

fn append(item: &str, values: &mut Vec<u32>) -> Result<(), String> {
    let Some((first, rest)) = item.split_once('-') else {
        values.push(number(item)?);
        return Ok(());
    };
    let (last, step, multiply) = match (rest.split_once('+'), rest.split_once('*')) {
        (Some((last, step)), _) => (last, number(step)?, false),
        (None, Some((last, factor))) => (last, number(factor)?, true),
        (None, None) => (rest, 1, false),
    };
    let (first, last) = (number(first)?, number(last)?);
    let advances = if multiply { step > 1 && first > 0 } else { step > 0 };
    if first > last || !advances {
        return Err(format!("\"{item}\" does not lead from its first to its last number"));
    }
    let mut next = Some(first);
    while let Some(value) = next.filter(|v| *v <= last) {
        if values.len() == MOST {
            return Err(format!("\"{item}\" names more than {MOST} values"));
        }
        values.push(value);
        next = if multiply { value.checked_mul(step) } else { value.checked_add(step) };
    }
    Ok(())
}

fn number(text: &str) -> Result<u32, String> {
    text.trim().parse().map_err(|_| {
        format!(
            "\"{text}\" is no number from 0 to {}; a list is 0,4096 or a-b, a-b+s, a-b*m",
            u32::MAX
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<u32>, String> {
        text.parse().map(|List(values)| values)
    }

    #[test]
    fn lists_and_ranges_are_llama_benchs() {
        assert_eq!(parse("0,4096").unwrap(), [0, 4096]);
        assert_eq!(parse("3-5").unwrap(), [3, 4, 5]);
        assert_eq!(parse("0-10+4").unwrap(), [0, 4, 8]);
        assert_eq!(parse("512-4096*2").unwrap(), [512, 1024, 2048, 4096]);
        assert_eq!(parse("1,8-9,0-4+2").unwrap(), [1, 8, 9, 0, 2, 4]);
        assert_eq!(parse("4294967295-4294967295").unwrap(), [u32::MAX]);
    }

    #[test]
    fn ranges_that_do_not_end_are_refused() {
        for bad in ["", "x", "-1", "5-3", "0-4+0", "1-4*1", "0-4*2", "4294967296", "0-4000000000"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
