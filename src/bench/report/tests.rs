use super::*;
use crate::bench::fields::{FIELDS, Kind, Pair, Setup};
use crate::bench::measure::{Measurement, Repetition, Test};
use crate::bench::model::ModelFacts;
use crate::bench::telemetry::{Reading, Sample, Span, Throttle};
use crate::session::{EngineStats, MemoryUse, Overhead};

pub(in crate::bench) fn record() -> Record {
    let model = ModelFacts {
        filename: "it's \"here\", a,b.gguf".to_owned(),
        kind: "llama 1B Q4_K - Medium".to_owned(),
        bytes: 807_690_000,
        parameters: 1_235_814_400,
    };
    let setup = Setup {
        model,
        backend: "cpu".to_owned(),
        mode: "reference".to_owned(),
        cpu: "a CPU".to_owned(),
        gpu: String::new(),
        device: 0,
        threads: 4,
        kv: "f32".to_owned(),
        capacity: 640,
        ceiling_gb_s: Some(5.0),
        load: EngineStats::default(),
    };
    let repetition = |ns| Repetition {
        ns,
        first_ns: 1_000_000,
        ttft_ns: 1_000_000,
        gaps_ns: vec![1_000_000, 2_000_000, 4_000_000],
        span: None,
    };
    Record {
        setup,
        test_time: "2025-04-24T11:57:10Z".to_owned(),
        measurement: Measurement {
            test: Test { n_prompt: 0, n_gen: 4, depth: 512 },
            warmup: None,
            device_clock: true,
            repetitions: vec![repetition(8_000_000), repetition(8_000_000)],
        },
        bytes_per_token: 1e6,
        pair: None,
        overhead: None,
    }
}

fn print(format: Format, rows: usize) -> String {
    print_all(format, &vec![record(); rows])
}

pub(super) fn print_all(format: Format, rows: &[Record]) -> String {
    let mut report = format.report();
    let mut out = Vec::new();
    report.begin(&mut out).unwrap();
    rows.iter().for_each(|row| report.row(&mut out, row).unwrap());
    report.end(&mut out).unwrap();
    String::from_utf8(out).unwrap()
}

/// The order that llama-bench prints, and that scripts read by position.
const ORDER: &str = "build_commit,build_number,cpu_info,gpu_info,backends,model_filename,\
    model_type,model_size,model_n_params,n_batch,n_ubatch,n_threads,cpu_mask,cpu_strict,poll,\
    type_k,type_v,n_gpu_layers,n_cpu_moe,split_mode,main_gpu,no_kv_offload,flash_attn,devices,\
    tensor_split,tensor_buft_overrides,load_mode,lazy_mode,embeddings,no_op_offload,no_host,\
    repack,fit_target,fit_min_ctx,n_prompt,n_gen,n_depth,test_time,avg_ns,stddev_ns,avg_ts,\
    stddev_ts,use_mmap,use_direct_io";

#[test]
fn columns_are_llama_benchs_in_its_order_then_ours_under_x() {
    let printed: Value = serde_json::from_str(&print(Format::Json, 2)).unwrap();
    let rows = printed.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    let names: Vec<_> = rows[0].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names[..44].join(","), ORDER);
    assert_eq!(names[44..], ["samples_ns", "samples_ts", "x"]);
    assert_eq!(rows[0]["avg_ts"], 500.0);
    assert_eq!(rows[0]["x"]["latency"]["p50_ms"], 2.0);
    assert_eq!(rows[0]["x"]["latency"]["p99_ms"], Value::Null);
}

#[test]
fn every_value_has_the_type_of_its_column_and_none_is_null() {
    let record = record();
    for field in &FIELDS {
        let value = (field.value)(&record);
        let fits = match field.kind {
            Kind::Text => value.is_string(),
            Kind::Integer => value.is_i64() || value.is_u64(),
            Kind::Bool => value.is_boolean(),
            Kind::Real => value.is_f64(),
        };
        assert!(fits, "{} is {value}", field.name);
    }
}

#[test]
fn an_empty_json_run_is_still_an_array() {
    assert_eq!(
        serde_json::from_str::<Value>(&print(Format::Json, 0)).unwrap(),
        Value::Array(vec![])
    );
}

#[test]
fn jsonl_is_an_object_a_line() {
    let text = print(Format::Jsonl, 2);
    assert_eq!(text.lines().count(), 2);
    assert!(text.lines().all(|l| serde_json::from_str::<Value>(l).unwrap().is_object()));
}

#[test]
fn csv_quotes_every_value_and_doubles_quotes() {
    let text = print(Format::Csv, 1);
    let (header, row) = text.trim_end().split_once('\n').unwrap();
    assert_eq!(header, ORDER);
    assert!(row.contains(r#","it's ""here"", a,b.gguf","llama 1B"#), "{row}");
    assert!(row.contains(r#","500.000000","0.000000","0","0""#), "{row}");
}

#[test]
fn sql_doubles_single_quotes() {
    let text = print(Format::Sql, 1);
    assert!(text.starts_with("CREATE TABLE IF NOT EXISTS llama_bench (\n  build_commit TEXT,"));
    assert!(text.contains("'it''s \"here\", a,b.gguf'"), "{text}");
    assert!(text.contains("  avg_ts REAL,") && text.contains("  embeddings INTEGER,"));
}

#[test]
fn markdown_has_llama_benchs_columns_first_and_a_dash_for_the_unknown() {
    let text = print(Format::Md, 1);
    let lines: Vec<_> = text.lines().collect();
    let cells = |i: usize| lines[i].trim_matches('|').split('|').map(str::trim).collect::<Vec<_>>();
    let titles = "model size params backend threads type_k type_v mode test t/s";
    assert_eq!(cells(0)[..10].join(" "), titles);
    assert_eq!(cells(2)[..4].join("|"), "llama 1B Q4_K - Medium|770.27 MiB|1.24 B|CPU");
    assert_eq!(cells(2)[8..10].join("|"), "tg4 @ d512|500.00 ± 0.00");
    assert_eq!(cells(2)[10..].join("|"), "2.000|4.000|4.000|-|4.000|device|0.5|10.0|-");
    assert!(lines.iter().take(3).all(|l| l.chars().count() == lines[0].chars().count()));
    assert!(text.contains("\n\nbuild: "));
}

#[test]
fn throttling_pairs_and_energy_are_told_in_json_and_under_the_table() {
    let mut record = record();
    let reading = Reading {
        sm_mhz: Some(1500),
        throttle: Throttle(0x40),
        joules: Some(7.0),
        ..Reading::default()
    };
    for r in &mut record.measurement.repetitions {
        let samples = vec![Sample { at_ms: 1.0, reading }];
        r.span = Some(Span { samples, joules: Some(12.0) });
    }
    record.pair = Some(Pair::of("graph", &record.measurement, &record.measurement));
    let x = &record.json()["x"];
    assert_eq!(x["joules_per_token"], 3.0);
    assert_eq!(x["telemetry"]["repetitions"][1]["sm_mhz"][0], 1500);
    assert_eq!(x["telemetry"]["throttle"][0], "thermal (hardware)");
    assert_eq!((&x["pair"]["ratio"], &x["pair"]["pairs"]), (&1.0.into(), &2.into()));
    assert_eq!(x["ttft_ms"], 1.0);
    let text = print_all(Format::Md, &[record]);
    for said in [" 3.000 |", "NOT QUIET: throttled (thermal (hardware))", "/ graph = 1.000 ("] {
        assert!(text.contains(said), "{said}: {text}");
    }
}

#[test]
fn memory_and_what_a_token_costs_beside_its_kernels_are_told_in_json_and_under_the_table() {
    let mut record = record();
    record.setup.load.memory = Some(MemoryUse {
        weights: 900 << 20,
        kv: 90 << 20,
        workspace: 8 << 20,
        other: 2 << 20,
        taken: 1020 << 20,
    });
    record.overhead = Some(Overhead { tokens: 256, host_us: 2.25, relaunch_us: Some(1.5) });
    let x = &record.json()["x"];
    assert_eq!(x["memory"]["planned"], 1000 << 20);
    assert!((x["memory"]["excess_percent"].as_f64().unwrap() - 2.0).abs() < 1e-9, "{x}");
    assert_eq!(
        (&x["overhead"]["host_us"], &x["overhead"]["relaunch_us"]),
        (&2.25.into(), &1.5.into())
    );
    let text = print_all(Format::Md, &[record.clone()]);
    for said in [
        "memory, reference: 1020.0 MiB taken, 2.00 % more than weights 900.0 + cache 90.0 + workspace 8.0 + other 2.0",
        "tg4 @ d512, reference: host 2.25 us a token, 1.50 us from one token's graph to the next",
    ] {
        assert!(text.contains(said), "{said}: {text}");
    }
    record.overhead = Some(Overhead { tokens: 256, host_us: 2.25, relaunch_us: None });
    assert_eq!(record.json()["x"]["overhead"]["relaunch_us"], Value::Null);
    assert!(print_all(Format::Md, &[record]).contains("host 2.25 us a token\n"));
}
