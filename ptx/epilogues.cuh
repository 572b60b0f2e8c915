// What becomes of the finished sums of a matrix-vector kernel, one struct a kernel.
//
// flush(first, count, sums, scale) is called by the whole block for up to FLUSH tiles; `scale` is
// the norm's 1/rms (1 without a norm).
#pragma once
#include "gemv.cuh"

namespace gemv {

// y[r] = sum + bias[r] + residual[r]
struct Store {
    float* y;
    const float* bias;
    const float* residual;
    uint32_t rows;

    __device__ __forceinline__ void prefetch() {}
    __device__ __forceinline__ void finish() {}
    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        for (uint32_t i = threadIdx.x; i < count * ROWS; i += THREADS) {
            const uint32_t r = first * ROWS + i;
            if (r >= rows) continue;
            // The residual is loaded first: it comes from the L2 while the sums are added.
            const float carried = residual != nullptr ? __ldcg(residual + r) : 0.f;
            float v = total(sums, i / ROWS, i % ROWS) * scale;
            if (bias != nullptr) v += __ldg(bias + r);
            y[r] = v + carried;
        }
    }
};

// y[r] = silu(gate[r]) · up[r]; tiles come in pairs, gate then up.
struct Swiglu {
    float* y;
    const float* gate_bias;
    const float* up_bias;
    uint32_t rows;

    __device__ __forceinline__ void prefetch() {}
    __device__ __forceinline__ void finish() {}
    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        for (uint32_t i = threadIdx.x; i < count / 2 * ROWS; i += THREADS) {
            const uint32_t pair = i / ROWS, r = (first / 2 + pair) * ROWS + i % ROWS;
            if (r >= rows) continue;
            float g = total(sums, 2 * pair, i % ROWS) * scale;
            float u = total(sums, 2 * pair + 1, i % ROWS) * scale;
            if (gate_bias != nullptr) g += __ldg(gate_bias + r);
            if (up_bias != nullptr) u += __ldg(up_bias + r);
            y[r] = g / (1.f + expf(-g)) * u;
        }
    }
};

template <class F>
struct Pair {
    static constexpr uint32_t EACH = 2;
    const uint8_t* gate;
    const uint8_t* up;
    __device__ __forceinline__ bool second(uint32_t) const { return false; }
    __device__ __forceinline__ const uint8_t* tile(uint32_t v, uint32_t bytes, uint32_t) const {
        return ((v & 1) != 0 ? up : gate) + static_cast<uint64_t>(v >> 1) * bytes;
    }
};

// logits[r] = sum + bias[r]; the best of a block's rows goes to `candidates`, and the block that
// arrives last chooses among them and advances the step.
struct Choose {
    StepState* step;
    float* logits;
    const float* bias;
    float* candidates;  // [gridDim.x][2]: value, index (bits)
    uint32_t* counters;
    const uint32_t* forced;
    uint64_t* ring;
    uint32_t rows;
    Candidate best = no_candidate();

    __device__ __forceinline__ void prefetch() {}
    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        for (uint32_t i = threadIdx.x; i < count * ROWS; i += THREADS) {
            const uint32_t r = first * ROWS + i;
            if (r >= rows) continue;
            float v = total(sums, i / ROWS, i % ROWS) * scale;
            if (bias != nullptr) v += __ldg(bias + r);
            logits[r] = v;
            best = consider(best, v, r);
        }
    }
    __device__ __forceinline__ void finish() {
        choose_and_advance(best, step, candidates, counters, forced, ring, rows);
    }
};

// Query, key and value tiles in one run. Neighbouring rows 2i, 2i + 1 of a tile rotate together
// (src/quant/tile.rs, RowOrder): an epilogue thread has one pair.
template <class A, class B>
struct Three {
    static constexpr uint32_t EACH = 1;
    const uint8_t* q;
    const uint8_t* k;
    const uint8_t* v;
    uint32_t q_tiles, kv_tiles;
    __device__ __forceinline__ bool second(uint32_t t) const { return t >= q_tiles + kv_tiles; }
    __device__ __forceinline__ const uint8_t* tile(uint32_t t, uint32_t bytes_a, uint32_t bytes_b) const {
        if (t < q_tiles) return q + static_cast<uint64_t>(t) * bytes_a;
        if (t < q_tiles + kv_tiles) return k + static_cast<uint64_t>(t - q_tiles) * bytes_a;
        return v + static_cast<uint64_t>(t - q_tiles - kv_tiles) * bytes_b;
    }
};

struct RotateAppend {
    const StepState* step;
    const float *q_bias, *k_bias, *v_bias;
    const float* freqs;
    float* q;
    void *keys, *values;
    uint32_t q_rows, kv_rows, q_tiles, kv_tiles, head_dim, half_rotary;
    bool halves, cache_f32;
    float magnitude;
    uint32_t capacity;
    uint32_t position = 0;

    __device__ __forceinline__ void prefetch() { position = step->position; }
    __device__ __forceinline__ void finish() {}

    __device__ __forceinline__ void store(void* cache, uint32_t head, uint32_t i, float v) const {
        const uint64_t at = (static_cast<uint64_t>(head) * capacity + position) * head_dim + i;
        if (cache_f32) static_cast<float*>(cache)[at] = v;
        else static_cast<__half*>(cache)[at] = __float2half_rn(v);
    }

    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        for (uint32_t i = threadIdx.x; i < count * (ROWS / 2); i += THREADS) {
            const uint32_t local = i / (ROWS / 2), tile = first + local, row = i % (ROWS / 2) * 2;
            float a = total(sums, local, row) * scale, b = total(sums, local, row + 1) * scale;
            const bool is_v = tile >= q_tiles + kv_tiles, is_q = tile < q_tiles;
            const uint32_t part = is_q ? tile : is_v ? tile - q_tiles - kv_tiles : tile - q_tiles;
            const uint32_t r = part * ROWS + row;
            if (r >= (is_q ? q_rows : kv_rows)) continue;
            const uint32_t head = r / head_dim, e = r % head_dim;
            // Elements of the head that this pair is.
            uint32_t e0 = e, e1 = e + 1;
            const bool rotates = !is_v && e < 2 * half_rotary;
            if (halves && rotates) e0 = e / 2, e1 = e0 + half_rotary;
            const float* bias = is_q ? q_bias : is_v ? v_bias : k_bias;
            if (bias != nullptr) a += __ldg(bias + head * head_dim + e0), b += __ldg(bias + head * head_dim + e1);
            if (rotates) {
                const float theta = static_cast<float>(position) * __ldg(freqs + e / 2);
                float sin, cos;
                sincosf(theta, &sin, &cos);
                sin *= magnitude, cos *= magnitude;
                const float x = a;
                a = x * cos - b * sin;
                b = x * sin + b * cos;
            }
            if (is_q) {
                q[head * head_dim + e0] = a;
                q[head * head_dim + e1] = b;
            } else {
                store(is_v ? values : keys, head, e0, a);
                store(is_v ? values : keys, head, e1, b);
            }
        }
    }
};

}  // namespace gemv
