use super::*;
use crate::bench::bootstrap::Draws;
use serde_json::json;

fn row(token_ms: &[f64]) -> Row {
    let (name, device) = ("t".to_owned(), "gpu".to_owned());
    Row { name, device, token_ms: token_ms.to_vec(), clock_mhz: None }
}

fn verdict(base: &[f64], new: &[f64]) -> Verdict {
    compare(&row(base), &row(new), 2.0).verdict
}

const BASE: [f64; 5] = [1.0, 1.001, 0.999, 1.002, 0.998];
const WIDE: Verdict = Verdict::CannotTell(Doubt::Wide);

#[test]
fn a_verdict_needs_the_whole_interval_and_the_margin() {
    assert_eq!(verdict(&BASE, &BASE), Verdict::Same);
    assert_eq!(verdict(&BASE, &BASE.map(|x| x * 1.1)), Verdict::Slower);
    assert_eq!(verdict(&BASE, &BASE.map(|x| x * 0.9)), Verdict::Faster);
    // Slower by less than counts.
    assert_eq!(verdict(&BASE, &BASE.map(|x| x * 1.01)), Verdict::Same);
    assert_eq!(verdict(&BASE, &[0.9, 1.3, 1.0, 1.2, 0.8]), WIDE);
    // Noisy, but not slower than the margin for sure: no gate need doubt it.
    let faster = compare(&row(&BASE), &row(&[0.9, 1.01, 0.95, 1.0, 0.92]), 2.0);
    assert_eq!((faster.verdict, faster.may_be_slower), (WIDE, false));
}

#[test]
fn four_repetitions_prove_nothing() {
    let few = compare(&row(&BASE), &row(&[2.0; 4]), 2.0);
    assert_eq!((few.verdict, few.may_be_slower), (Verdict::CannotTell(Doubt::Few), true));
}

#[test]
fn a_difference_that_the_clock_explains_is_no_verdict() {
    let clocked = |ms: f64, mhz: f64| Row {
        token_ms: BASE.map(|x| x * ms).to_vec(),
        clock_mhz: Some(vec![mhz; 5]),
        ..row(&[])
    };
    let verdict = |new: &Row| compare(&clocked(1.0, 2000.0), new, 2.0).verdict;
    let by_clock = Verdict::CannotTell(Doubt::Clocks);
    assert_eq!(verdict(&clocked(1.1, 2000.0)), Verdict::Slower);
    assert_eq!(verdict(&clocked(1.1, 2000.0 / 1.1)), by_clock);
    assert_eq!(verdict(&clocked(0.9, 2000.0)), Verdict::Faster);
    assert_eq!(verdict(&clocked(0.9, 2000.0 / 0.9)), by_clock);
    // One side without a clock: time alone decides.
    assert_eq!(verdict(&row(&BASE.map(|x| x * 1.1))), Verdict::Slower);
}

#[test]
fn rows_of_llama_bench_are_read_too() {
    let theirs = json!({
        "model_type": "llama 1B Q4_0", "backends": "CUDA", "n_prompt": 0, "n_gen": 10,
        "n_depth": 0, "samples_ns": [20_000_000, 30_000_000], "gpu_info": "", "cpu_info": "c",
    });
    let read = parse(&theirs).unwrap();
    assert_eq!((read.token_ms, read.clock_mhz, &*read.device), (vec![2.0, 3.0], None, "c"));
    let mut ours = theirs;
    ours["x"] = json!({
        "mode": "graph", "token_gaps_ns": [[1_000_000, 3_000_000, 2_000_000]],
        "telemetry": {"repetitions": [{"sm_mhz": [1900, 2000]}]},
    });
    ours["gpu_info"] = json!("g");
    let read = parse(&ours).unwrap();
    assert_eq!((read.token_ms, read.clock_mhz), (vec![2.0], Some(vec![1950.0])));
    assert_eq!(read.device, "g");
    ours["x"]["telemetry"]["repetitions"][0]["sm_mhz"] = json!([null]);
    assert_eq!(parse(&ours).unwrap().clock_mhz, None);
    ours["n_gen"] = json!(0);
    assert_eq!(parse(&ours), None);
}

/// A normal deviate (Box and Muller, 1958).
fn normal(draws: &mut Draws) -> f64 {
    let mut uniform = || (draws.bits() >> 11) as f64 / (1u64 << 53) as f64;
    let radius = (-2.0 * (1.0 - uniform()).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform()).cos()
}

/// Repetitions of 128 tokens each: the median of tokens that vary by `token`, times a level of
/// the repetition that varies by `repetition` (both standard deviations).
fn run(draws: &mut Draws, repetitions: usize, ms: f64, repetition: f64, token: f64) -> Row {
    let one = |_| {
        let level = ms * (1.0 + repetition * normal(draws));
        if token == 0.0 {
            return level;
        }
        let tokens = (0..128).map(|_| level * (1.0 + token * normal(draws)));
        Sorted::new(tokens).median().unwrap()
    };
    row(&(0..repetitions).map(one).collect::<Vec<_>>())
}

/// The share of `pairs` of runs, the second slower by `slower`, that get one of `verdicts`.
fn share(pairs: usize, slower: f64, verdicts: &[Verdict], mut run: impl FnMut(f64) -> Row) -> f64 {
    let hits = (0..pairs).filter(|_| {
        let (base, new) = (run(1.0), run(1.0 + slower));
        verdicts.contains(&compare(&base, &new, MARGIN_PERCENT).verdict)
    });
    hits.count() as f64 / pairs as f64
}

const FLAGGED: [Verdict; 2] = [Verdict::Slower, Verdict::Faster];

#[test]
fn of_a_thousand_equal_pairs_at_two_percent_noise_at_most_one_in_a_hundred_is_flagged() {
    for (seed, repetitions) in [(1, 5), (2, 10), (3, 40)] {
        let mut draws = Draws::new(seed);
        let flagged = share(1000, 0.0, &FLAGGED, |ms| run(&mut draws, repetitions, ms, 0.02, 0.0));
        println!("{repetitions} repetitions: {flagged} flagged");
        assert!(flagged <= 0.01, "{repetitions} repetitions: {flagged}");
    }
    // What `run` does by itself: five repetitions of 128 tokens that vary by 2 % each.
    let mut draws = Draws::new(4);
    let flagged = share(1000, 0.0, &FLAGGED, |ms| run(&mut draws, 5, ms, 0.0, 0.02));
    println!("5 repetitions of 128 tokens: {flagged} flagged");
    assert!(flagged <= 0.01, "{flagged}");
}

#[test]
fn a_slow_down_of_three_percent_is_found_in_95_of_100_cases() {
    let slower = [Verdict::Slower];
    let mut draws = Draws::new(5);
    let found = share(400, 0.03, &slower, |ms| run(&mut draws, 5, ms, 0.002, 0.02));
    println!("tokens vary: {found} found");
    assert!(found >= 0.95, "tokens vary: {found}");
    // Where whole repetitions vary by 2 %, it takes 40 of them.
    let found = share(400, 0.03, &slower, |ms| run(&mut draws, 40, ms, 0.02, 0.0));
    println!("repetitions vary: {found} found");
    assert!(found >= 0.95, "repetitions vary: {found}");
}
