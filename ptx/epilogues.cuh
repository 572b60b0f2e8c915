// What becomes of the finished sums of a matrix-vector kernel, one struct a kernel.
//
// prefetch(first) is called before the wait and begin(first) right after it, with the block's first
// tile: what a thread needs for its first row is then there when the sums are. flush(first, count,
// sums, scale) is called by the whole block for up to FLUSH tiles, of which a thread has one row (or
// pair of rows) at most; `scale` is the norm's 1/rms (1 without a norm).
#pragma once
#include "gemv.cuh"

namespace gemv {

// y[r] = sum + bias[r] + residual[r]
struct Store {
    float* y;
    const float* bias;
    const float* residual;
    uint32_t rows;
    float carried = 0.f, offset = 0.f;
    uint32_t loaded = 0xffffffffu;  // row that `carried` is of

    __device__ __forceinline__ void prefetch(uint32_t first) {
        const uint32_t r = first * ROWS + threadIdx.x;
        if (bias != nullptr && r < rows) offset = __ldg(bias + r);
    }
    __device__ __forceinline__ void begin(uint32_t first) {
        loaded = first * ROWS + threadIdx.x;
        if (residual != nullptr && loaded < rows) carried = __ldcg(residual + loaded);
    }
    __device__ __forceinline__ void finish() {}
    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        static_assert(FLUSH * ROWS <= THREADS, "a thread has one row");
        const uint32_t i = threadIdx.x, r = first * ROWS + i;
        if (i >= count * ROWS || r >= rows) return;
        if (r != loaded) {
            if (residual != nullptr) carried = __ldcg(residual + r);
            if (bias != nullptr) offset = __ldg(bias + r);
        }
        y[r] = total(sums, i / ROWS, i % ROWS) * scale + offset + carried;
    }
};

// y[r] = act(gate[r]) · up[r]; tiles come in pairs, gate then up.
struct Gated {
    float* y;
    const float* gate_bias;
    const float* up_bias;
    uint32_t rows;
    bool is_gelu;

    __device__ __forceinline__ void prefetch(uint32_t) {}
    __device__ __forceinline__ void begin(uint32_t) {}
    __device__ __forceinline__ void finish() {}
    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        for (uint32_t i = threadIdx.x; i < count / 2 * ROWS; i += THREADS) {
            const uint32_t pair = i / ROWS, r = (first / 2 + pair) * ROWS + i % ROWS;
            if (r >= rows) continue;
            float g = total(sums, 2 * pair, i % ROWS) * scale;
            float u = total(sums, 2 * pair + 1, i % ROWS) * scale;
            if (gate_bias != nullptr) g += __ldg(gate_bias + r);
            if (up_bias != nullptr) u += __ldg(up_bias + r);
            y[r] = (is_gelu ? gelu(g) : silu(g)) * u;
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

    __device__ __forceinline__ void prefetch(uint32_t) {}
    __device__ __forceinline__ void begin(uint32_t) {}
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

struct Rotation {
    float cos, sin;
};

// THREAD_AGAIN: flush() reads the thread's number again, for what prefetch() made of it not to stay in
// registers over the product (qkv.cuh says when).
template <bool THREAD_AGAIN>
struct RotateAppend {
    const StepState* at;  // where in the caches
    const float *q_bias, *k_bias, *v_bias;
    const float* freqs;
    float* q;
    void *keys, *values;
    uint32_t q_rows, kv_rows, q_tiles, kv_tiles, head_dim, half_rotary;
    bool halves, cache_f32;
    float magnitude;
    uint32_t capacity;
    uint32_t position = 0;
    Rotation turn{1.f, 0.f};
    uint32_t turned = 0xffffffffu;  // first row of the pair that `turn` is of

    // Which head elements the pair at row `row` of tile `tile` is.
    struct Where {
        bool is_q, is_v, inside, rotates;
        uint32_t head, pair, e0, e1;
    };
    __device__ __forceinline__ Where where(uint32_t tile, uint32_t row) const {
        Where w;
        w.is_v = tile >= q_tiles + kv_tiles, w.is_q = tile < q_tiles;
        const uint32_t part = w.is_q ? tile : w.is_v ? tile - q_tiles - kv_tiles : tile - q_tiles;
        const uint32_t r = part * ROWS + row;
        w.inside = r < (w.is_q ? q_rows : kv_rows);
        w.head = r / head_dim;
        const uint32_t e = r % head_dim;
        w.pair = e / 2, w.e0 = e, w.e1 = e + 1;
        w.rotates = !w.is_v && e < 2 * half_rotary;
        if (halves && w.rotates) w.e0 = w.pair, w.e1 = w.pair + half_rotary;
        return w;
    }
    // Cosine and sine of a pair's angle; one f32 rounding for the angle, as the reference has it.
    __device__ __forceinline__ Rotation rotation(const Where& w) const {
        if (!w.rotates) return Rotation{1.f, 0.f};
        float sin, cos;
        sincosf(static_cast<float>(position) * __ldg(freqs + w.pair), &sin, &cos);
        return Rotation{cos * magnitude, sin * magnitude};
    }

    __device__ __forceinline__ void prefetch(uint32_t first) {
        position = at->position;
        turned = first * ROWS + threadIdx.x * 2;
        const Where w = where(turned / ROWS, turned % ROWS);
        if (w.inside && threadIdx.x < FLUSH * ROWS / 2) turn = rotation(w);
    }
    __device__ __forceinline__ void begin(uint32_t) {}
    __device__ __forceinline__ void finish() {}

    __device__ __forceinline__ void store(void* cache, uint32_t head, uint32_t i, float v) const {
        const uint64_t at = (static_cast<uint64_t>(head) * capacity + position) * head_dim + i;
        if (cache_f32) static_cast<float*>(cache)[at] = v;
        else static_cast<__half*>(cache)[at] = __float2half_rn(v);
    }

    __device__ __forceinline__ void flush(uint32_t first, uint32_t count, const float* sums, float scale) {
        const uint32_t i = THREAD_AGAIN ? thread_index() : threadIdx.x;
        if (i >= count * (ROWS / 2)) return;
        const uint32_t r = first * ROWS + 2 * i;
        const Where w = where(r / ROWS, r % ROWS);
        if (!w.inside) return;
        if (r != turned) turn = rotation(w);
        float a = total(sums, i / (ROWS / 2), r % ROWS) * scale;
        float b = total(sums, i / (ROWS / 2), r % ROWS + 1) * scale;
        const uint32_t base = w.head * head_dim;
        const float* bias = w.is_q ? q_bias : w.is_v ? v_bias : k_bias;
        if (bias != nullptr) a += __ldg(bias + base + w.e0), b += __ldg(bias + base + w.e1);
        if (w.rotates) {
            const float x = a;
            a = x * turn.cos - b * turn.sin;
            b = x * turn.sin + b * turn.cos;
        }
        if (w.is_q) {
            q[base + w.e0] = a;
            q[base + w.e1] = b;
        } else {
            store(w.is_v ? values : keys, w.head, w.e0, a);
            store(w.is_v ? values : keys, w.head, w.e1, b);
        }
    }
};

}  // namespace gemv
