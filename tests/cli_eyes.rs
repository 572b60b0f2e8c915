//! The commands that look into a token, asked of the binary itself, on the CPU reference: no test
//! needs or uses a GPU. What they show of a graph is in `eyes.rs`.

#![allow(clippy::unwrap_used)]

mod command_line;

use command_line::*;
use serde_json::Value;

const PROFILE: &str = "profile --synthetic tiny --backend cpu -n 8";
const GENERATE: &str = "generate --synthetic tiny --backend cpu --prompt-ids 1,2 -n 2";

#[test]
fn a_profile_names_every_step_of_the_plan_and_is_what_plot_draws() {
    let plan = json("graph --synthetic tiny -o json");
    let labels = |rows: &Value| -> Vec<String> {
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| row["label"].as_str().unwrap().to_owned()).collect()
    };
    let profile = json(&format!("{PROFILE} -o json"));
    assert_eq!(labels(&profile["rows"]), labels(&plan["steps"]));
    let us = |value: &Value| value.as_f64().unwrap();
    let steps: f64 =
        profile["rows"].as_array().unwrap().iter().map(|row| us(&row["time_us"])).sum();
    assert!((steps + us(&profile["between_us"]) - us(&profile["sum_us"])).abs() < 1e-6);
    for (row, step) in
        profile["rows"].as_array().unwrap().iter().zip(plan["steps"].as_array().unwrap())
    {
        assert!(us(&row["time_us"]) <= us(&row["raw_us"]));
        // On the CPU the cache is f32, and positions are above 0: no fewer bytes.
        assert!(row["bytes"].as_u64() >= step["weight_bytes"].as_u64());
    }

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("profile.json");
    std::fs::write(&file, profile.to_string()).unwrap();
    let drawn = stdout(&format!("plot {}", file.display()));
    assert!(drawn.starts_with("<svg") && drawn.contains("gate_up × 2"), "{drawn}");
}

#[test]
fn a_profile_is_a_table_of_steps_and_kernels_or_trace_events() {
    let table = stdout(PROFILE);
    assert!(table.contains("| label ") && table.contains("| L01.down "), "{table}");
    assert!(table.contains("plain replay p50") && table.contains("us a stamp"), "{table}");
    let rows = table.lines().filter(|l| l.starts_with('|'));
    let (steps, kernels) = table.split_once("\n\n").unwrap();
    let width = |text: &str| -> Vec<usize> {
        let rows = text.lines().filter(|l| l.starts_with('|'));
        rows.map(|l| l.chars().count()).collect()
    };
    for table in [width(steps), width(kernels)] {
        assert!(table.windows(2).all(|w| w[0] == w[1]), "a table is not aligned: {table:?}");
    }
    let short = stdout(&format!("{PROFILE} --by-kernel"));
    assert!(!short.contains("L01.down"));
    assert!(short.lines().filter(|l| l.starts_with('|')).count() < rows.count());

    let trace = json(&format!("{PROFILE} -o trace"));
    let names = trace["traceEvents"].as_array().unwrap().iter();
    assert!(names.clone().any(|e| e["name"] == "L01.down" && e["ph"] == "X"));
    assert!(names.filter(|e| e["ph"] == "X").all(|e| e["dur"].as_f64().unwrap() >= 0.0));
}

#[test]
fn steps_replays_inside_the_range_of_a_profiler_and_prints_no_profile() {
    let said = stdout(&format!("{PROFILE} --steps 3"));
    assert!(said.starts_with("3 tokens inside the profiler's range, "), "{said}");
    assert_eq!(said.lines().count(), 1);
}

#[test]
fn what_only_a_device_can_show_is_refused_without_one() {
    assert!(failure("graph --synthetic tiny --captured", 5).contains("device"));
    failure("graph --synthetic tiny --device 1", 2);
    let said = stderr(&decode_bench("verify --synthetic tiny --backend cpu --bisect"));
    assert!(said.contains("--bisect"), "{said}");
    failure("verify --synthetic tiny --backend cpu --bisect", 2);
    failure("profile --synthetic tiny --backend cpu -n 1", 2);
}

#[test]
fn debug_output_is_of_the_steps_that_were_asked_for() {
    let output = decode_bench(&format!("{GENERATE} --debug-steps L01.qkv,lm_head"));
    assert_eq!(code(&output), 0);
    let said = stderr(&output);
    let lines: Vec<&str> = said.lines().filter(|l| l.starts_with("position ")).collect();
    // Three positions, two steps each.
    assert_eq!(lines.len(), 6, "{said}");
    for pair in lines.chunks(2) {
        assert!(pair[0].contains(" L01.qkv ") && pair[0].contains("| keys "), "{said}");
        assert!(pair[1].contains(" lm_head ") && pair[1].contains("| logits "), "{said}");
    }
    assert!(!said.contains("candidates"), "scratch memory is of no meaning");
    let all = stderr(&command(GENERATE).env("GPU_DEBUG", "1").output().unwrap());
    assert!(all.lines().filter(|l| l.starts_with("position ")).count() > 6 * 3);
    let text = |line: &str| stdout(line);
    assert_eq!(text(&format!("{GENERATE} --debug-steps embed")), text(GENERATE));
    assert!(failure(&format!("{GENERATE} --debug-steps L09"), 2).contains("L09"));
}

#[test]
fn what_a_step_wrote_is_kept_as_numpy_files() {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("kept");
    stdout(&format!("{GENERATE} --debug-steps lm_head --dump {}", to.display()));
    let mut files: Vec<_> = std::fs::read_dir(&to)
        .unwrap()
        .map(|f| f.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, [0, 1, 2].map(|p| format!("{p:05}-lm_head-logits.npy")));
    let bytes = std::fs::read(to.join(&files[2])).unwrap();
    let data = &bytes[bytes.len() - 512 * 4..];
    let logits = data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    let best = logits.enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    let ids = json(&format!("{GENERATE} -o json --ignore-eos"))["ids"].clone();
    assert_eq!(ids[1].as_u64(), Some(best as u64), "the last step's logits chose the last token");

    failure(&format!("{GENERATE} --dump {}", to.display()), 2);
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let into_a_file = format!("{GENERATE} --debug-steps lm_head --dump {}", file.display());
    assert_eq!(code(&decode_bench(&into_a_file)), 74);
}
