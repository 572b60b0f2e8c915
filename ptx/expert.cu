// The chosen experts' matrices times one token's activations (-DFORMAT=q4_k, …).
//
//   y[j, r] = Σ_c W[e_j, r, c] · x[j, c],   e_j = route[j];  or of two, y = act(W_gate x) · (W_up x)
//
//   W [experts · rows, columns] in the tile layout of src/quant/tile.rs;
//   x [used, columns] f32, or [columns] for all (stride 0);  y [used, rows] f32
//
// `each` blocks share the tiles of a chosen expert; its first and last tile may hold rows of its
// neighbours, which are left out. Which weights are read is known only after the
// wait, so nothing is fetched before it; the weights of no other expert are touched.
#include "formats/all.cuh"
#include "gemv.cuh"

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

using Format = gemv::FORMAT;

// The rows of MATRICES matrices that stand at the same places; `finish(sums)` makes one value of the
// sums of a row in each of them.
template <int MATRICES, class Finish>
__device__ __forceinline__ void multiply(const StepState* step, const float* x, const float* route,
                                         const uint8_t* const (&w)[MATRICES], float* y, uint32_t rows,
                                         uint32_t columns, uint32_t stride, uint32_t each, Finish finish) {
    using namespace gemv;
    extern __shared__ __align__(128) uint8_t shared_memory[];
    constexpr uint32_t C = Format::UNIT_COLUMNS;
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    if (!active) return;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const uint32_t slot = blockIdx.x / each, part = blockIdx.x % each;
    // From the L2, as all that the kernel before has written.
    const uint32_t expert = static_cast<uint32_t>(__ldcg(route + slot));
    const uint32_t units = (columns + C - 1) / C;
    const uint32_t row0 = expert * rows, tile0 = row0 / ROWS;
    const uint32_t tiles = (row0 + rows + ROWS - 1) / ROWS - tile0;
    const uint32_t tail = min((columns - (units - 1) * C + 63) & ~63u, C);
    const uint64_t tile_bytes = (units - 1) * Format::UNIT_BYTES + Format::bytes(tail);
    const uint32_t t0 = tiles * part / each, t1 = tiles * (part + 1) / each;
    uint64_t at = static_cast<uint64_t>(tile0 + t0) * tile_bytes;
    y += slot * rows;

    uint8_t* activations = shared_memory;
    float* sums = reinterpret_cast<float*>(shared_memory + units * Format::STAGE_BYTES);
    Stager<Format, 2, 2> stager;
    stager.stage(activations, x + slot * stride, nullptr, columns, units, warp, lane);
    __syncthreads();

    // The warps take the units of the block's tiles in turn, as in gemv.cuh.
    constexpr uint32_t HELD = FLUSH / MATRICES;  // tiles of each matrix
    uint32_t k = warp;
    for (uint32_t base = t0; base < t1; base += HELD) {
        const uint32_t end = min(base + HELD, t1);
        for (uint32_t v = base; v < end; ++v, at += tile_bytes) {
#pragma unroll 1
            for (int m = 0; m < MATRICES; ++m) {
                const uint8_t* tile = (m == 0 ? w[0] : w[MATRICES - 1]) + at;
                float low = 0.f, high = 0.f;  // rows g and g + 8, this lane's share
                for (; k < units; k += WARPS) {
                    Format::dot(tile + k * Format::UNIT_BYTES, activations + k * Format::STAGE_BYTES,
                                lane, k + 1 == units ? tail : C, low, high);
                }
                k -= units;
                low += __shfl_xor_sync(~0u, low, 1);
                high += __shfl_xor_sync(~0u, high, 1);
                low += __shfl_xor_sync(~0u, low, 2);
                high += __shfl_xor_sync(~0u, high, 2);
                float* row = sums + (((v - base) * MATRICES + m) * WARPS + warp) * ROWS;
                if ((lane & 3) == 0) row[lane >> 2] = low;
                if ((lane & 3) == 1) row[(lane >> 2) + 8] = high;
            }
        }
        __syncthreads();
        // Below zero, that is above every row, for a neighbour before.
        const uint32_t row = (tile0 + base) * ROWS + threadIdx.x - row0;
        if (threadIdx.x < (end - base) * ROWS && row < rows) {
            float of[MATRICES];
#pragma unroll
            for (int m = 0; m < MATRICES; ++m) {
                of[m] = total(sums, threadIdx.x / ROWS * MATRICES + m, threadIdx.x % ROWS);
            }
            y[row] = finish(of);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(gemv::THREADS, 2)
JOIN(expert_matvec, FORMAT)(const StepState* step, const float* x, const float* route,
                            const uint8_t* w, float* y, uint32_t rows, uint32_t columns,
                            uint32_t stride, uint32_t each) {
    const uint8_t* const matrices[1] = {w};
    multiply<1>(step, x, route, matrices, y, rows, columns, stride, each,
                [](const float(&of)[1]) { return of[0]; });
}

extern "C" __global__ void __launch_bounds__(gemv::THREADS, 2)
JOIN(expert_gate_up, FORMAT)(const StepState* step, const float* x, const float* route,
                             const uint8_t* gate, const uint8_t* up, float* y, uint32_t rows,
                             uint32_t columns, uint32_t each, uint32_t is_gelu) {
    const uint8_t* const matrices[2] = {gate, up};
    multiply<2>(step, x, route, matrices, y, rows, columns, 0, each, [=](const float(&of)[2]) {
        return (is_gelu != 0 ? gelu(of[0]) : silu(of[0])) * of[1];
    });
}
