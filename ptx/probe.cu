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
// with mean 0 and variance 1; `stream` says which seed, layer and half (src/engine/seeded.rs):
//
//   row    = mix(mix(stream + head + GOLDEN) + position + GOLDEN)      modulo 2^64
//   bits   = mix(row + dim + GOLDEN) >> 40                             24 bits
//   value  = f16((f32(bits) / 2^24 - 1/2) · √12)                       one rounding f32, one f16
template <typename T>
__device__ __forceinline__ void fill_cache(T* cache, uint64_t stream, uint32_t heads,
                                           uint32_t head_dim, uint32_t capacity,
                                           uint32_t positions) {
    const uint64_t rows = static_cast<uint64_t>(heads) * positions;
    const uint64_t warps = static_cast<uint64_t>(gridDim.x) * blockDim.x / 32;
    uint64_t r = (static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
    for (; r < rows; r += warps) {
        const uint64_t head = r / positions, position = r % positions;
        const uint64_t row = mix(mix(stream + head + GOLDEN) + position + GOLDEN);
        T* out = cache + (head * capacity + position) * head_dim;
        for (uint32_t dim = threadIdx.x % 32; dim < head_dim; dim += 32) {
            const uint32_t bits = mix(row + dim + GOLDEN) >> 40;
            // Exact, fused or not: the product with a power of two, and the difference.
            const float centred = static_cast<float>(bits) * 0x1p-24f - 0.5f;
            put(out + dim, __fmul_rn(centred, 3.4641016f));
        }
    }
}

// See fill_cache. Any grid; block a multiple of 32; positions ≤ capacity.
extern "C" __global__ void __launch_bounds__(256)
fill_cache_f16(uint16_t* cache, uint64_t stream, uint32_t heads, uint32_t head_dim,
               uint32_t capacity, uint32_t positions) {
    fill_cache(cache, stream, heads, head_dim, capacity, positions);
}

extern "C" __global__ void __launch_bounds__(256)
fill_cache_f32(float* cache, uint64_t stream, uint32_t heads, uint32_t head_dim, uint32_t capacity,
               uint32_t positions) {
    fill_cache(cache, stream, heads, head_dim, capacity, positions);
}
