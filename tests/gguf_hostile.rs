//! Malformed GGUF files: each gives a typed error that says what and where, and no panic.

#![allow(missing_docs, clippy::unwrap_used)]

mod counting_allocator;
mod gguf_file;
mod warnings;

use counting_allocator::{bounded, measured};
use decode_graph::checkpoint::{Checkpoint, TensorInfo, Value, write_gguf};
use decode_graph::error::{Defect, Error};
use gguf_file::{Gguf, defect, minimal, open, scratch, text};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

fn expect(id: &str, bytes: &[u8], wanted: Defect) -> String {
    let (found, offset, why) = bounded(id, bytes.len(), || defect(bytes));
    assert_eq!(found, wanted, "{id}: {why}");
    assert!(offset.is_some(), "{id}: no place: {why}");
    why
}

fn header(change: impl Fn(&mut Gguf)) -> Vec<u8> {
    let mut g = Gguf::default();
    change(&mut g);
    g.bytes()
}

#[test]
fn a_broken_header_is_refused_by_class() {
    assert_eq!(defect(b"").1, Some(0), "H01 offset");
    assert_eq!(defect(b"GGUF").1, Some(4), "H02 offset");
    let whole = minimal().bytes();
    for n in 0..24 {
        expect("H01-H03", &whole[..n], Defect::Truncated);
    }
    let magic = |m: &[u8]| [m, &whole[4..]].concat();
    assert!(expect("H04", &magic(b"FUGG"), Defect::BadMagic).contains("FUGG"));
    assert!(expect("H05", &magic(b"GGJT"), Defect::BadMagic).contains("older"));
    assert!(expect("H05", &magic(b"ggml"), Defect::BadMagic).contains("older"));
    for (id, version, says) in [
        ("H06", 0, "does not exist"),
        ("H07", 1, "32-bit counts"),
        ("H08", 4, "newer than 3"),
        ("H09", 0x0300_0000, "big-endian"),
    ] {
        let why = expect(id, &header(|g| g.version = Some(version)), Defect::BadVersion);
        assert!(why.contains(says), "{id}: {why}");
    }
    for count in [u64::MAX, 1 << 32, 1 << 61, 65_537] {
        expect("H10 H11", &header(|g| g.tensor_count = Some(count)), Defect::BadCount);
        expect("H12 H13", &header(|g| g.key_count = Some(count)), Defect::BadCount);
    }
}

#[test]
fn many_keys_take_linear_time() {
    let keys = |n: u32| {
        let mut g = Gguf::default();
        for i in 0..n {
            g = g.key(format!("k{i:08}").as_bytes(), 0, &[0]);
        }
        g
    };
    let [few, most] = [keys(4096).bytes(), keys(65_536).bytes()];
    assert_eq!(open(&most).unwrap().metadata().len(), 65_536);
    // The fastest of a few each: other programs only make them slower.
    let fastest = |bytes: &[u8]| {
        let times = (0..5).map(|_| measured(|| open(bytes).map(drop)).2.as_secs_f64());
        times.fold(f64::INFINITY, f64::min)
    };
    let (few, most) = (fastest(&few), fastest(&most));
    assert!(most < 2.0, "H14: {most} s");
    // A quarter of 16 * 16: memory that the caches do not hold costs more, but not so much.
    assert!(most <= 64.0 * few, "H14: sixteen times the keys take {} times as long", most / few);
    println!("H14: {:.2} and {:.2} microseconds a key", few / 4096e-6, most / 65_536e-6);
    // A million is beyond the limit, whether they are there or not.
    let million = keys(1_000_000);
    expect("H14", &million.bytes(), Defect::BadCount);
    let mut over = keys(8);
    over.key_count = Some(1_000_000);
    expect("H14 claimed", &over.bytes(), Defect::BadCount);
}

#[test]
fn an_empty_container_opens_and_then_lacks_its_architecture() {
    let c = open(&Gguf::default().bytes()).unwrap();
    assert!(c.tensors().is_empty());
    assert!(matches!(
        c.architecture(),
        Err(Error::InvalidModel { defect: Defect::MissingKey, .. })
    ));
}

#[test]
fn broken_keys_are_refused_by_class() {
    let with = |g: Gguf| g.bytes();
    let raw_length = |n: u64| with(Gguf::default().raw_key(&n.to_le_bytes()));
    expect("K01", &raw_length(u64::MAX), Defect::BadString);
    expect("K02", &raw_length(1 << 63), Defect::BadString);
    let named = |key: &[u8]| with(Gguf::default().key(key, 0, &[1]));
    expect("K03", &named(b""), Defect::BadKey);
    expect("K04", &named(&[b'k'; 65_536]), Defect::BadKey);
    assert!(open(&named(&[b'k'; 65_535])).is_ok(), "K04 at the limit");
    for key in [&b"a\0b"[..], "ä".as_bytes(), b"\xff"] {
        expect("K05", &named(key), Defect::BadKey);
    }
    let twice = |kind, v: &[u8]| with(Gguf::default().key(b"k", 0, &[1]).key(b"k", kind, v));
    expect("K06", &twice(0, &[1]), Defect::Duplicate);
    expect("K07", &twice(4, &[1, 0, 0, 0]), Defect::Duplicate);
}

#[test]
fn broken_values_are_refused_by_class() {
    let value = |kind, v: &[u8]| Gguf::default().key(b"k", kind, v);
    for kind in [13, u32::MAX, 1 << 31] {
        expect("K08 K09", &value(kind, &[0; 8]).bytes(), Defect::BadType);
    }
    // header() has no padding, so the length is one more than the bytes left.
    expect(
        "K10",
        &value(8, &[&4u64.to_le_bytes()[..], b"abc"].concat()).header(),
        Defect::Truncated,
    );
    expect("K11", &value(8, &(1u64 << 63).to_le_bytes()).bytes(), Defect::BadString);
    expect("K13", &value(7, &[2]).bytes(), Defect::BadValue);
    let array = |kind, count, v: &[u8]| Gguf::default().array(b"k", kind, count, v).bytes();
    expect("K13", &array(7, 2, &[1, 2]), Defect::BadValue);
    expect("K14", &array(13, 1, &[0; 8]), Defect::BadArray);
    expect("K15", &array(10, 1 << 61, &[0; 8]), Defect::BadArray);
    let nested = [&8u32.to_le_bytes()[..], &0u64.to_le_bytes()].concat();
    assert!(expect("K16", &array(9, 1, &nested), Defect::BadArray).contains("nested"));
    let deep = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes()].concat().repeat(100_000);
    expect("K17", &array(9, 1, &deep), Defect::BadArray);
    expect("K18", &array(8, 1 << 30, &[0; 64]), Defect::BadArray);
    expect("K18 under the cap", &array(8, 1 << 20, &[0; 64]), Defect::Truncated);
    expect("K18 at the cap", &array(10, 16 << 20, &[0; 64]), Defect::Truncated);
    // As many as an array may have, each in its byte and no more; one more is too many.
    let most = 16 << 20;
    let (whole, over) = (array(0, most, &vec![7; most as usize]), array(0, most + 1, &[7; 64]));
    let (c, peak, _) = measured(|| open(&whole).unwrap());
    assert!(peak <= 2 * whole.len() as u64 + (8 << 20), "K19: {peak} bytes for {}", whole.len());
    assert!(
        matches!(c.metadata().entry("k").unwrap().value, Value::Array(a) if a.len() == 16 << 20)
    );
    expect("K19 over", &over, Defect::BadArray);
}

#[test]
fn text_that_is_not_utf8_is_kept_and_refused_only_as_text() {
    let c = open(&Gguf::default().key(b"k", 8, &text(b"\xffx")).bytes()).unwrap();
    assert!(matches!(
        c.str_key("k"),
        Err(Error::InvalidModel { defect: Defect::BadString, offset: Some(_), .. })
    ));
    assert_eq!(c.metadata().entry("k").unwrap().value.to_string(), "\u{FFFD}x");
}

#[test]
fn the_alignment_is_a_u32_power_of_two_within_bounds() {
    let aligned = |kind, v: &[u8]| Gguf::default().key(b"general.alignment", kind, v);
    for bad in [0u32, 1, 4, 13, 24, 1 << 17, 1 << 31] {
        expect("K20-K23", &aligned(4, &bad.to_le_bytes()).bytes(), Defect::BadAlignment);
    }
    expect("K24", &aligned(5, &32u32.to_le_bytes()).bytes(), Defect::BadType);
    expect("K24", &aligned(8, &text(b"32")).bytes(), Defect::BadType);
    let twice = aligned(4, &32u32.to_le_bytes()).key(b"general.alignment", 4, &[32, 0, 0, 0]);
    expect("K25", &twice.bytes(), Defect::Duplicate);
    let c = open(
        &aligned(4, &64u32.to_le_bytes())
            .info(b"a", &[4], 0, 0)
            .info(b"b", &[1], 0, 64)
            .padded_data(&[[1u8; 64], [2u8; 64]].concat(), 64),
    )
    .unwrap();
    assert_eq!(c.read_all(c.tensor("b").unwrap()).unwrap(), [2; 4]);
}

/// The limits that SECURITY.md names of the container; those of counts, keys, names and arrays stand
/// beside the cases of their own.
#[test]
fn every_limit_of_the_container_holds_at_its_last_value() {
    for alignment in [8u32, 1 << 16] {
        let g = Gguf::default().key(b"general.alignment", 4, &alignment.to_le_bytes());
        let bytes = g.info(b"a", &[4], 0, 0).padded_data(&[1; 16], alignment as usize);
        let c = open(&bytes).unwrap();
        assert_eq!(c.read_all(c.tensor("a").unwrap()).unwrap(), [1; 16], "{alignment}");
    }
    let string = |length: usize| Gguf::default().key(b"k", 8, &text(&vec![b'x'; length])).bytes();
    assert!(open(&string(16 << 20)).is_ok());
    expect("string", &string((16 << 20) + 1), Defect::BadString);
    let tensors = |n: u64| {
        let named = |i: u64| format!("t{i}").into_bytes();
        let all = (0..n).fold(Gguf::default(), |g, i| g.info(&named(i), &[1], 0, 32 * i));
        all.padded_data(&vec![0; 32 * n as usize], 32)
    };
    assert_eq!(open(&tensors(65_536)).unwrap().tensors().len(), 65_536);
    let shaped = |dims: &[u64]| Gguf::default().info(b"t", dims, 24, 0).padded_data(&[0; 64], 32);
    assert!(Checkpoint::inspect_only(&scratch("m.gguf", &shaped(&[2; 4])).path).is_ok());
    // What is wrong then is only that the data is not there.
    expect("elements", &shaped(&[1 << 21, 1 << 21]), Defect::Truncated);
    expect("elements over", &shaped(&[1 << 21, (1 << 21) + 1]), Defect::SizeOverflow);
}

/// K27, D01, D02 and the rest of the header at once.
#[test]
fn every_truncation_is_an_error_that_says_truncated() {
    let whole = minimal().bytes();
    assert!(open(&whole).is_ok());
    for n in 0..whole.len() {
        expect(&format!("cut at {n}"), &whole[..n], Defect::Truncated);
    }
}

/// Name, shape and bytes of a tensor.
type Content = (String, Vec<u64>, Vec<u8>);

/// All keys, and all tensors with their bytes.
fn content(c: &Checkpoint) -> (String, Vec<Content>) {
    // As text: a NaN is not equal to itself.
    let keys = c.metadata().entries().map(|e| format!("{}={:?};", e.key, e.value)).collect();
    let tensor =
        |t: &TensorInfo| -> Content { (t.name.clone(), t.shape.clone(), c.read_all(t).unwrap()) };
    (keys, c.tensors().iter().map(tensor).collect())
}

#[test]
fn every_single_bit_flip_is_an_error_or_a_file_that_reads() {
    let whole = minimal().bytes();
    let file = scratch("model.gguf", &whole);
    let writer = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    for bit in 0..whole.len() * 8 {
        let at = bit / 8;
        writer.write_all_at(&[whole[at] ^ (1 << (bit % 8))], at as u64).unwrap();
        let row = format!("bit {bit}");
        let outcome = bounded(&row, whole.len(), || {
            let _ = Checkpoint::inspect_only(&file.path);
            Checkpoint::open(&file.path)
        });
        match outcome {
            Err(Error::InvalidModel { path, at, offset, .. }) => {
                assert!(path == file.path && !at.is_empty() && offset.is_some(), "{row}: {at}");
            }
            Err(Error::Unsupported { path, at, .. }) => {
                assert!(path == file.path && at.contains("weight"), "{row}: {at}");
            }
            Err(error) => panic!("{row}: {error}"),
            Ok(c) => {
                // Accepted: written anew and read again, it is the same model.
                let copy = file.path.with_file_name("copy.gguf");
                write_gguf(&c, &copy, &mut |_, _| {}).unwrap();
                assert_eq!(content(&Checkpoint::open(&copy).unwrap()), content(&c), "{row}");
            }
        }
        writer.write_all_at(&whole[at..=at], at as u64).unwrap();
    }
}

#[test]
fn broken_tensor_names_and_shapes_are_refused_by_class() {
    let named = |name: &[u8]| Gguf::default().info(name, &[8], 0, 0).padded_data(&[0; 32], 32);
    expect("T01", &named(&[b'n'; 65]), Defect::BadName);
    assert!(open(&named(&[b'n'; 64])).is_ok(), "T01 at the limit");
    expect("T02", &Gguf::default().raw_info(&[0xFF; 8]).bytes(), Defect::BadString);
    let twice = Gguf::default().tensor("a", &[8], 0, &[0; 32]).tensor("a", &[8], 0, &[0; 32]);
    expect("T03", &twice.bytes(), Defect::Duplicate);
    for name in [&b"../x"[..], b"a..b", b"a\0b", b"", b"\xff"] {
        expect("T04", &named(name), Defect::BadName);
    }
    let shaped =
        |dims: &[u64], kind| Gguf::default().info(b"t", dims, kind, 0).padded_data(&[0; 64], 32);
    expect("T05", &shaped(&[], 0), Defect::BadShape);
    expect("T06", &shaped(&[1; 5], 0), Defect::BadShape);
    let endless = [&text(b"t")[..], &u32::MAX.to_le_bytes()].concat();
    expect("T07", &Gguf::default().raw_info(&endless).bytes(), Defect::BadShape);
    expect("T08", &shaped(&[32, 0], 2), Defect::BadShape);
    expect("T08", &shaped(&[0], 12), Defect::BadShape);
    expect("T09", &shaped(&[u64::MAX], 0), Defect::BadShape);
    for kind in [0, 12] {
        expect("T10", &shaped(&[(1 << 42) + 1], kind), Defect::SizeOverflow);
        expect("T11", &shaped(&[1 << 32, 1 << 32], kind), Defect::SizeOverflow);
        expect("T12", &shaped(&[1 << 31, 1 << 31], kind), Defect::SizeOverflow);
    }
    // Two of them, whose sizes' sum wraps: the first is beyond any weight already.
    let half = 0x7FFF_FFFF_FFFF_FFC0;
    let two = Gguf::default().info(b"a", &[half], 24, 0).info(b"b", &[half], 24, half);
    expect("T13", &two.padded_data(&[0; 128], 32), Defect::SizeOverflow);
    expect("T18", &shaped(&[31], 2), Defect::BadShape);
    expect("T18", &shaped(&[255], 12), Defect::BadShape);
    expect("T19", &shaped(&[16, 2], 2), Defect::BadShape);
}

#[test]
fn undefined_and_removed_tensor_types_are_refused_by_id() {
    let typed = |kind| Gguf::default().info(b"t", &[256], kind, 0).padded_data(&[0; 2048], 32);
    expect("T14", &typed(43), Defect::UnknownType);
    expect("T15", &typed(u32::MAX), Defect::UnknownType);
    for id in [4, 5, 31, 32, 33, 36, 37, 38] {
        let why = expect("T16", &typed(id), Defect::UnknownType);
        assert!(why.contains("removed") && why.contains(&id.to_string()), "{why}");
    }
}

#[test]
fn a_known_type_without_kernels_is_refused_by_name_and_listed_by_inspect() {
    let sizes = [(19, "IQ1_S", 50), (34, "TQ1_0", 54), (40, "NVFP4", 144), (27, "I64", 2048)];
    for (id, name, bytes) in sizes.into_iter().chain([(28, "F64", 2048)]) {
        let g = minimal().tensor("blk.0.odd", &[256], id, &vec![0; bytes]);
        let file = scratch("model.gguf", &g.bytes());
        let Err(Error::Unsupported { at, what, .. }) = Checkpoint::open(&file.path) else {
            panic!("T17 {name}")
        };
        assert!(at.contains("blk.0.odd") && what.contains(name), "{at} {what}");
        let listed = Checkpoint::inspect_only(&file.path).unwrap();
        let last = listed.tensors.last().unwrap();
        assert_eq!((last.type_name.as_str(), last.bytes), (name, Some(bytes as u64)));
        assert_eq!((last.format, &last.shape), (None, &vec![256]));
    }
    // The end of the data is checked before the type is judged.
    let short = Gguf::default().tensor("t", &[256], 19, &[0; 49]);
    expect("T17 short", &short.bytes(), Defect::Truncated);
    // An id that nobody defines has no size: what follows it is listed all the same.
    let g = minimal().tensor("odd", &[256], 77, &[0; 32]).tensor("last", &[8], 0, &[0; 32]);
    let file = scratch("model.gguf", &g.bytes());
    let listed = Checkpoint::inspect_only(&file.path).unwrap();
    assert_eq!(listed.tensors[2].type_name, "type 77");
    assert_eq!((listed.tensors[2].bytes, listed.tensors[3].bytes), (None, Some(32)));
}

#[test]
fn offsets_are_the_running_sum_and_inside_the_file() {
    let two = |a, b| {
        let g = Gguf::default().info(b"a", &[16], 0, a).info(b"b", &[16], 0, b);
        g.padded_data(&[0; 256], 32)
    };
    assert!(open(&two(0, 64)).is_ok());
    for (id, a, b) in [
        ("T20", u64::MAX, 64),
        ("T21", 0, 65),
        ("T22", 1 << 40, 64),
        ("T24", 0, 0),
        ("T25", 0, 96),
        ("T26", 64, 0),
        ("T27", u64::MAX - 31, 0),
    ] {
        expect(id, &two(a, b), Defect::BadOffset);
    }
    let whole = Gguf::default().tensor("a", &[8], 0, &[0; 32]).bytes();
    expect("T23 D01", &whole[..whole.len() - 1], Defect::Truncated);
    expect("D02", &whole[..whole.len() - 32], Defect::Truncated);
    let (junk, said) = warnings::of(|| open(&[&whole[..], b"junk"].concat()));
    assert!(junk.is_ok(), "D03");
    assert!(
        matches!(&said[..], [one] if one.contains(": 4 bytes after the last tensor")),
        "D03: {said:?}"
    );
    assert_eq!(warnings::of(|| open(&whole)).1, [""; 0], "D03: of a whole file nothing");
    let mut dirty = minimal();
    let header = dirty.header().len();
    dirty.data[54] = 0xEE;
    let mut bytes = dirty.bytes();
    bytes[header] = 0xEE;
    assert!(open(&bytes).is_ok(), "D04");
}

#[test]
fn one_part_of_a_split_model_is_refused_naming_the_missing_part() {
    let file = scratch("big-00001-of-00002.gguf", &minimal().bytes());
    let error = Checkpoint::open(&file.path).unwrap_err();
    assert_eq!(error.exit_code(), 3);
    let said = error.to_string();
    assert!(said.contains("big-00002-of-00002.gguf: part 2 of 2: the file is missing"), "{said}");
    let listed = Checkpoint::inspect_only(&file.path).unwrap();
    assert_eq!((listed.files, listed.tensors.len()), (1, 2));

    let renamed = minimal().key(b"split.count", 2, &3u16.to_le_bytes());
    expect("renamed", &renamed.bytes(), Defect::BadSplit);
    let one = scratch("big-00001-of-00001.gguf", &minimal().bytes());
    assert!(Checkpoint::open(&one.path).is_ok());
}

#[test]
fn what_is_no_regular_file_is_refused_without_blocking() {
    let folder = tempfile::tempdir().unwrap();
    let said = Checkpoint::open(folder.path()).unwrap_err();
    assert!(said.exit_code() == 3 && said.to_string().contains("has config.json"), "{said}");
    for path in ["/dev/zero", "/dev/full", "/dev/null", "/nowhere/at/all"] {
        let error = Checkpoint::open(path.as_ref()).unwrap_err();
        assert_eq!(error.exit_code(), 74, "{path}: {error}");
    }
    let fifo = folder.path().join("fifo");
    if std::process::Command::new("mkfifo").arg(&fifo).status().is_ok_and(|s| s.success()) {
        assert_eq!(Checkpoint::open(&fifo).unwrap_err().exit_code(), 74);
    }
    let socket = folder.path().join("socket");
    let _listens = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert_eq!(Checkpoint::open(&socket).unwrap_err().exit_code(), 74);
    let ring = folder.path().join("ring");
    std::os::unix::fs::symlink(&ring, &ring).unwrap();
    assert_eq!(Checkpoint::open(&ring).unwrap_err().exit_code(), 74);
}

#[test]
fn a_file_cut_after_it_was_opened_is_truncated_not_a_signal() {
    let g = Gguf::default().tensor("a", &[1 << 16], 0, &vec![1; 1 << 18]);
    let file = scratch("model.gguf", &g.bytes());
    let c = Checkpoint::open(&file.path).unwrap();
    c.verify_unchanged().unwrap();
    std::fs::OpenOptions::new().write(true).open(&file.path).unwrap().set_len(100).unwrap();
    assert!(matches!(
        c.read_all(c.tensor("a").unwrap()),
        Err(Error::InvalidModel { defect: Defect::Truncated, offset: Some(100), .. })
    ));
    assert_eq!(c.verify_unchanged().unwrap_err().exit_code(), 74);
}

/// A map would end the process here: a page that is gone is a signal (SIGBUS), not an error.
#[test]
fn a_file_that_is_cut_and_rewritten_while_it_is_opened_never_kills_the_process() {
    let keys = (0..500)
        .fold(Gguf::default(), |g, i| g.key(format!("k{i}").as_bytes(), 8, &text(&[b'x'; 2000])));
    let whole = keys.tensor("t", &[1 << 16], 0, &vec![1; 1 << 18]).bytes();
    let file = scratch("model.gguf", &whole);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let writer = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
            for pause in (0..1000).step_by(77).cycle() {
                if done.load(Relaxed) {
                    break;
                }
                writer.set_len(100).unwrap();
                writer.write_all_at(&whole, 0).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(pause));
            }
        });
        let (mut read, mut refused) = (0, 0);
        let start = std::time::Instant::now();
        // Until both have been seen: how often each is, is the scheduler's affair.
        let more = |read, refused| read == 0 || refused == 0 || read + refused < 600;
        while more(read, refused) && start.elapsed().as_secs() < 60 {
            let outcome = Checkpoint::open(&file.path).and_then(|c| c.read_all(&c.tensors()[0]));
            match outcome {
                Ok(bytes) => {
                    assert!(bytes.iter().all(|b| *b == 1), "bytes that were never in the file");
                    read += 1;
                }
                Err(error) => {
                    assert!(matches!(error.exit_code(), 3 | 74), "{error}");
                    refused += 1;
                }
            }
        }
        done.store(true, Relaxed);
        println!("{read} read, {refused} refused");
        assert!(read > 0 && refused > 0, "{read} read, {refused} refused");
    });
}

#[test]
fn a_file_that_is_rewritten_in_place_is_told_after_it_was_read() {
    let bytes = minimal().bytes();
    let file = scratch("model.gguf", &bytes);
    let c = Checkpoint::open(&file.path).unwrap();
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    let writer = std::fs::OpenOptions::new().write(true).open(&file.path).unwrap();
    writer.write_all_at(&bytes, 0).unwrap();
    writer.set_modified(later).unwrap();
    let error = c.verify_unchanged().unwrap_err();
    assert!(error.to_string().contains("rewritten"), "{error}");
}

#[test]
fn a_header_beyond_its_cap_is_refused_before_it_is_kept() {
    // 17 strings of 16 MiB of zeros, which a sparse file has without holding them.
    let (string, name) = (16u64 << 20, scratch("model.gguf", b""));
    let file = std::fs::OpenOptions::new().write(true).open(&name.path).unwrap();
    let mut start = Gguf::default();
    start.key_count = Some(17);
    let mut at = start.header().len() as u64;
    file.write_all_at(&start.header(), 0).unwrap();
    for i in 0..17u8 {
        let key = [&text(&[b'a' + i])[..], &8u32.to_le_bytes(), &string.to_le_bytes()].concat();
        file.write_all_at(&key, at).unwrap();
        at += key.len() as u64 + string;
    }
    file.set_len(at).unwrap();
    let (outcome, peak, _) = measured(|| Checkpoint::open(&name.path));
    let Err(Error::InvalidModel { defect: Defect::BadCount, why, .. }) = outcome else {
        panic!("accepted, or another error")
    };
    assert!(why.contains("header is longer than 268435456 bytes"), "{why}");
    assert!(peak <= at + (64 << 20), "{peak} bytes for {at}");
}
