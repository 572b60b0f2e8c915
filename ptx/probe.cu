// Measuring and test kernels: no op of a plan, launched on their own.
#include "common.cuh"

// --- Random bits --------------------------------------------------------------------------------
// splitmix64's step as a function of 64 bits; all arithmetic modulo 2^64.
__device__ __forceinline__ uint64_t mix(uint64_t z) {
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ z >> 27) * 0x94D049BB133111EBull;
    return z ^ z >> 31;
}
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15ull;

// --- Reads --------------------------------------------------------------------------------------

// Reads data [words] once, 16 bytes a word, eight loads of a thread in flight; out [gridDim.x]
// receives the exclusive or of what each block read. The device's read ceiling, with a grid of a
// few blocks per multiprocessor and more data than the L2 cache holds.
extern "C" __global__ void __launch_bounds__(512)
read_ceiling(const uint4* data, uint64_t words, uint32_t* out) {
    constexpr int IN_FLIGHT = 8;
    uint32_t sum = 0;
    // All blocks together walk through memory, so that what is read at a time lies close.
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x * IN_FLIGHT;
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * blockDim.x * IN_FLIGHT + threadIdx.x;
    for (uint64_t i = first; i < words; i += stride) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u) {
            const uint64_t at = i + u * blockDim.x;
            v[u] = at < words ? __ldcs(data + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int u = 0; u < IN_FLIGHT; ++u) sum ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
    }
    __shared__ uint32_t warps[32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) sum ^= __shfl_xor_sync(~0u, sum, o);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (uint32_t w = 1; w < blockDim.x / 32; ++w) sum ^= warps[w];
        out[blockIdx.x] = sum;
    }
}

// --- Fills --------------------------------------------------------------------------------------

// out[i] = upper half of mix(seed + (i + 1) · GOLDEN): splitmix64 from `seed`; out [len]. Any grid.
extern "C" __global__ void __launch_bounds__(256)
fill_random_u32(uint32_t* out, uint64_t len, uint64_t seed) {
    const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
    uint64_t i = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    for (; i < len; i += stride) out[i] = mix(seed + (i + 1) * GOLDEN) >> 32;
}

// IEEE bits of v rounded to f16, to nearest even.
__device__ __forceinline__ uint16_t to_f16(float v) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}

__device__ __forceinline__ void put(uint16_t* at, float v) { *at = to_f16(v); }

__device__ __forceinline__ void put(float* at, float v) {
    const uint16_t h = to_f16(v);  // the same values in both element types
    asm("cvt.f32.f16 %0, %1;" : "=f"(*at) : "h"(h));
}

// cache[head, position, dim] for position < positions; cache [heads, capacity, head_dim]. Uniform
// in [−1.73, 1.73): unit variance. With everything u64, modulo 2^64:
//
//   stream = mix(seed + (2 · layer + is_value + 1) · GOLDEN)
//   row    = mix(stream + (head · 2^32 + position + 1) · GOLDEN)
//   bits   = mix(row + (dim + 1) · GOLDEN) >> 40                     24 bits
//   value  = f16((f32(bits) · 2^−23 − 1) · 1.73f)                    one rounding f32, one f16
//
// Neither the capacity nor the number of heads enters: a longer cache begins like a shorter one.
// Check: seed 1, layer 2, is_value 1, head 3, position 4, dim 5: bits 0xEAF7EE, f16 0x3DC8.
template <typename T>
__device__ __forceinline__ void fill_cache(T* cache, uint64_t seed, uint32_t layer,
                                           uint32_t is_value, uint32_t heads, uint32_t head_dim,
                                           uint32_t capacity, uint32_t positions) {
    const uint64_t stream = mix(seed + (2ull * layer + is_value + 1) * GOLDEN);
    const uint64_t rows = static_cast<uint64_t>(heads) * positions;
    const uint64_t warps = static_cast<uint64_t>(gridDim.x) * blockDim.x / 32;
    uint64_t r = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    for (; r < rows; r += warps) {
        const uint64_t head = r / positions, position = r % positions;
        const uint64_t row = mix(stream + ((head << 32) + position + 1) * GOLDEN);
        T* out = cache + (head * capacity + position) * head_dim;
        for (uint32_t dim = threadIdx.x % 32; dim < head_dim; dim += 32) {
            const uint32_t bits = mix(row + (dim + 1) * GOLDEN) >> 40;
            // Both steps before the last are exact.
            const float unit = static_cast<float>(bits) * 0x1p-23f - 1.0f;
            put(out + dim, __fmul_rn(unit, 1.73f));
        }
    }
}

// See fill_cache. Any grid; block a multiple of 32; positions ≤ capacity.
extern "C" __global__ void __launch_bounds__(256)
fill_cache_f16(uint16_t* cache, uint64_t seed, uint32_t layer, uint32_t is_value, uint32_t heads,
               uint32_t head_dim, uint32_t capacity, uint32_t positions) {
    fill_cache(cache, seed, layer, is_value, heads, head_dim, capacity, positions);
}

extern "C" __global__ void __launch_bounds__(256)
fill_cache_f32(float* cache, uint64_t seed, uint32_t layer, uint32_t is_value, uint32_t heads,
               uint32_t head_dim, uint32_t capacity, uint32_t positions) {
    fill_cache(cache, seed, layer, is_value, heads, head_dim, capacity, positions);
}

// --- Statistics ---------------------------------------------------------------------------------

// out = {minimum, maximum, mean, root mean square, NaNs, infinities} of x [len]; the first four
// over the finite elements, 0 if there are none. One block, a multiple of 32 threads up to 1024.
extern "C" __global__ void __launch_bounds__(1024)
stats_f32(const float* x, uint64_t len, float* out) {
    struct Stats {
        double sum, squares;
        uint64_t finite, nans, infinities;
        float min, max;
    };
    const float inf = __int_as_float(0x7F800000);
    auto merge = [](Stats& a, const Stats& b) {
        a.sum += b.sum, a.squares += b.squares, a.finite += b.finite;
        a.nans += b.nans, a.infinities += b.infinities;
        a.min = fminf(a.min, b.min), a.max = fmaxf(a.max, b.max);
    };
    Stats s{0.0, 0.0, 0, 0, 0, inf, -inf};
    for (uint64_t i = threadIdx.x; i < len; i += blockDim.x) {
        const float v = x[i];
        if (is_finite(v)) {
            merge(s, Stats{v, static_cast<double>(v) * v, 1, 0, 0, v, v});
        } else if (v != v) {
            ++s.nans;
        } else {
            ++s.infinities;
        }
    }
    // Threads, then warps, in a fixed order.
    __shared__ Stats warps[32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        Stats t;
        t.sum = __shfl_down_sync(~0u, s.sum, o), t.squares = __shfl_down_sync(~0u, s.squares, o);
        t.finite = __shfl_down_sync(~0u, s.finite, o), t.nans = __shfl_down_sync(~0u, s.nans, o);
        t.infinities = __shfl_down_sync(~0u, s.infinities, o);
        t.min = __shfl_down_sync(~0u, s.min, o), t.max = __shfl_down_sync(~0u, s.max, o);
        merge(s, t);
    }
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (uint32_t w = 1; w < blockDim.x / 32; ++w) merge(s, warps[w]);
    const double n = s.finite > 0 ? static_cast<double>(s.finite) : 1.0;
    out[0] = s.finite > 0 ? s.min : 0.0f;
    out[1] = s.finite > 0 ? s.max : 0.0f;
    out[2] = static_cast<float>(s.sum / n);
    out[3] = static_cast<float>(sqrt(s.squares / n));
    out[4] = static_cast<float>(s.nans);
    out[5] = static_cast<float>(s.infinities);
}
