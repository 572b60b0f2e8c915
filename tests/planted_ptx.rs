//! The defects that `gpu_trust.rs` plants in kernels, without a GPU: each is where it is meant to be,
//! and leaves a module that assembles, so that it is the defect that a check catches.

#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod planted_ptx_edits;

use decode_graph::cuda::kernels;
use planted_ptx_edits::{ALL, Defect};
use std::path::Path;
use std::process::Command;

#[test]
fn each_defect_is_in_its_kernel_and_nowhere_else() {
    for planted in ALL {
        for compute in [(8, 0), (9, 0)] {
            let original = kernels::ptx(planted.module, compute).unwrap();
            let (text, places) = planted.text(compute);
            let kernels = original.matches(".visible .entry").count();
            let expected = match planted.defect {
                // The earlier variant has none: its launches wait for one another.
                Defect::NoWait if compute < (9, 0) => 0..1,
                // Every kernel but the look-up of embeddings waits on each of its ways out.
                Defect::NoWait => kernels..kernels + 1,
                // The two of the split sums, and of a ring's mbarriers where there is one.
                Defect::NoBarrier if planted.module == "gemv_q8_0" && compute >= (9, 0) => 3..4,
                Defect::NoBarrier => 2..3,
                Defect::StoreBeyond(4) | Defect::GridOfTheFirstPosition { .. } => 1..2,
                Defect::StoreBeyond(_) => 2..3,
            };
            assert!(expected.contains(&places), "{planted:?} {compute:?}: {places} places");
            assert_eq!(text == original, places == 0);
            // Outside its kernel nothing changes.
            let outside = |text: &str| -> Vec<String> {
                let parts = text.split(".visible .entry ");
                let own = |part: &&str| {
                    part.strip_prefix(planted.entry).is_some_and(|rest| rest.starts_with('('))
                };
                parts.filter(|part| !own(part)).map(str::to_owned).collect()
            };
            assert!(planted.entry.is_empty() || outside(&text) == outside(original), "{planted:?}");
        }
    }
}

#[test]
fn every_module_with_a_defect_assembles() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cuda/nvidia/cu13/bin/ptxas");
    let ptxas = if own.exists() { own } else { "ptxas".into() };
    let folder = tempfile::tempdir().unwrap();
    for planted in ALL {
        for (compute, arch) in [((8, 0), "sm_80"), ((9, 0), "sm_90")] {
            let file = folder.path().join("planted.ptx");
            std::fs::write(&file, planted.text(compute).0).unwrap();
            let mut command = Command::new(&ptxas);
            command.args(["--opt-level=0", &format!("--gpu-name={arch}")]).arg(&file).arg("-o");
            let Ok(output) = command.arg(folder.path().join("planted.cubin")).output() else {
                println!("skipped: no ptxas (ptx/build.sh gets it)");
                return;
            };
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{planted:?} {arch}: {said}");
        }
    }
}
