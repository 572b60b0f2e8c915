// The matrix-vector kernels of one weight format (-DFORMAT=q4_k, …): matvec, o_proj, down, gate_up,
// lm_head, qkv, and the embedding look-up. Parameters are those of the launches in src/ops.
#include "epilogues.cuh"
#include "formats/all.cuh"
#include "qkv.cuh"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define KERNEL(op) extern "C" __global__ void __launch_bounds__(gemv::THREADS, 2) JOIN(op, FORMAT)

using Format = gemv::FORMAT;

// y = W x + bias (+ residual)
#define MATVEC(op, BATCH)                                                                                     \
    KERNEL(op)(const StepState* step, const float* x, const uint8_t* w, const float* bias,            \
               const float* residual, float* y, uint32_t rows, uint32_t columns, uint32_t slots, uint32_t early) {    \
        gemv::Store epilogue{y, bias, residual, rows};                                                \
        gemv::run<Format, Format, BATCH>(step, x, nullptr, 0.f, columns, (rows + 15) / 16, slots, early,            \
                                  gemv::OneMatrix<Format>{w}, epilogue);                              \
    }
MATVEC(matvec, 2)
MATVEC(o_proj, 2)
MATVEC(down, 8)

// y = act(W_gate n) · (W_up n), n = rms_norm(x); act is gelu or silu
KERNEL(gate_up)(const StepState* step, const float* x, const float* gain, float eps, const uint8_t* gate,
                const uint8_t* up, const float* gate_bias, const float* up_bias, float* y, uint32_t rows,
                uint32_t columns, uint32_t is_gelu, uint32_t slots, uint32_t early) {
    gemv::Gated epilogue{y, gate_bias, up_bias, rows, is_gelu != 0};
    gemv::run<Format, Format, 2>(step, x, gain, eps, columns, (rows + 15) / 16, slots, early,
                              gemv::Pair<Format>{gate, up}, epilogue);
}

// logits = W rms_norm(x); token = argmax; step advances
KERNEL(lm_head)(StepState* step, const float* x, const float* gain, float eps, const uint8_t* w,
                const float* bias, float* logits, float* candidates, uint32_t* counters,
                const uint32_t* forced, uint64_t* ring, uint32_t rows, uint32_t columns, uint32_t slots, uint32_t early) {
    gemv::Choose epilogue{step, logits, bias, candidates, counters, forced, ring, rows};
    gemv::run<Format, Format, 2>(step, x, gain, eps, columns, (rows + 15) / 16, slots, early,
                              gemv::OneMatrix<Format>{w}, epilogue);
}

QKV_KERNEL(JOIN(qkv, FORMAT), Format, Format)

// out[i] = scale · table[token, i]
KERNEL(embed)(const StepState* step, const uint8_t* table, float* out, uint32_t rows, uint32_t columns,
              float scale) {
    pdl_launch();
    const bool active = step_active(*step) && step->token < rows;
    const uint32_t token = step->token, i = blockIdx.x * blockDim.x + threadIdx.x;
    pdl_wait();
    if (!active || i >= columns) return;
    constexpr uint32_t C = Format::UNIT_COLUMNS;
    const uint32_t units = (columns + C - 1) / C, unit = i / C;
    const uint32_t tail = min((columns - (units - 1) * C + 63) & ~63u, C);
    const uint64_t tile_bytes = (units - 1) * Format::UNIT_BYTES + Format::bytes(tail);
    const uint8_t* p = table + (token / 16) * tile_bytes + unit * Format::UNIT_BYTES;
    out[i] = __fmul_rn(Format::value(p, token % 16, i % C, unit + 1 == units ? tail : C), scale);
}
