// The plain element-wise ops of a plan. Everything that a kernel reads after pdl_wait() is through
// pointers that are neither const __restrict__ nor read with ld.global.nc, so that no load is
// hoisted above the wait.
#include "common.cuh"

// out[i] = x[i] · scale · gain[i], scale = 1 / sqrt(mean(x²) + eps); x, gain, out [dim]. One block.
extern "C" __global__ void __launch_bounds__(1024)
rms_norm(const StepState* step, const float* x, const float* gain, float* out, uint32_t dim,
         float eps) {
    pdl_launch();
    // Weights are constant: the first gain of a thread may be read before the wait.
    const float first = threadIdx.x < dim ? gain[threadIdx.x] : 0.0f;
    const bool active = step_active(*step);
    pdl_wait();
    if (!active) return;
    float sum = 0.0f;
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) sum += x[i] * x[i];
    sum = block_sum(sum);
    const float scale = 1.0f / sqrtf(sum / static_cast<float>(dim) + eps);
    for (uint32_t i = threadIdx.x; i < dim; i += blockDim.x) {
        out[i] = x[i] * scale * (i == threadIdx.x ? first : gain[i]);
    }
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
    if (active && i < len) {
        const float z = gate[i];
        out[i] = z / (1.0f + expf(-z)) * up[i];
    }
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
