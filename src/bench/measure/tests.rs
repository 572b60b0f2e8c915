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
    Repeat { times, warmup, delay: Duration::ZERO }
}

#[test]
fn every_repetition_starts_at_the_depth_and_has_a_gap_less_than_tokens() {
    let mut mock = Mock::new(&[5]);
    let m = measure(&mut mock, TG8, repeat(3, false), &|| false, &mut || ()).unwrap();
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
        measure(&mut mock, test, repeat(1, false), &|| false, &mut || ()).unwrap();
        assert_eq!(mock.steps.len() as u32, n_prompt + n_gen, "{test}");
        assert_eq!(mock.inputs.len(), inputs, "{test}");
        assert!(mock.inputs.iter().all(|&id| id < 10));
    }
}

#[test]
fn warm_up_ends_when_two_rounds_agree() {
    let mut mock = Mock::new(&[5]);
    let m = measure(&mut mock, TG8, repeat(1, true), &|| false, &mut || ()).unwrap();
    let warmup = m.warmup.unwrap();
    assert_eq!((warmup.rounds, warmup.tokens, warmup.stable), (2, 16, true));
    assert_eq!(mock.steps.len(), 24);
}

#[test]
fn warm_up_gives_up_on_times_that_never_agree() {
    // Each round of eight is twice as slow as the one before.
    let times: Vec<u64> = (0..88).map(|i| 1 << (i / 8)).collect();
    let m = measure(&mut Mock::new(&times), TG8, repeat(1, true), &|| false, &mut || ()).unwrap();
    let warmup = m.warmup.unwrap();
    assert_eq!((warmup.rounds, warmup.stable), (WARMUP_ROUNDS, false));
}

#[test]
fn an_interrupt_keeps_the_repetitions_that_were_completed() {
    let tokens = std::cell::Cell::new(0);
    let stop = || tokens.get() > 20;
    let mut count = || tokens.set(tokens.get() + 1);
    let m = measure(&mut Mock::new(&[5]), TG8, repeat(5, false), &stop, &mut count).unwrap();
    assert_eq!(m.repetitions.len(), 2);
    assert_eq!(tokens.get(), 21);
    let nothing = measure(&mut Mock::new(&[5]), TG8, repeat(5, true), &|| true, &mut || ());
    assert!(matches!(nothing, Err(Error::Interrupted)));
}

#[test]
fn without_a_device_clock_the_host_clock_is_used_and_said() {
    let mut mock = Mock::new(&[5]);
    mock.device = false;
    let m = measure(&mut mock, TG8, repeat(1, false), &|| false, &mut || ()).unwrap();
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
