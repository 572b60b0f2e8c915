//! Whether llama.cpp's `compare-llama-bench.py` reads what is printed: its rules, held against
//! every format. It loads rows into a table, refuses a row that lacks a needed key, drops keys
//! that it does not know, and joins the rows of two builds where all key properties are equal.

use super::Format;
use super::tests::{print_all, record};
use crate::bench::fields::Record;
use serde_json::Value;
use std::collections::BTreeMap;

/// What rows are joined on, of older scripts (`use_mmap`) and newer ones together.
const KEYS: [&str; 30] = [
    "cpu_info",
    "gpu_info",
    "backends",
    "n_gpu_layers",
    "n_cpu_moe",
    "tensor_buft_overrides",
    "model_filename",
    "model_type",
    "n_batch",
    "n_ubatch",
    "embeddings",
    "cpu_mask",
    "cpu_strict",
    "poll",
    "n_threads",
    "type_k",
    "type_v",
    "load_mode",
    "use_mmap",
    "no_kv_offload",
    "split_mode",
    "main_gpu",
    "tensor_split",
    "flash_attn",
    "n_prompt",
    "n_gen",
    "n_depth",
    "fit_target",
    "fit_min_ctx",
    "no_op_offload",
];

/// Columns that the script's table holds as numbers; SQLite turns text of a number into one.
const NUMBERS: [&str; 16] = [
    "n_gpu_layers",
    "n_cpu_moe",
    "n_batch",
    "n_ubatch",
    "embeddings",
    "cpu_strict",
    "poll",
    "n_threads",
    "use_mmap",
    "no_kv_offload",
    "main_gpu",
    "flash_attn",
    "n_prompt",
    "n_gen",
    "n_depth",
    "avg_ts",
];

type Row = BTreeMap<String, String>;

/// A value as the script's table keeps it.
fn stored(column: &str, text: &str) -> String {
    let number = NUMBERS.contains(&column).then(|| text.parse::<f64>().unwrap());
    number.map_or_else(|| text.to_owned(), |n| format!("{n:.6}"))
}

fn from_json(value: &Value) -> Row {
    let text = |v: &Value| match v {
        Value::Bool(b) => u8::from(*b).to_string(),
        Value::String(s) => s.clone(),
        Value::Null => panic!("a null joins with nothing"),
        other => other.to_string(),
    };
    // Lists and objects cannot be bound to a column: only unknown keys may hold them.
    let plain = value.as_object().unwrap().iter().filter(|(_, v)| !v.is_array() && !v.is_object());
    plain.map(|(k, v)| (k.clone(), text(v))).collect()
}

/// Values between `quote`s, a doubled one standing for itself.
fn quoted(line: &str, quote: char) -> Vec<String> {
    let (mut values, mut inside) = (Vec::new(), false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            c if c == quote && !inside => {
                inside = true;
                values.push(String::new());
            }
            c if c == quote && chars.peek() == Some(&quote) => {
                chars.next();
                values.last_mut().unwrap().push(quote);
            }
            c if c == quote => inside = false,
            c if inside => values.last_mut().unwrap().push(c),
            ',' | ' ' | '\n' => {}
            other => panic!("{other} stands outside quotes: {line}"),
        }
    }
    values
}

/// The rows of a printed file.
fn load(format: Format, text: &str) -> Vec<Row> {
    let named = |names: &str, values: Vec<String>| -> Row {
        let names: Vec<_> = names.split(',').map(|n| n.trim().to_owned()).collect();
        assert_eq!(names.len(), values.len());
        names.into_iter().zip(values).collect()
    };
    match format {
        Format::Json => {
            serde_json::from_str::<Vec<Value>>(text).unwrap().iter().map(from_json).collect()
        }
        Format::Jsonl => {
            text.lines().map(|l| from_json(&serde_json::from_str(l).unwrap())).collect()
        }
        Format::Csv => {
            let (header, rows) = text.split_once('\n').unwrap();
            rows.lines().map(|row| named(header, quoted(row, '"'))).collect()
        }
        Format::Sql => {
            let (table, rows) = text.split_once(");\n").unwrap();
            assert!(table.starts_with("CREATE TABLE IF NOT EXISTS llama_bench ("));
            let one = |row: &str| {
                let row = row.trim().strip_prefix("INSERT INTO llama_bench (").unwrap();
                let (names, values) = row.split_once(") VALUES (").unwrap();
                named(names, quoted(values.strip_suffix(");").unwrap(), '\''))
            };
            rows.lines().filter(|l| !l.trim().is_empty()).map(one).collect()
        }
        Format::Md => panic!("the script does not read tables"),
    }
}

/// What the script prints of two builds: test and mean speeds, a row for each set of keys.
fn compare(rows: &[Row], base: &str, new: &str) -> Vec<(String, f64, f64)> {
    let lengths: Vec<usize> = rows.iter().map(|r| r["build_commit"].len()).collect();
    assert!(lengths.windows(2).all(|w| w[0] == w[1]), "commits of different lengths");
    let key = |row: &Row| KEYS.map(|k| stored(k, &row[k]));
    let of = |build: &str| -> BTreeMap<_, Vec<f64>> {
        let mut speeds = BTreeMap::<_, Vec<f64>>::new();
        for row in rows.iter().filter(|r| r["build_commit"] == build) {
            assert!(row["test_time"].ends_with('Z'));
            speeds.entry(key(row)).or_default().push(row["avg_ts"].parse().unwrap());
        }
        speeds
    };
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (base, new) = (of(base), of(new));
    let column = |key: &[String; 30], name: &str| -> u32 {
        key[KEYS.iter().position(|k| *k == name).unwrap()].parse::<f64>().unwrap() as u32
    };
    let joined = base.iter().filter_map(|(k, b)| Some((k, b, new.get(k)?)));
    joined
        .map(|(k, b, n)| {
            let test = format!("tg{}@d{}", column(k, "n_gen"), column(k, "n_depth"));
            (test, mean(b), mean(n))
        })
        .collect()
}

#[test]
fn the_script_joins_two_builds_of_ours_in_every_format() {
    let faster = |r: &Record| {
        let mut r = r.clone();
        r.measurement.repetitions.iter_mut().for_each(|r| r.ns /= 2);
        r
    };
    let deeper = |r: &Record| {
        let mut r = r.clone();
        r.measurement.test.depth = 2048;
        r
    };
    let (base, new) = (record(), faster(&record()));
    let tests = [base.clone(), deeper(&base)];
    let again = [new.clone(), deeper(&new)];
    for format in [Format::Json, Format::Jsonl, Format::Csv, Format::Sql] {
        let mut rows = load(format, &print_all(format, &tests));
        for row in &mut rows {
            row.insert("build_commit".to_owned(), "aaaaaaaa".to_owned());
        }
        rows.extend(load(format, &print_all(format, &again)));
        assert_eq!(rows.len(), 4, "{format:?}");
        let missing = |row: &Row| KEYS.into_iter().find(|k| !row.contains_key(*k));
        assert_eq!(rows.iter().find_map(missing), None, "{format:?}");
        let build = rows[3]["build_commit"].clone();
        let mut joined = compare(&rows, "aaaaaaaa", &build);
        joined.sort_by(|a, b| a.0.cmp(&b.0));
        let expected = |test: &str| (test.to_owned(), 500.0, 1000.0);
        assert_eq!(joined, [expected("tg4@d2048"), expected("tg4@d512")], "{format:?}");
    }
}
