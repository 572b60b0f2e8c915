//! The command line's contract, asked of the binary itself. No test needs or uses a GPU.

#![allow(clippy::unwrap_used)]

mod command_line;

use command_line::*;
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

#[test]
fn every_subcommand_explains_itself() {
    let whole = stdout("--help");
    for name in [
        "run",
        "generate",
        "verify",
        "inspect",
        "graph",
        "profile",
        "compare",
        "plot",
        "synth",
        "doctor",
        "completions",
        "man",
    ] {
        assert!(whole.contains(&format!("\n  {name} ")), "{name} is not listed");
        assert!(stdout(&format!("{name} --help")).contains("Usage:"), "{name}");
    }
    assert!(stdout("--version").starts_with("decode-bench "));
    assert!(stdout("completions bash").contains("decode-bench"));
    assert!(stdout("man").contains("decode\\-bench"));
}

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    for line in [
        "frobnicate",
        "run --no-such-flag",
        "run -d 5-3",
        "run -n 0",
        "run -pg 512",
        "run -r 0",
        "run --synthetic no-such-model --backend cpu",
        "run --synthetic tiny -m x.gguf",
        "run --synthetic tiny --backend cpu --max-noise 0",
        "run --synthetic tiny --backend cpu --mode both",
        "run --synthetic tiny --backend cpu --save-baseline ../escape",
        "generate --synthetic tiny --prompt-ids 1 --mode both",
        "plot",
        "plot x.json --kind pie",
        "run --persistent --chain",
        "graph --synthetic tiny --persistent --chain",
        "run --synthetic tiny --backend cpu -ctk f16 -ctv f32",
        "generate --synthetic tiny",
        "generate --prompt-ids 1",
        "generate --synthetic tiny --backend cpu -p hello",
        "generate --synthetic tiny --prompt-ids 1 --temp nan",
        "generate --synthetic tiny --prompt-ids 1 --temp 1 --min-p 2",
        "generate --synthetic tiny --backend cpu --prompt-ids 4294967295",
        "graph",
        "profile",
    ] {
        assert_eq!(code(&decode_bench(line)), 2, "{line}");
    }
    for (value, expected) in [("3", 2), ("on", 2), ("0", 0), ("", 0)] {
        let output = command("doctor").env("GPU_DEBUG", value).output().unwrap();
        assert_eq!(code(&output), expected, "GPU_DEBUG={value}");
    }
}

#[test]
fn a_model_that_is_not_there_or_none_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    refused(&folder.path().join("missing.gguf"), 74);
    refused(folder.path(), 3);
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "these are not the weights that you look for").unwrap();
    refused(&text, 3);
}

#[test]
fn a_damaged_model_is_refused_with_what_is_wrong() {
    let (folder, tiny) = tiny_file("f16");
    let bytes = std::fs::read(&tiny).unwrap();
    let damaged = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let said = refused(&damaged("cut.gguf", &bytes[..bytes.len() / 2]), 3);
    assert!(said.contains("blk.") || said.contains("tensor"), "{said}");
    refused(&damaged("stub.gguf", &bytes[..20]), 3);

    let mut other = bytes.clone();
    // After the key: type and length of its value, then the value.
    let value = after(&bytes, "general.architecture") + 12;
    assert_eq!(&other[value..value + 5], b"llama");
    other[value..value + 5].copy_from_slice(b"mamba");
    let said = refused(&damaged("mamba.gguf", &other), 4);
    assert!(said.contains("mamba") && said.contains("llama"), "{said}");

    let mut other = bytes.clone();
    // After the name: dimensions, two sizes, type. I16 is as large as F16.
    let kind = after(&bytes, "blk.0.attn_q.weight") + 4 + 16;
    other[kind..kind + 4].copy_from_slice(&25u32.to_le_bytes());
    other[value..value + 5].copy_from_slice(b"mamba");
    let path = damaged("i16.gguf", &other);
    let said = refused(&path, 4);
    assert!(said.contains("blk.0.attn_q.weight") && said.contains("I16"), "{said}");
    // What is wrong with it is what `inspect` is asked for: all of it.
    let said = stdout(&format!("inspect -m {}", path.display()));
    for part in [
        "supported    no: ",
        "blocked by   architecture mamba; supported are llama, ",
        "blocked by   type I16 of 1 tensors, the first is blk.0.attn_q.weight",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn cuda_asked_for_by_name_is_used_or_the_run_fails() {
    failure("run --backend cuda -n 1", 5);
    failure("run --list-devices", 5);
    assert!(stdout("doctor").contains("CUDA           not ready: "));
    let output = decode_bench("doctor --backend cuda");
    assert_eq!(code(&output), 5);
    assert!(String::from_utf8(output.stdout).unwrap().contains("To fix it"));
}

#[test]
fn without_arguments_and_gpu_it_measures_soon_and_warns_once() {
    let start = Instant::now();
    let output = decode_bench("");
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
    let said = stderr(&output);
    assert_eq!(said.matches("CPU reference").count(), 1, "{said}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.starts_with("| model ") && table.contains(" tg128 "), "{table}");
    assert!(!table.contains('\u{1b}') && !said.contains('\u{1b}'), "colour without a terminal");
}

#[test]
fn a_pasted_llama_bench_line_runs_and_names_what_it_ignores_once() {
    let line =
        format!("{QUICK} -ngl 99 -fa 1 -t 8 -b 2048 -ub 512 -mmp 0 -sm none -lm mmap -p 2 -oe csv");
    let output = decode_bench(&line);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let said = stderr(&output);
    assert_eq!(said.matches("-ngl -fa -t -b -ub -mmp -sm -lm").count(), 1, "{said}");
    assert_eq!(said.matches("token by token").count(), 1, "{said}");
    assert!(said.contains("\"0\",\"4\",\"0\""), "no CSV on stderr: {said}");
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains(" pp2 ") && table.contains(" tg4 "), "{table}");
}

/// The commit that git gives for the package's folder, or what stands for none.
fn built_from() -> String {
    let git = |args: &[&str]| {
        let folder = env!("CARGO_MANIFEST_DIR");
        let output = Command::new("git").args(args).current_dir(folder).output().ok()?;
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    };
    let own = git(&["rev-parse", "--show-prefix"]).filter(|prefix| prefix.trim().is_empty());
    let head = own.and_then(|_| git(&["rev-parse", "HEAD"]));
    head.map_or("unknown0".to_owned(), |head| head[..8].to_owned())
}

#[test]
fn results_are_llama_benchs_rows_for_each_depth() {
    let rows = json(&format!("{QUICK} -d 0,8-16+8 -o json"));
    let rows = rows.as_array().unwrap();
    let depths: Vec<_> = rows.iter().map(|r| r["n_depth"].as_u64().unwrap()).collect();
    assert_eq!(depths, [0, 8, 16]);
    for row in rows {
        let names: Vec<_> = row.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names[..3], ["build_commit", "build_number", "cpu_info"]);
        assert_eq!(row["build_commit"], built_from());
        assert_eq!(
            names[40..],
            ["avg_ts", "stddev_ts", "use_mmap", "use_direct_io", "samples_ns", "samples_ts", "x"]
        );
        assert_eq!(row["samples_ns"].as_array().unwrap().len(), 2);
        assert_eq!(row["backends"], "CPU");
        assert_eq!(row["x"]["token_gaps_ns"][0].as_array().unwrap().len(), 3);
        assert!(row["x"]["bytes_per_token"].as_f64().unwrap() > 1000.0);
    }
    assert_eq!(stdout(&format!("{QUICK} -d 0,8 -o jsonl")).lines().count(), 2);
    let csv = stdout(&format!("{QUICK} -o csv"));
    assert!(csv.starts_with("build_commit,build_number,"), "{csv}");
    assert!(stdout(&format!("{QUICK} -o sql")).contains("INSERT INTO llama_bench ("));
}

/// A folder with the baseline `main`, and lines of every command that prints; they name it.
fn printing(folder: &Path) -> Vec<String> {
    assert_eq!(code(&measured(folder, "--save-baseline main")), 0);
    let folder = folder.display();
    let lines = [
        "run",
        "run -o json",
        "run -o sql",
        "generate --prompt-ids 1 -n 3",
        "generate --prompt-ids 1 -n 3 -o json",
        "verify -n 2",
        "profile -n 2",
    ];
    let of_tiny = lines.map(|line| match line.strip_prefix("run") {
        Some(rest) => format!("{QUICK}{rest}"),
        None => format!("{line} --synthetic tiny --backend cpu"),
    });
    let others = [
        "graph --synthetic tiny",
        "inspect --synthetic tiny",
        "doctor",
        "completions bash",
        "man",
        "--help",
        "plot --help",
        "--version",
    ];
    let of_results =
        [format!("compare --baselines {folder} main main"), format!("plot {folder}/main.json")];
    of_tiny.into_iter().chain(others.map(str::to_owned)).chain(of_results).collect()
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    for line in printing(folder.path()) {
        // Gone before the first byte, however late this thread runs: what fits into a pipe is no error.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command(&line).stdout(writer).stderr(Stdio::piped()).output().unwrap();
        assert_eq!((code(&output), stderr(&output).as_str()), (0, ""), "{line}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_disk_that_is_full_is_an_error_of_its_own() {
    let full = || std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let folder = tempfile::tempdir().unwrap();
    for line in printing(folder.path()) {
        let output = command(&line).stdout(full()).stderr(Stdio::piped()).output().unwrap();
        assert_eq!(code(&output), 74, "{line}: {}", stderr(&output));
        let told = stderr(&output);
        assert!(told.starts_with("error: <stdout>: cannot write: No space left"), "{line}: {told}");
    }
    // Where the explanation does not fit either, the code still tells.
    let mut missing = command("run --backend cpu -m missing.gguf");
    assert_eq!(missing.stderr(full()).status().unwrap().code(), Some(74));
    assert_eq!(command("run --wrong").stderr(full()).status().unwrap().code(), Some(2));
    let result = folder.path().join("main.json");
    failure(&format!("plot {} -o /dev/full", result.display()), 74);
    // By another name: a file in the place of the device itself would be missed.
    let link = folder.path().join("full.gguf");
    std::os::unix::fs::symlink("/dev/full", &link).unwrap();
    failure(&format!("synth tiny -o {}", link.display()), 74);
    assert!(link.is_symlink() && !link.is_file(), "the device is still there");
}

#[cfg(unix)]
#[test]
fn ctrl_c_prints_what_was_measured() {
    let mut child = command("--synthetic tiny --backend cpu --no-warmup -r 1 -n 2,50000 -o json")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    // The first row begins a line of its own: then the long test is running.
    out.read_line(&mut text).unwrap();
    let mut first = vec![0];
    out.read_exact(&mut first).unwrap();
    let told = Instant::now();
    interrupt(&child);
    text.push_str(std::str::from_utf8(&first).unwrap());
    out.read_to_string(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
    let rows: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 1);
    assert_eq!(rows[0]["n_gen"], 2);
}

/// Sends SIGINT to a child.
#[cfg(unix)]
fn interrupt(child: &std::process::Child) {
    // A child that has ended already cannot be told.
    let _ = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .stderr(Stdio::null())
        .status()
        .unwrap();
}

#[cfg(unix)]
#[test]
fn ctrl_c_at_any_moment_leaves_a_whole_report_or_none() {
    for delay in [0, 2, 5, 10, 15, 20, 30, 50, 100, 200] {
        let child = command("--synthetic tiny --backend cpu --no-warmup -r 1 -n 3,3,3,400 -o json")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(delay));
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        // Before the program has begun, the system's own answer to the signal ends it.
        assert!(matches!(output.status.code(), Some(0 | 130) | None), "{delay}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let whole = text.is_empty() || serde_json::from_str::<Value>(&text).is_ok();
        assert!(whole, "after {delay} ms: {text}");
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_while_a_file_is_written_leaves_no_part_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("model.gguf");
    let entries = || std::fs::read_dir(folder.path()).unwrap().count();
    let mut child = command(&format!("synth smollm2-135m:f16 -o {}", target.display()))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while entries() == 0 && start.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(entries() > 0 && !target.exists(), "it grows under another name");
    interrupt(&child);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(entries(), 0, "something is left");
}

#[test]
fn generation_is_the_same_from_a_file_and_from_memory() {
    let (_folder, tiny) = tiny_file("q8_0");
    let rest = "--backend cpu --prompt-ids 1,2,3 -n 6 --ignore-eos -o json";
    let memory = json(&format!("generate --synthetic tiny:q8_0 {rest}"));
    let file = json(&format!("generate -m {} {rest}", tiny.display()));
    let names: Vec<_> = file.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(names.join(" "), "model backend mode prompt_ids ids text finish_reason");
    assert_eq!(file["ids"], memory["ids"]);
    assert_eq!(file["ids"].as_array().unwrap().len(), 6);
    assert_eq!(
        (&file["backend"], &file["mode"], &file["finish_reason"]),
        (&"cpu".into(), &"reference".into(), &"length".into())
    );
    // Step by step with logits, it is the same text.
    let steps = json(&format!("generate --synthetic tiny:q8_0 {rest} --top 3"));
    assert_eq!(steps["ids"], memory["ids"]);
    for (step, id) in steps["steps"].as_array().unwrap().iter().zip(0..) {
        assert_eq!(step["id"], steps["ids"][id]);
        assert_eq!((&step["top"][0][0], step["top"].as_array().unwrap().len()), (&step["id"], 3));
        assert!(step["logsumexp"].as_f64().unwrap() > step["top"][0][1].as_f64().unwrap());
    }
}

#[test]
fn generation_ends_at_capacity_and_follows_its_seed() {
    let tiny = "generate --synthetic tiny --backend cpu --prompt-ids 1,2 --ignore-eos -o json";
    let full = json(&format!("{tiny} -n 50 --capacity 8"));
    assert_eq!(full["finish_reason"], "capacity");
    // The last position's token is chosen too: 8 steps, the first of which chose no new token.
    assert_eq!(full["ids"].as_array().unwrap().len(), 7);
    let logits = json(&format!("{tiny} -n 50 --capacity 8 --top 1"));
    assert_eq!((&logits["finish_reason"], &logits["ids"]), (&full["finish_reason"], &full["ids"]));
    let draw = |seed| json(&format!("{tiny} -n 12 --temp 2 --top-k 0 --top-p 1 --seed {seed}"));
    assert_eq!(draw(1)["ids"], draw(1)["ids"]);
    assert_ne!(draw(1)["ids"], draw(2)["ids"]);
    // A draw that can fall on one token only is the greedy choice.
    let one = json(&format!("{tiny} -n 12 --temp 2 --top-k 1 --seed 3"));
    assert_eq!(one["ids"], json(&format!("{tiny} -n 12"))["ids"]);
    // Step by step with logits, the same draws.
    let steps = json(&format!("{tiny} -n 12 --temp 2 --top-k 0 --top-p 1 --seed 1 --top 2"));
    assert_eq!(steps["ids"], draw(1)["ids"]);
}

#[test]
fn the_fused_plan_is_verified_against_the_plain_one() {
    let said = stdout("verify --synthetic tiny --backend cpu -n 8");
    assert!(said.contains("cpu, fused") && said.contains("top-1 8/8"), "{said}");
    // What was compared in every bit is said with its size: 2 layers, 8 positions.
    assert!(said.contains("cpu, fused = cpu, plain, bit for bit:"), "{said}");
    assert!(said.contains("given tokens  yes: 8 tokens, 8 x 512 logits, "), "{said}");
    assert!(said.contains("own tokens    yes: 8 tokens, 1 x 512 logits, "), "{said}");
}

/// A golden file that holds what the model itself says.
fn golden() -> Value {
    let line = "generate --synthetic tiny --backend cpu --prompt-ids 5 -n 9 --ignore-eos --top 3";
    let made = json(&format!("{line} -o json"));
    let steps = made["steps"].as_array().unwrap();
    let column = |i: usize| -> Vec<Value> {
        let of = |s: &Value| s["top"].as_array().unwrap().iter().map(|t| t[i].clone()).collect();
        steps.iter().map(of).collect()
    };
    let ids = [vec![5.into()], made["ids"].as_array().unwrap()[..8].to_vec()].concat();
    let lse: Vec<f64> = steps.iter().map(|s| s["logsumexp"].as_f64().unwrap()).collect();
    let nll: f64 = (0..8).map(|i| lse[i] - steps[i]["top"][0][1].as_f64().unwrap()).sum();
    let greedy_step = |s: &Value| {
        serde_json::json!({
            "top": [s["top"][0][0], s["top"][1][0]],
            "logit": [s["top"][0][1], s["top"][1][1]],
            "logsumexp": s["logsumexp"],
        })
    };
    serde_json::json!({
        "model": "tiny",
        "reference": "itself",
        "greedy": [{
            "prompt": "five", "prompt_ids": [5], "greedy_ids": made["ids"],
            "steps": steps.iter().map(greedy_step).collect::<Vec<_>>(),
        }],
        "forced": {
            "ids": ids, "top_ids": column(0), "top_logits": column(1), "logsumexp": lse,
            "mean_nll": nll / 8.0,
        },
    })
}

#[test]
fn a_golden_file_is_held_against_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("golden.json");
    let line = format!("verify --synthetic tiny --backend cpu --golden {}", path.display());
    let mut golden = golden();
    std::fs::write(&path, golden.to_string()).unwrap();
    let report = json(&line);
    assert_eq!((&report["positions"], &report["greedy_equal"]), (&9.into(), &1.into()));
    let nll = |name: &str| report[name].as_f64().unwrap();
    assert!((nll("mean_nll") - nll("golden_mean_nll")).abs() < 1e-6, "{report}");

    golden["forced"]["top_logits"][3][1] = 1e3.into();
    std::fs::write(&path, golden.to_string()).unwrap();
    let output = decode_bench(&line);
    assert_eq!(code(&output), 8, "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["max_abs_logit_error"].as_f64().unwrap() > 900.0);

    std::fs::write(&path, "{}").unwrap();
    assert_eq!(failure(&line, 3).lines().count(), 1);
}

#[test]
fn a_plan_is_printed_without_a_gpu() {
    let tiny = "graph --synthetic tiny";
    assert!(stdout(tiny).contains("# total: "));
    assert!(stdout(&format!("{tiny} -o dot")).starts_with("digraph plan {"));
    let fused = json(&format!("{tiny} -o json"));
    let plain = json(&format!("{tiny} -o json --no-fuse"));
    let steps = |plan: &Value| plan["steps"].as_array().unwrap().len();
    assert!(steps(&fused) < steps(&plain));
    assert!(stdout("inspect --synthetic tiny").contains("supported    yes"));
}

#[test]
fn a_comparison_ends_with_its_verdict() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, ms: [f64; 5]| {
        let ns = ms.map(|ms| (ms * 1e7) as u64);
        let row = serde_json::json!([{
            "model_type": "llama 1B Q4_0", "backends": "CUDA", "n_prompt": 0, "n_gen": 10,
            "n_depth": 0, "samples_ns": ns,
        }]);
        let path = folder.path().join(name);
        std::fs::write(&path, row.to_string()).unwrap();
        path.display().to_string()
    };
    let base = file("base.json", [1.0, 1.001, 0.999, 1.002, 0.998]);
    let slow = file("slow.json", [1.1, 1.101, 1.099, 1.102, 1.098]);
    let noisy = file("noisy.json", [0.9, 1.3, 1.0, 1.2, 0.8]);
    for (new, expected) in [(&base, 0), (&slow, 9), (&noisy, 10)] {
        let output = decode_bench(&format!("compare {base} {new} --fail-on-regression 2"));
        assert_eq!(code(&output), expected, "{new}: {}", stderr(&output));
        assert_eq!(code(&decode_bench(&format!("compare {base} {new}"))), 0);
    }
    failure(&format!("compare {base} {base}.missing"), 74);
    std::fs::write(&slow, "[{}]").unwrap();
    failure(&format!("compare {base} {slow}"), 3);
}

/// A short run whose repetitions are enough to be judged, in `folder`.
fn measured(folder: &Path, rest: &str) -> Output {
    let line = "--synthetic tiny --backend cpu --no-warmup -r 5 -n 4 --baselines";
    decode_bench(&format!("{line} {} {rest}", folder.display()))
}

#[test]
fn a_baseline_is_saved_by_name_and_compared_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("made");
    let output = measured(&path, "-o json --save-baseline main");
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let saved = std::fs::read(path.join("main.json")).unwrap();
    assert_eq!(saved, output.stdout, "what is saved is what is printed in JSON");
    let same = format!("compare --baselines {} main main", path.display());
    assert!(stdout(&same).contains(" 1.0000 |"), "{}", stdout(&same));
    // Not there: neither a baseline nor a file.
    failure(&format!("compare --baselines {} main other", path.display()), 74);
    // Not readable.
    for text in ["", "no json", "[{}]"] {
        std::fs::write(path.join("bad.json"), text).unwrap();
        failure(&format!("compare --baselines {} bad main", path.display()), 3);
    }
    // Another device.
    let text = String::from_utf8(saved).unwrap();
    let mut rows: Value = serde_json::from_str(&text).unwrap();
    rows[0]["gpu_info"] = "Another GPU".into();
    std::fs::write(path.join("far.json"), rows.to_string()).unwrap();
    let far = format!("compare --baselines {} far main", path.display());
    assert!(failure(&far, 2).contains("Another GPU"));
    stdout(&format!("{far} --across-devices"));
    // A folder that cannot be made.
    let taken = folder.path().join("file");
    std::fs::write(&taken, "").unwrap();
    assert_eq!(code(&measured(&taken, "--save-baseline main")), 74);
}

#[test]
fn too_much_noise_ends_with_10_after_the_results() {
    // Nothing is so quiet; two repetitions are too few to say anything.
    for rest in ["--max-noise 0.000001 --max-repetitions 5", "--max-noise 50 --max-repetitions 2"] {
        let output = decode_bench(&format!("{QUICK} {rest} -o json"));
        assert_eq!(code(&output), 10, "{}", stderr(&output));
        let rows: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(!rows[0]["samples_ns"].as_array().unwrap().is_empty());
    }
    let quiet = json(&format!("{QUICK} --max-noise 1000 -o json"));
    let x = &quiet[0]["x"];
    assert_eq!(quiet[0]["samples_ns"].as_array().unwrap().len(), 5);
    assert!(x["noise_percent"].as_f64().unwrap() >= 0.0);
    assert!(x["ttft_ms"].as_f64().unwrap() > 0.0 && x["load"]["weights_s"].as_f64().unwrap() > 0.0);
    assert_eq!(x["telemetry"], Value::Null, "a CPU has no sensor");
}

#[test]
fn text_ends_before_a_stop_string() {
    let tiny = "generate --synthetic tiny --backend cpu --prompt-ids 1,2 --ignore-eos -n 8";
    let plain = json(&format!("{tiny} -o json"));
    // Without a tokenizer the text is the ids.
    let ids: Vec<String> =
        plain["ids"].as_array().unwrap().iter().map(ToString::to_string).collect();
    let all = stdout(tiny);
    assert_eq!(all.trim_end(), ids.join(" "));
    let stop = format!(" {}", ids[3]);
    let output = command(tiny).args(["--stop", &stop]).output().unwrap();
    let shown = String::from_utf8(output.stdout).unwrap();
    let end = all.find(&stop).unwrap();
    assert_eq!(shown.trim_end_matches('\n'), &all[..end]);
}

#[test]
fn results_are_drawn() {
    let folder = tempfile::tempdir().unwrap();
    let output = measured(folder.path(), "-d 0,8 --save-baseline main");
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let result = folder.path().join("main.json");
    let result = result.display();
    for kind in ["", "--kind depth", "--kind trace", "--kind distribution"] {
        let svg = stdout(&format!("plot {result} {kind}"));
        assert!(svg.starts_with("<svg ") && svg.contains("time a token, ms"), "{kind}: {svg}");
    }
    let svg = folder.path().join("ab.svg");
    assert_eq!(stdout(&format!("plot {result} {result} -o {}", svg.display())), "");
    assert!(std::fs::read_to_string(svg).unwrap().contains("new / base"));
    failure(&format!("plot {result}.missing"), 74);
    failure(&format!("plot {result} --kind kernels"), 3);
    failure(&format!("plot {result} --kind ab"), 2);
}
