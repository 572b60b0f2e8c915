//! The CPU reference's matrix-vector product, `[2048, 2048]` by `[2048]`, a format a row: what
//! decoding a format costs the definition of correct, in bytes of weights per second. It says
//! nothing about a GPU; a format much slower than its neighbours makes tests of real models slow.
//!
//! `cargo bench --bench reference`

use criterion::{BenchmarkId, Criterion, Throughput};
use decode_graph::ops::{HostMemory, HostWeight, KvType, MatVec, Matrix, Op, WeightId};
use decode_graph::plan::{CacheSpec, PlanBuilder};
use decode_graph::quant::{QuantFormat, RowOrder};

/// Rows and columns.
const SIZE: u32 = 2048;

/// A plan of one product, its memory, and the product.
fn product(format: QuantFormat) -> Option<(HostMemory, MatVec)> {
    let cache = CacheSpec { layers: 0, kv_heads: 1, head_dim: 1, capacity: 1, kind: KvType::F32 };
    let mut plan = PlanBuilder::new("one product", cache, 1);
    let (x, out) = (plan.buffer("x", SIZE), plan.buffer("out", SIZE));
    let shape =
        Matrix { id: WeightId(0), format, rows: SIZE, columns: SIZE, order: RowOrder::Natural };
    let weight = plan.matrix("weight", shape);
    let op = MatVec { x, weight, bias: None, out };
    plan.record("product", Op::MatVec(op.clone()));

    let mut bytes = vec![0; format.row_bytes(SIZE as usize)? * SIZE as usize];
    let mut state = 1u64;
    let mut bits = || {
        // Knuth's linear congruential generator; its upper half.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 32) as u32
    };
    format.describe().synthesize(0.02, &mut bits, &mut bytes);
    let weights = vec![HostWeight::Matrix { format, columns: SIZE as usize, bytes }];
    let mut memory = plan.finish().workspace().host_memory(weights, 0, 0);
    for (i, x) in memory.buf_mut(x).iter_mut().enumerate() {
        *x = (i as f32).sin();
    }
    Some((memory, op))
}

fn formats(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("reference matvec");
    group.sample_size(20);
    for format in QuantFormat::ALL {
        let Some((mut memory, op)) = product(format) else { continue };
        group.throughput(Throughput::Bytes(op.weight.bytes()));
        group.bench_function(BenchmarkId::from_parameter(format), |bencher| {
            bencher.iter(|| Op::MatVec(op.clone()).describe().reference(&mut memory));
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    formats(&mut criterion);
    criterion.final_summary();
}
