// The plain element-wise ops of a plan. Everything that a kernel reads after pdl_wait() is through
// pointers that are neither const __restrict__ nor read with ld.global.nc, so that no load is
// hoisted above the wait.
#include "common.cuh"

// out[r, i] = x[r, i] · scale · gain[i], scale = 1 / sqrt(mean_i(x[r, i]²) + eps); x, out
// [rows, dim], gain [dim]. A block is a row.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const StepState* step, const float* x, const float* gain, float* out, uint32_t dim,
         float eps) {
    pdl_launch();
    // Weights are constant: the first gain of a thread may be read before the wait.
    const float first = threadIdx.x < dim ? gain[threadIdx.x] : 0.0f;
    const bool active = step_active(*step);
    pdl_wait();
    if (!active) return;
    x += static_cast<size_t>(blockIdx.x) * dim;
    out += static_cast<size_t>(blockIdx.x) * dim;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) sum += x[i] * x[i];
    sum = block_sum(sum);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(dim) + eps);
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
        out[i] = x[i] * scale * (i == threadIdx.x ? first : gain[i]);
    }
}

// out[i] = out[i] + x[i] · scale · gain[i], scale as above; x, gain, out [dim]. One block.
extern "C" __global__ void __launch_bounds__(1024)
norm_add(const StepState* step, const float* x, const float* gain, float* out, uint32_t dim,
         float eps) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    if (!active) return;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) sum += x[i] * x[i];
    sum = block_sum(sum);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(dim) + eps);
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) out[i] += x[i] * scale * gain[i];
}

// out[i] = out[i] + x[i]; out, x [len].
extern "C" __global__ void __launch_bounds__(256)
add(const StepState* step, float* out, const float* x, uint32_t len) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (active && i < len) out[i] += x[i];
}

// out[i] = silu(gate[i]) · up[i], silu(z) = z / (1 + e^−z); gate, up, out [len].
extern "C" __global__ void __launch_bounds__(256)
swiglu(const StepState* step, const float* gate, const float* up, float* out, uint32_t len) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (active && i < len) out[i] = silu(gate[i]) * up[i];
}

// out[i] = gelu(gate[i]) · up[i], gelu(z) = z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)));
// gate, up, out [len].
extern "C" __global__ void __launch_bounds__(256)
geglu(const StepState* step, const float* gate, const float* up, float* out, uint32_t len) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (active && i < len) out[i] = gelu(gate[i]) * up[i];
}

// x[i] = cap · tanh(x[i] / cap); x [len].
extern "C" __global__ void __launch_bounds__(256)
softcap(const StepState* step, float* x, uint32_t len, float cap) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (active && i < len) x[i] = cap * tanhf(x[i] / cap);
}

// (x₀, x₁) ← (x₀ cos θ − x₁ sin θ, x₀ sin θ + x₁ cos θ) · magnitude, θ = position · freqs[i];
// x [heads, head_dim], freqs [pairs]; pairs are (i, i + pairs) if `halves`, else (2i, 2i + 1).
// A block is a head, a thread a pair.
extern "C" __global__ void
rope(const StepState* step, float* x, const float* freqs, uint32_t head_dim, uint32_t pairs,
     uint32_t halves, float magnitude) {
    pdl_launch();
    const uint32_t i = threadIdx.x;
    const uint4 head = load_step(step);
    float sin = 0.0f, cos = 0.0f;
    if (i < pairs) {
        // Position and frequencies are constant in this step: the angle does not wait. The product
        // is rounded once, as on the CPU; from there sine and cosine are good to 2 ulp.
        sincosf(__fmul_rn(static_cast<float>(head.y), freqs[i]), &sin, &cos);
        sin *= magnitude;
        cos *= magnitude;
    }
    pdl_wait();
    if (!step_active(head) || i >= pairs) return;
    float* base = x + static_cast<size_t>(blockIdx.x) * head_dim;
    const uint32_t a = halves ? i : 2 * i, b = halves ? i + pairs : 2 * i + 1;
    const float x0 = base[a], x1 = base[b];
    base[a] = x0 * cos - x1 * sin;
    base[b] = x0 * sin + x1 * cos;
}

// route = the experts of the `used` greatest logits, best first, the lower of equals; then
// w[j] = e^{logits[e_j]} / Σ_i e^{logits[e_i]}; logits [experts], route [2 · used]. One warp:
// up to 512 experts of which up to 32 are used.
extern "C" __global__ void __launch_bounds__(32)
top_k(const StepState* step, const float* logits, float* route, uint32_t experts, uint32_t used) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    if (!active) return;
    constexpr uint32_t EACH = 16;  // experts of a lane
    const uint32_t lane = threadIdx.x;
    float mine[EACH];
#pragma unroll
    for (uint32_t j = 0; j < EACH; ++j) {
        mine[j] = j * 32 + lane < experts ? logits[j * 32 + lane] : 0.0f;
    }
    uint32_t taken = 0, chosen = 0;
    float top = 0.0f, sum = 0.0f, power = 0.0f;
    for (uint32_t n = 0; n < used; ++n) {
        // An index is `experts` or that of an expert not taken yet, also where a logit is NaN.
        float value = 0.0f;
        uint32_t index = experts;
        auto consider_expert = [&](float v, uint32_t e) {
            if (e < experts && (index == experts || v > value || (v == value && e < index))) {
                value = v, index = e;
            }
        };
#pragma unroll
        for (uint32_t j = 0; j < EACH; ++j) {
            if ((taken >> j & 1) == 0) consider_expert(mine[j], j * 32 + lane);
        }
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            const float v = __shfl_xor_sync(~0u, value, o);
            const uint32_t e = __shfl_xor_sync(~0u, index, o);
            consider_expert(v, e);
        }
        value = __shfl_sync(~0u, value, 0);
        index = __shfl_sync(~0u, index, 0);
        if (index % 32 == lane) taken |= 1u << index / 32;
        if (n == 0) top = value;
        const float p = expf(value - top);
        sum += p;
        if (lane == n) chosen = index, power = p;
    }
    if (lane < used) {
        route[lane] = static_cast<float>(chosen);
        route[used + lane] = power / sum;
    }
}

// out[i] = out[i] + Σ_j w[j] · x[j, i]; w = route[used…], x [used, len], out [len].
extern "C" __global__ void __launch_bounds__(256)
expert_sum(const StepState* step, float* out, const float* x, const float* route, uint32_t used,
           uint32_t len) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    if (!active || i >= len) return;
    float sum = 0.0f;
    for (uint32_t j = 0; j < used; ++j) {
        sum = fmaf(route[used + j], x[static_cast<size_t>(j) * len + i], sum);
    }
    out[i] += sum;
}

struct Half {
    uint16_t bits;
};

__device__ __forceinline__ void store(Half* at, float v) {
    asm volatile("{\n\t.reg .b16 h;\n\tcvt.rn.f16.f32 h, %1;\n\tst.global.b16 [%0], h;\n\t}"
                 ::"l"(at), "f"(v) : "memory");
}

__device__ __forceinline__ void store(float* at, float v) { *at = v; }

// keys[h, position, :] = k[h, :], values[h, position, :] = v[h, :]; k, v [kv_heads, head_dim],
// caches [kv_heads, capacity, head_dim]. A block is a head, a thread an element.
template <typename T>
__device__ __forceinline__ void kv_append(const StepState* step, const float* k, const float* v,
                                          T* keys, T* values, uint32_t head_dim,
                                          uint32_t capacity) {
    pdl_launch();
    const uint4 head = load_step(step);
    pdl_wait();
    const uint32_t i = threadIdx.x;
    // The second bound is the cache's own: a step state with another capacity writes nothing.
    if (!step_active(head) || head.y >= capacity || i >= head_dim) return;
    const size_t to = (static_cast<size_t>(blockIdx.x) * capacity + head.y) * head_dim + i;
    const size_t from = static_cast<size_t>(blockIdx.x) * head_dim + i;
    store(keys + to, k[from]);
    store(values + to, v[from]);
}

extern "C" __global__ void
kv_append_f16(const StepState* step, const float* k, const float* v, Half* keys, Half* values,
              uint32_t head_dim, uint32_t capacity) {
    kv_append(step, k, v, keys, values, head_dim, capacity);
}

extern "C" __global__ void
kv_append_f32(const StepState* step, const float* k, const float* v, float* keys, float* values,
              uint32_t head_dim, uint32_t capacity) {
    kv_append(step, k, v, keys, values, head_dim, capacity);
}

// Heads h of q [heads, head_dim] to out[h], heads h of k [kv_heads, head_dim] to keys[h, position],
// each normalised and rotated as by rms_norm and rope above; v to values as by kv_append. A block
// is a head of q or of k and v, a thread an element; head_dim is at most 256.
template <typename T>
__device__ __forceinline__ void head_rope(const StepState* step, const float* q, const float* k,
                                          const float* v, const float* q_gain, const float* k_gain,
                                          float eps, const float* freqs, float* out, T* keys,
                                          T* values, uint32_t heads, uint32_t head_dim,
                                          uint32_t pairs, uint32_t halves, float magnitude,
                                          uint32_t capacity) {
    __shared__ float normed[256];
    pdl_launch();
    const uint4 head = load_step(step);
    const uint32_t i = threadIdx.x;
    const bool is_q = blockIdx.x < heads, rotates = i < 2 * pairs;
    const uint32_t h = is_q ? blockIdx.x : blockIdx.x - heads;
    const size_t at = static_cast<size_t>(h) * head_dim + i;
    // Gain, position and frequencies are constant in this step: they do not wait.
    const float gain = i < head_dim ? (is_q ? q_gain : k_gain)[i] : 0.0f;
    float sin = 0.0f, cos = 1.0f;
    if (rotates) {
        const float freq = freqs[halves ? i % pairs : i / 2];
        sincosf(__fmul_rn(static_cast<float>(head.y), freq), &sin, &cos);
        sin *= magnitude;
        cos *= magnitude;
    }
    pdl_wait();
    if (!step_active(head) || head.y >= capacity) return;
    const float x = i < head_dim ? (is_q ? q : k)[at] : 0.0f;
    const float mean = block_sum(x * x) / static_cast<float>(head_dim);
    const float own = x * (1.0f / sqrtf(mean + eps)) * gain;
    if (i < head_dim) normed[i] = own;
    __syncthreads();
    if (i >= head_dim) return;
    float y = own;
    if (rotates) {
        const bool second = halves ? i >= pairs : i % 2 != 0;
        const float other = normed[halves ? (second ? i - pairs : i + pairs) : i ^ 1];
        y = second ? other * sin + own * cos : own * cos - other * sin;
    }
    if (is_q) {
        out[at] = y;
    } else {
        const size_t to = (static_cast<size_t>(h) * capacity + head.y) * head_dim + i;
        store(keys + to, y);
        store(values + to, v[at]);
    }
}

#define HEAD_ROPE(NAME, T)                                                                        \
    extern "C" __global__ void __launch_bounds__(256)                                             \
    NAME(const StepState* step, const float* q, const float* k, const float* v,                   \
         const float* q_gain, const float* k_gain, float eps, const float* freqs, float* out,     \
         T* keys, T* values, uint32_t heads, uint32_t head_dim, uint32_t pairs, uint32_t halves,  \
         float magnitude, uint32_t capacity) {                                                    \
        head_rope(step, q, k, v, q_gain, k_gain, eps, freqs, out, keys, values, heads, head_dim,  \
                  pairs, halves, magnitude, capacity);                                            \
    }
HEAD_ROPE(head_rope_f16, Half)
HEAD_ROPE(head_rope_f32, float)

// best = argmax_i logits[i] (the lowest i of equals), then token and position advance;
// logits [vocab], candidates [gridDim.x, 2].
extern "C" __global__ void __launch_bounds__(256)
argmax(StepState* step, const float* logits, float* candidates, uint32_t* counters,
       const uint32_t* forced, uint64_t* ring, uint32_t vocab) {
    pdl_launch();
    const bool active = step_active(*step);
    pdl_wait();
    Candidate best = no_candidate();
    if (active) {
        const uint32_t stride = gridDim.x * blockDim.x;
        const uint32_t quads = vocab / 4;
        const float4* vectors = reinterpret_cast<const float4*>(logits);
        const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
        for (uint32_t q = thread; q < quads; q += stride) {
            const float4 v = vectors[q];
            best = consider(best, v.x, 4 * q);
            best = consider(best, v.y, 4 * q + 1);
            best = consider(best, v.z, 4 * q + 2);
            best = consider(best, v.w, 4 * q + 3);
        }
        const uint32_t tail = 4 * quads + thread;
        if (tail < vocab) best = consider(best, logits[tail], tail);
    }
    choose_and_advance(best, step, candidates, counters, forced, ring, vocab);
}
