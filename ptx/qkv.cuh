// q, k, v = W n + bias, n = rms_norm(x); q and k rotated; k and v appended to the cache. Without a
// rotated part (half_rotary 0), at position 0 of an f32 cache of one position, whatever the step's:
// the plain vectors, for what comes between projection and rotation in some architectures.
#pragma once
#include "epilogues.cuh"

// Blocks of qkv that registers leave room for on a multiprocessor. From 9.0 on four, that is 64
// registers: qkv, attention (128) and o_proj (64) then fit together, and o_proj's weights arrive
// during both. Without programmatic launch nothing is gained by it.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define QKV_BLOCKS 4
#else
#define QKV_BLOCKS 2
#endif

// Units whose gains a warp of qkv holds in registers while it waits; build.sh says one for the formats
// that the compiler for 12.0 does not fit into the 64 registers with two.
#if !defined(QKV_GAINS) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
#undef QKV_GAINS
#define QKV_GAINS 2
#endif

// 1: the thread's number is read again after the staging and in the epilogue, so that over the product
// registers hold only what the product makes of it. build.sh says so for the formats that the compiler
// for 12.0 does not fit into the 64 registers otherwise: it spilled the epilogue's position and row.
#if !defined(QKV_THREAD_AGAIN) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900)
#undef QKV_THREAD_AGAIN
#define QKV_THREAD_AGAIN 0
#endif

#define QKV_KERNEL(NAME, A, B)                                                                         \
    extern "C" __global__ void __launch_bounds__(gemv::THREADS, QKV_BLOCKS)                           \
        NAME(const StepState* step, const float* x, const float* gain, float eps, const uint8_t* wq,  \
             const uint8_t* wk, const uint8_t* wv, const float* bq, const float* bk, const float* bv, \
             const float* freqs, float* q, void* keys, void* values, uint32_t q_rows,                 \
             uint32_t kv_rows, uint32_t columns, uint32_t head_dim, uint32_t half_rotary,             \
             uint32_t halves, float magnitude, uint32_t capacity, uint32_t cache_f32,                 \
             const StepState* at, uint32_t slots, uint32_t early) {                                  \
        const uint32_t q_tiles = (q_rows + 15) / 16, kv_tiles = (kv_rows + 15) / 16;                  \
        gemv::RotateAppend<QKV_THREAD_AGAIN != 0> epilogue{                                          \
            at,      bq,      bk,       bv,       freqs,    q,           keys,        values,         \
            q_rows,  kv_rows, q_tiles,  kv_tiles, head_dim, half_rotary, halves != 0, cache_f32 != 0, \
            magnitude, capacity};                                                                     \
        gemv::run<A, B, 2, QKV_GAINS, QKV_THREAD_AGAIN != 0>(                                         \
            step, x, gain, eps, columns, q_tiles + 2 * kv_tiles, slots, early,                        \
            gemv::Three<A, B>{wq, wk, wv, q_tiles, kv_tiles}, epilogue);                              \
    }
