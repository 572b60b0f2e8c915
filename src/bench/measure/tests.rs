use super::*;

/// A session whose tokens take the device the times of a table, in turn.
struct Mock {
    position: u32,
    clock_ns: u64,
    step_ns: Vec<u64>,
    steps: Vec<u32>,
    inputs: Vec<u32>,
    device: bool,
}

impl Mock {
    fn new(step_ns: &[u64]) -> Self {
        let step_ns = step_ns.to_vec();
        Self { position: 0, clock_ns: 0, step_ns, steps: vec![], inputs: vec![], device: true }
    }
}

impl Decoder for Mock {
    fn seek(&mut self, depth: u32) -> Result<()> {
        self.position = depth;
        Ok(())
    }

    fn decode(
        &mut self,
        inputs: &[u32],
        n_predict: u32,
        sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
    ) -> Result<Finish> {
        self.inputs = inputs.to_vec();
        for _ in 0..inputs.len() as u32 - 1 + n_predict {
            self.clock_ns += self.step_ns[self.steps.len() % self.step_ns.len()];
            self.steps.push(self.position);
            let device_ns = self.device.then_some(self.clock_ns);
            let chosen = Chosen { position: self.position, token: 0, device_ns };
            self.position += 1;
            if sink(chosen).is_break() {
                return Ok(Finish::Stopped);
            }
        }
        Ok(Finish::Done)
    }

    fn vocab(&self) -> u32 {
        10
    }
}

const TG8: Test = Test { n_prompt: 0, n_gen: 8, depth: 100 };

fn repeat(times: u32, warmup: bool) -> Repeat {
    Repeat { times, max_noise: None, most: 12, warmup, delay: Duration::ZERO }
}

fn watched(
    decoders: &mut [&mut dyn Decoder],
    test: Test,
    repeat: Repeat,
    stop: &dyn Fn() -> bool,
    progress: &mut dyn FnMut(bool),
) -> Result<Vec<Measurement>> {
    measure(decoders, test, repeat, &mut Watch { stop, progress, monitor: None })
}

fn one(mock: &mut Mock, test: Test, repeat: Repeat) -> Measurement {
    watched(&mut [mock], test, repeat, &|| false, &mut |_| ()).unwrap().remove(0)
}

#[test]
fn every_repetition_starts_at_the_depth_and_has_a_gap_less_than_tokens() {
    let mut mock = Mock::new(&[5]);
    let m = one(&mut mock, TG8, repeat(3, false));
    assert_eq!(mock.steps, [(100..108), (100..108), (100..108)].map(Vec::from_iter).concat());
    assert_eq!(m.repetitions.len(), 3);
    assert!(m.device_clock && m.warmup.is_none());
    assert!(m.repetitions.iter().all(|r| r.gaps_ns == [5; 7]));
    assert_eq!(m.token_ms().len(), 21);
}

#[test]
fn a_prompt_and_generation_take_their_sum_of_steps() {
    for (n_prompt, n_gen, inputs) in [(5, 3, 5), (5, 0, 5), (0, 4, 1), (1, 0, 1), (0, 1, 1)] {
        let mut mock = Mock::new(&[5]);
        let test = Test { n_prompt, n_gen, depth: 0 };
        one(&mut mock, test, repeat(1, false));
        assert_eq!(mock.steps.len() as u32, n_prompt + n_gen, "{test}");
        assert_eq!(mock.inputs.len(), inputs, "{test}");
        assert!(mock.inputs.iter().all(|&id| id < 10));
    }
}

#[test]
fn warm_up_ends_when_two_rounds_agree() {
    let mut mock = Mock::new(&[5]);
    let m = one(&mut mock, TG8, repeat(1, true));
    let warmup = m.warmup.unwrap();
    assert_eq!((warmup.rounds, warmup.tokens, warmup.stable), (2, 16, true));
    assert_eq!(mock.steps.len(), 24);
}

#[test]
fn warm_up_gives_up_on_times_that_never_agree() {
    // Each round of eight is twice as slow as the one before.
    let times: Vec<u64> = (0..88).map(|i| 1 << (i / 8)).collect();
    let m = one(&mut Mock::new(&times), TG8, repeat(1, true));
    let warmup = m.warmup.unwrap();
    assert_eq!((warmup.rounds, warmup.stable), (WARMUP_ROUNDS, false));
}

#[test]
fn progress_tells_the_warm_up_from_what_is_measured() {
    let (mut warm, mut measured) = (0, 0);
    let mut count = |is_measured| *if is_measured { &mut measured } else { &mut warm } += 1;
    let mut mock = Mock::new(&[5]);
    let m = watched(&mut [&mut mock], TG8, repeat(3, true), &|| false, &mut count).unwrap();
    assert_eq!((warm, measured), (m[0].warmup.unwrap().tokens, 24));
}

#[test]
fn an_interrupt_keeps_the_repetitions_that_were_completed() {
    let tokens = std::cell::Cell::new(0);
    let stop = || tokens.get() > 20;
    let mut count = |_| tokens.set(tokens.get() + 1);
    let mut mock = Mock::new(&[5]);
    let m = watched(&mut [&mut mock], TG8, repeat(5, false), &stop, &mut count).unwrap();
    assert_eq!(m[0].repetitions.len(), 2);
    assert_eq!(tokens.get(), 21);
    let nothing = watched(&mut [&mut mock], TG8, repeat(5, true), &|| true, &mut |_| ());
    assert!(matches!(nothing, Err(Error::Interrupted)));
}

#[test]
fn an_interrupt_between_two_decoders_keeps_whole_pairs() {
    let tokens = std::cell::Cell::new(0);
    let stop = || tokens.get() > 28;
    let mut count = |_| tokens.set(tokens.get() + 1);
    let (mut a, mut b) = (Mock::new(&[5]), Mock::new(&[7]));
    let m = watched(&mut [&mut a, &mut b], TG8, repeat(5, false), &stop, &mut count).unwrap();
    // The second had completed its second repetition, the first had not.
    assert_eq!((m[0].repetitions.len(), m[1].repetitions.len()), (1, 1));
}

#[test]
fn repetitions_of_two_decoders_alternate_and_so_does_who_goes_first() {
    let order = std::cell::RefCell::new(String::new());
    struct Named<'a>(Mock, char, &'a std::cell::RefCell<String>);
    impl Decoder for Named<'_> {
        fn seek(&mut self, depth: u32) -> Result<()> {
            self.2.borrow_mut().push(self.1);
            self.0.seek(depth)
        }
        fn decode(
            &mut self,
            inputs: &[u32],
            n_predict: u32,
            sink: &mut dyn FnMut(Chosen) -> ControlFlow<()>,
        ) -> Result<Finish> {
            self.0.decode(inputs, n_predict, sink)
        }
        fn vocab(&self) -> u32 {
            10
        }
    }
    let mut a = Named(Mock::new(&[5]), 'a', &order);
    let mut b = Named(Mock::new(&[9]), 'b', &order);
    let all = [&mut a as &mut dyn Decoder, &mut b];
    let mut all = all;
    let m = watched(&mut all, TG8, repeat(4, false), &|| false, &mut |_| ()).unwrap();
    assert_eq!(*order.borrow(), "abbaabba");
    assert_eq!((m[0].medians_ms(), m[1].medians_ms()), (vec![5e-6; 4], vec![9e-6; 4]));
}

#[test]
fn noise_asks_for_more_repetitions_until_it_is_low_or_there_are_too_many() {
    let noise = |max| Repeat { max_noise: Some(max), ..repeat(2, false) };
    // Without noise: as few as can tell.
    let m = one(&mut Mock::new(&[5]), TG8, noise(0.5));
    assert_eq!((m.repetitions.len(), m.noise_percent()), (NOISE_REPETITIONS, Some(0.0)));
    // Repetitions that take 1, 2, 3 … each: never.
    let times: Vec<u64> = (0..96).map(|i| 1000 * (1 + i / 8)).collect();
    let m = one(&mut Mock::new(&times), TG8, noise(0.5));
    assert_eq!(m.repetitions.len(), 12);
    assert!(m.noise_percent().unwrap() > 10.0);
    assert_eq!(one(&mut Mock::new(&[5]), TG8, repeat(4, false)).noise_percent(), None);
}

#[test]
fn an_outlier_is_told_with_its_position_and_the_device_then() {
    // The sixth token of the second repetition of eight.
    let mut times: Vec<u64> = (0..32).map(|i| 1_000_000 + 1000 * (i % 3)).collect();
    times[13] = 9_000_000;
    let mut m = one(&mut Mock::new(&times), TG8, repeat(4, false));
    let reading = Reading { sm_mhz: Some(1200), ..Reading::default() };
    let sample = |at_ms, reading| crate::bench::telemetry::Sample { at_ms, reading };
    let samples = vec![sample(0.0, Reading::default()), sample(12.0, reading)];
    m.repetitions[1].span = Some(Span { samples, joules: None });
    m.repetitions[1].first_ns = 1_000_000;
    let outliers = m.outliers();
    assert_eq!(outliers.len(), 1);
    let o = &outliers[0];
    assert_eq!((o.repetition, o.position, o.ms, o.reading), (1, 105, 9.0, Some(reading)));
    assert!((o.at_ms - 14.0).abs() < 0.1, "{o:?}");
}

#[test]
fn time_to_first_token_is_that_of_the_prompt() {
    let test = Test { n_prompt: 5, n_gen: 3, depth: 0 };
    let m = one(&mut Mock::new(&[5]), test, repeat(1, false));
    let r = &m.repetitions[0];
    assert!(r.first_ns < r.ttft_ns && r.ttft_ns < r.ns, "{r:?}");
}

#[test]
fn without_a_device_clock_the_host_clock_is_used_and_said() {
    let mut mock = Mock::new(&[5]);
    mock.device = false;
    let m = one(&mut mock, TG8, repeat(1, false));
    assert!(!m.device_clock);
    assert_eq!(m.repetitions[0].gaps_ns.len(), 7);
}

#[test]
fn a_test_is_named_as_llama_bench_names_it() {
    let name = |n_prompt, n_gen, depth| Test { n_prompt, n_gen, depth }.to_string();
    assert_eq!(name(512, 0, 0), "pp512");
    assert_eq!(name(0, 128, 4096), "tg128 @ d4096");
    assert_eq!(name(512, 128, 0), "pp512+tg128");
}
