//! Known failures of such systems, planted one by one into the fake driver's kernels, graphs and ring:
//! each must be caught by a check that the crate makes or offers. Without a plant all of them are
//! silent, so that a check which always fails is no proof.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod fake_driver;
mod small_model;

use decode_graph::arch::{PlanOptions, record};
use decode_graph::checkpoint::Checkpoint;
use decode_graph::cuda::{CudaEngine, CudaOptions};
use decode_graph::error::{Error, Result};
use decode_graph::ops::KvType;
use decode_graph::plan::fuse;
use decode_graph::quant::QuantFormat;
use decode_graph::session::{BackendChoice, DebugLevel, DecodeSession, Mode, SessionOptions};
use fake_driver::{Fake, Plant};
use small_model::{Key, SmallModel};
use std::ops::ControlFlow;

const CAPACITY: u32 = 12;
/// No multiple of a tile's 16 rows.
const VOCAB: u64 = 90;

/// Which check must catch a plant.
#[derive(Clone, Copy, Debug)]
enum By {
    /// An error of the session, with these words in it.
    Error(&'static str),
    /// Replay and eager issue differ in a bit: tokens, logits or cache.
    Replay,
    /// Device and CPU reference differ in a bit.
    Reference,
    /// The comparison of `GPU_DEBUG=2` names this op first.
    Step(&'static str),
    /// A red zone is found changed, with these words.
    RedZone(&'static str),
}

/// The model in memory, with `change` made to the bytes of its first tensor, the embeddings.
fn model(change: impl Fn(&mut [u8])) -> Checkpoint {
    let mut m = SmallModel::new("llama", QuantFormat::Q8_0);
    m.change("token_embd.weight", |t| t.shape[1] = VOCAB);
    m.set("llama.vocab_size", Key::U32(VOCAB as u32));
    let path = m.write(tempfile::tempdir().unwrap().keep().as_path());
    let mut bytes = std::fs::read(&path).unwrap();
    std::fs::remove_dir_all(path.parent().unwrap()).unwrap();
    let size = |t: &small_model::Tensor| {
        let row = t.format.row_bytes(t.shape[0] as usize).unwrap();
        (row * t.shape[1..].iter().product::<u64>() as usize).next_multiple_of(32)
    };
    let data = bytes.len() - m.tensors.iter().map(size).sum::<usize>();
    let embeddings = m.tensors[0].format.row_bytes(m.tensors[0].shape[0] as usize).unwrap();
    change(&mut bytes[data..data + embeddings * VOCAB as usize]);
    Checkpoint::from_gguf("planted.gguf".as_ref(), bytes).unwrap()
}

/// Bits of everything that a session leaves.
type Bits = (Vec<u32>, Vec<u32>, Vec<u32>, Vec<u32>);

fn run(checkpoint: &Checkpoint, backend: BackendChoice, mode: Mode) -> Result<Bits> {
    let options = SessionOptions {
        backend,
        mode,
        capacity: CAPACITY,
        kv: Some(KvType::F16),
        persistent: false,
        ..SessionOptions::default()
    };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {})?;
    let mut tokens = Vec::new();
    session.decode(&[5, 9, 2], 5, &mut |c| {
        tokens.push(c.token);
        ControlFlow::Continue(())
    })?;
    let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect();
    let logits = bits(session.logits()?);
    let (keys, values) = session.cache(1)?;
    Ok((tokens, logits, bits(keys), bits(values)))
}

fn engine(checkpoint: &Checkpoint, mode: Mode, debug: DebugLevel) -> CudaEngine {
    let plain = record(checkpoint, PlanOptions { capacity: CAPACITY, kv: KvType::F16 }).unwrap();
    let options = CudaOptions { mode, debug, persistent: false, ..CudaOptions::default() };
    CudaEngine::new(checkpoint, &fuse::fuse(&plain), options, &mut |_, _| {}).unwrap()
}

/// The op that the step-by-step comparison finds wrong first.
fn first_wrong_step(checkpoint: &Checkpoint) -> Option<&'static str> {
    let mut engine = engine(checkpoint, Mode::Eager, DebugLevel::Compare);
    engine.seek(0).unwrap();
    engine.force(0, &[5, 9, 2]).unwrap();
    // A step that reports itself ends the run; what was compared before it counts.
    let _ = engine.run(4, &mut |_| ControlFlow::Continue(()));
    let wrong = |c: &&decode_graph::cuda::eager::Comparison| c.what != "token" && c.nmse > 1e-7;
    engine.comparisons().iter().find(wrong).map(|c| c.op)
}

fn after_a_run_between_red_zones(checkpoint: &Checkpoint, mode: Mode) -> Result<()> {
    let options = SessionOptions {
        backend: BackendChoice::Cuda,
        mode,
        capacity: CAPACITY,
        red_zones: true,
        persistent: false,
        ..SessionOptions::default()
    };
    let mut session = DecodeSession::new(checkpoint, &options, &mut |_, _| {})?;
    session.decode(&[5, 9, 2], 5, &mut |_| ControlFlow::Continue(()))?;
    session.poison(0x7E)?;
    session.feed(1)?;
    session.check_red_zones()
}

/// Whether `by` speaks up, and what it says.
fn speaks(by: By, checkpoint: &Checkpoint) -> (bool, String) {
    let on = |mode| run(checkpoint, BackendChoice::Cuda, mode);
    match by {
        By::Error(words) => match on(Mode::Graph) {
            Ok(_) => (false, "no error".to_owned()),
            Err(error) => (error.to_string().contains(words), error.to_string()),
        },
        By::Replay => {
            let (replay, eager) = (on(Mode::Graph).unwrap(), on(Mode::Eager).unwrap());
            (replay != eager, format!("{:?} {:?}", replay.0, eager.0))
        }
        By::Reference => {
            let device = on(Mode::Graph).unwrap();
            let host = run(checkpoint, BackendChoice::Cpu, Mode::Graph).unwrap();
            (device != host, format!("{:?} {:?}", device.0, host.0))
        }
        By::RedZone(words) => {
            let looked: Vec<_> = [Mode::Graph, Mode::Eager]
                .into_iter()
                .map(|mode| after_a_run_between_red_zones(checkpoint, mode))
                .map(|checked| checked.err().map(|e| e.to_string()))
                .collect();
            let found = |said: &Option<String>| said.as_ref().is_some_and(|s| s.contains(words));
            (looked.iter().all(found), format!("{looked:?}"))
        }
        By::Step(op) => {
            let found = first_wrong_step(checkpoint);
            (found == Some(op), format!("{found:?}"))
        }
    }
}

fn is_caught(plant: Plant, by: &[By], checkpoint: &Checkpoint) {
    let fake = Fake::new();
    for by in by {
        let (speaks_up, said) = speaks(*by, checkpoint);
        assert!(!speaks_up, "{by:?} speaks up without a plant: {said}");
    }
    for by in by {
        fake.restart();
        fake.plant(Some(plant));
        let (speaks_up, said) = speaks(*by, checkpoint);
        assert!(speaks_up, "{plant:?} is not caught by {by:?}: {said}");
    }
}

macro_rules! caught {
    ($($name:ident: $plant:ident by $($by:expr),+;)*) => {
        use By::{RedZone, Reference, Replay, Step};
        $(
            #[test]
            fn $name() {
                is_caught(Plant::$plant, &[$($by),+], &model(|_| ()));
            }
        )*
    };
}

caught! {
    a_pointer_that_went_stale_after_the_capture_is_a_fault: StalePointer by By::Error("(700)");
    a_position_frozen_in_the_graph_is_caught: FrozenPosition by Replay, Reference;
    a_kernel_that_was_not_captured_is_caught: DroppedNode by By::Error("nodes for");
    a_kernel_on_another_stream_is_caught: OtherStream by By::Error("nodes for");
    kernels_captured_in_the_wrong_order_are_caught: SwappedNodes by By::Error("captured graph");
    a_layer_left_out_of_a_replay_is_caught: LastLayerSkipped by Replay, Reference;
    a_cache_row_of_the_wrong_head_is_caught: KvOneHeadOff by Step("qkv"), Reference;
    a_cache_row_one_position_late_is_caught: KvOnePositionLate by Step("qkv"), Reference;
    keys_and_values_that_change_places_are_caught: KeysForValues by Step("qkv"), Reference;
    a_rotation_of_the_wrong_pairs_is_caught: RopePairs by Step("qkv"), Reference;
    a_rotation_by_the_position_before_is_caught: RopePositionBefore by Step("qkv"), Reference;
    the_scale_of_another_block_is_caught: SubBlockScale by Step("embed"), Reference;
    rows_of_a_partial_tile_left_unwritten_are_caught: LastTile by Step("lm_head"), Reference;
    activations_of_the_token_before_are_caught: ReusedActivations by Step("gate_up"), Reference;
    a_forced_input_that_is_not_taken_is_caught: ForcedIgnored by Reference;
    an_element_behind_an_output_is_caught: OutputOverrun by RedZone("workspace: byte 0 behind residual");
    a_row_behind_the_cache_is_caught: CacheOverrun by RedZone("KV cache: byte 0 behind the keys of layer 0");
    attention_over_the_positions_of_the_capture_is_caught: GridFromPosition by Replay, Reference;
    a_ring_entry_of_the_step_before_is_caught: RingOneStepBehind by By::Error("without a token");
}

#[test]
fn of_equal_logits_the_last_one_instead_of_the_first_is_caught() {
    // Every row of the tied head stands twice: the best logit does, too.
    let twins = model(|rows| {
        let row = rows.len() / VOCAB as usize;
        for pair in rows.chunks_exact_mut(2 * row) {
            let (first, second) = pair.split_at_mut(row);
            second.copy_from_slice(first);
        }
    });
    is_caught(Plant::ArgmaxTies, &[Reference], &twins);
}

#[test]
fn logits_that_are_not_finite_are_reported_and_not_reporting_them_is_caught() {
    // A scale of 0xFFFF is a NaN, in the row of a token that is no input.
    let broken = model(|rows| {
        let row = rows.len() / VOCAB as usize;
        rows[80 * row..81 * row].fill(0xFF);
    });
    let fake = Fake::new();
    let error = run(&broken, BackendChoice::Cuda, Mode::Graph).unwrap_err();
    assert!(matches!(&error, Error::Decode { position: 0, what } if what.contains("not finite")));
    assert_eq!(run(&broken, BackendChoice::Cpu, Mode::Graph).unwrap_err().exit_code(), 1);
    fake.plant(Some(Plant::NonFiniteIgnored));
    assert!(run(&broken, BackendChoice::Cuda, Mode::Graph).is_ok(), "the plant does nothing");
}

#[test]
fn nothing_is_computed_at_the_capacity_and_computing_it_is_caught() {
    let checkpoint = model(|_| ());
    let fake = Fake::new();
    for mode in [Mode::Graph, Mode::Eager] {
        let tokens = |plant| {
            fake.restart();
            fake.plant(plant);
            let mut engine = engine(&checkpoint, mode, DebugLevel::Off);
            engine.seek(CAPACITY - 2).unwrap();
            engine.force(CAPACITY - 2, &[5]).unwrap();
            engine.run(5, &mut |_| ControlFlow::Continue(()))
        };
        assert_eq!(tokens(None).unwrap(), 2, "{mode:?}");
        let kept = tokens(Some(Plant::CapacityIgnored));
        assert!(kept.is_err() || kept.unwrap() > 2, "{mode:?}: the plant does nothing");
    }
}
