use super::*;
use crate::ops::WeightId;

fn addresses() -> Addresses {
    Addresses {
        weights: vec![0x1000, 0x1008],
        buffers: vec![Some(0x2000), None],
        caches: 0x10_000,
        map: CacheMap { half: 512 },
        layers: 2,
        step: 0x4000,
        ring: 0x8000,
    }
}

#[test]
fn every_argument_becomes_one_slot() {
    let a = addresses();
    let slot = |arg| a.slot("L00.x", &arg).unwrap();
    assert_eq!(slot(Arg::Buf(Buf(0))), 0x2000);
    assert_eq!(slot(Arg::Weight(WeightId(0))), 0x1000);
    assert_eq!(slot(Arg::Null), 0);
    assert_eq!(slot(Arg::Step), 0x4000);
    assert_eq!(slot(Arg::Counters), 0x4100);
    assert_eq!(slot(Arg::Forced), 0x5100);
    assert_eq!(slot(Arg::Ring), 0x8000);
    assert_eq!(slot(Arg::Keys(1)), 0x10_000 + 1024);
    assert_eq!(slot(Arg::Values(1)), 0x10_000 + 1536);
    assert_eq!(slot(Arg::U32(7)), 7);
    assert_eq!(slot(Arg::F32(1.5)), 0x3FC0_0000, "the bits, in the low half");
}

#[test]
fn a_null_misaligned_or_unknown_address_is_refused_by_field_name() {
    let mut a = addresses();
    let text = |a: &Addresses, arg| a.slot("L01.attn.q", &arg).unwrap_err().to_string();
    let misaligned = text(&a, Arg::Weight(WeightId(1)));
    assert!(misaligned.contains("L01.attn.q: Weight(WeightId(1)) has the address 0x1008"));
    assert!(text(&a, Arg::Weight(WeightId(2))).contains("names nothing in the plan"));
    assert!(text(&a, Arg::Buf(Buf(1))).contains("Buf(Buf(1)) names nothing"));
    assert!(text(&a, Arg::Keys(2)).contains("Keys(2) names nothing"));
    a.ring = 0;
    assert!(text(&a, Arg::Ring).contains("Ring has the address 0x0"));
}

#[test]
fn what_does_not_fit_is_refused_with_its_parts_before_anything_is_allocated() {
    let bytes = BytePlan { weights: 4000, caches: 500, workspace: 60, state: 7 };
    assert!(bytes.check(4567 + RESERVE).is_ok());
    let error = bytes.check(4566 + RESERVE).unwrap_err();
    assert_eq!(error.exit_code(), 6);
    let text = error.to_string();
    for part in ["weights 4000", "KV cache 500", "workspace 60", "state 7"] {
        assert!(text.contains(part), "{text}");
    }
}
