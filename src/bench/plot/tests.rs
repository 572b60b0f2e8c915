use super::*;
use serde_json::json;

fn row(depth: u64, ms: f64, mode: &str) -> Value {
    let gaps: Vec<Vec<u64>> = (0..5)
        .map(|r| (0..64u64).map(|i| (ms * 1e6) as u64 + (i * 7 + r) % 11 * 1000).collect())
        .collect();
    let quiet = json!({"at_ms": [1.0], "throttle": [[]]});
    let hot = json!({"at_ms": [1.0, 20.0], "throttle": [[], ["power cap"]]});
    json!({
        "model_type": "llama 1B <Q4_0>", "backends": "CUDA", "gpu_info": "g", "n_prompt": 0,
        "n_gen": 65, "n_depth": depth, "samples_ns": [1],
        "x": {
            "backend": "cuda", "mode": mode, "test": "tg65", "token_gaps_ns": gaps,
            "first_token_ns": [1_000_000, 1_000_000, 1_000_000, 1_000_000, 1_000_000],
            "bytes_per_token": 1e9 + depth as f64 * 1e4, "ceiling_gb_per_s": 4000.0,
            "telemetry": {"repetitions": [quiet, hot, quiet, quiet, quiet]},
        },
    })
}

struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, value: &Value) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, value.to_string()).unwrap();
        path
    }
}

/// Draws, and holds the text to what every picture has.
fn drawn(kind: Kind, files: &[PathBuf]) -> String {
    let svg = draw(kind, files).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
    for tag in ["text", "title", "style", "svg"] {
        let (open, close) = (format!("<{tag}"), format!("</{tag}>"));
        assert_eq!(svg.matches(&open).count(), svg.matches(&close).count(), "{tag}");
    }
    assert!(!svg.contains("NaN") && !svg.contains("inf,"), "{svg}");
    assert!(svg.contains("prefers-color-scheme:dark") && !svg.contains("<script"));
    svg
}

#[test]
fn depth_has_a_line_a_mode_and_the_roofline_with_units() {
    let files = Files::new();
    let rows = json!([row(0, 0.5, "graph"), row(4096, 0.7, "graph"), row(0, 0.9, "eager")]);
    let file = files.file("r.json", &rows);
    assert_eq!(natural(std::slice::from_ref(&file)).unwrap(), Kind::Depth);
    let svg = drawn(Kind::Depth, &[file]);
    for said in ["time a token, ms", "depth: positions", "llama 1B &lt;Q4_0&gt; eager", "roofline"]
    {
        assert!(svg.contains(said), "{said}");
    }
    assert_eq!(svg.matches("<polygon").count(), 2);
    // Of both modes of one model there is one roofline, but the second has one depth only. The
    // legend says once what a dashed line is.
    assert_eq!(svg.matches("line dash").count(), 3);
}

#[test]
fn a_trace_marks_outliers_and_throttling() {
    let files = Files::new();
    let mut slow = row(0, 0.5, "graph");
    slow["x"]["token_gaps_ns"][2][10] = json!(9_000_000);
    let file = files.file("r.json", &json!([slow]));
    assert_eq!(natural(std::slice::from_ref(&file)).unwrap(), Kind::Trace);
    let svg = drawn(Kind::Trace, &[file]);
    assert!(svg.contains("1 outliers") && svg.contains(">throttled<"), "{svg}");
    assert_eq!(svg.matches("<rect class=\"bad band\"").count(), 1);
    let quiet = files.file("q.json", &json!([row(0, 0.5, "graph")]));
    let whole = draw(Kind::Trace, std::slice::from_ref(&quiet)).unwrap();
    assert!(!whole.contains("outliers"));
    assert!(drawn(Kind::Distribution, &[quiet]).contains("took at most this, %"));
}

#[test]
fn kernels_are_summed_by_name_and_sorted_by_time() {
    let files = Files::new();
    let step = |label: &str, kernel: &str, us: f64| json!({"label": label, "kernel": kernel, "time_us": us, "bytes": 2_000_000});
    let rows = json!([
        step("L00.down", "down", 10.0),
        step("L01.down", "down", 20.0),
        step("e", "embed", 60.0)
    ]);
    let file = files.file("p.json", &rows);
    assert_eq!(natural(std::slice::from_ref(&file)).unwrap(), Kind::Kernels);
    let svg = drawn(Kind::Kernels, &[file]);
    assert!(svg.contains("90.0 µs in all") && svg.contains("down × 2"), "{svg}");
    assert!(svg.contains("30.0 µs, 33.3 %, 133 GB/s<"), "{svg}");
    assert!(svg.find("embed × 1") < svg.find("down × 2"));
    let with = files.file("c.json", &json!({"rows": rows, "ceiling_gb_per_s": 1000.0}));
    assert!(drawn(Kind::Kernels, &[with]).contains("13 % of the ceiling"));
}

#[test]
fn two_files_are_drawn_against_each_other() {
    let files = Files::new();
    let base = files.file("base.json", &json!([row(0, 0.5, "graph"), row(64, 0.5, "graph")]));
    let new = files.file("new.json", &json!([row(0, 0.6, "graph")]));
    assert_eq!(natural(&[base.clone(), new.clone()]).unwrap(), Kind::Ab);
    let svg = drawn(Kind::Ab, &[base.clone(), new]);
    assert!(svg.contains("SLOWER") && svg.contains("new against base"), "{svg}");
    let other = files.file("other.json", &json!([row(1, 0.6, "graph")]));
    assert!(matches!(draw(Kind::Ab, &[base, other]), Err(Error::Usage(_))));
}

#[test]
fn several_files_have_lines_of_their_own() {
    let files = Files::new();
    let of = |name, ms| files.file(name, &json!([row(0, ms, "graph"), row(64, ms + 0.1, "graph")]));
    let both = [of("base.json", 0.5), of("new.json", 0.4)];
    for kind in [Kind::Depth, Kind::Distribution] {
        let svg = drawn(kind, &both);
        assert!(svg.contains(", base") && svg.contains(", new"), "{kind:?}: {svg}");
    }
    assert_eq!(drawn(Kind::Depth, &both).matches("<polygon").count(), 2);
    assert!(!drawn(Kind::Depth, &both[..1]).contains("base"));
}

#[test]
fn what_is_no_result_is_refused_by_row() {
    let files = Files::new();
    for (text, kind) in [
        ("[{}]", Kind::Depth),
        ("[{\"x\": {\"token_gaps_ns\": [[]]}}]", Kind::Trace),
        ("[{\"kernel\": \"a\", \"time_us\": -1}]", Kind::Kernels),
        ("{\"rows\": 1}", Kind::Kernels),
        ("no json", Kind::Ab),
    ] {
        let path = files.0.path().join("bad.json");
        std::fs::write(&path, text).unwrap();
        let refused =
            draw(kind, &[path.clone(), path.clone()][..1 + usize::from(kind == Kind::Ab)]);
        assert!(matches!(refused, Err(Error::InvalidModel { .. })), "{text}: {refused:?}");
    }
    let empty = files.file("empty.json", &json!([]));
    assert!(matches!(draw(Kind::Depth, &[empty]), Err(Error::Usage(_))));
    assert!(matches!(draw(Kind::Depth, &[]), Err(Error::Usage(_))));
}
