// Compile-time loops, and sums over the lanes of a warp of several values at once.
#pragma once
#include <cstdint>

// Calls f(0), …, f(N - 1) with the index as a type.
template <int I>
struct Index {
    static constexpr int value = I;
};

template <int N, int I = 0, typename F>
__device__ __forceinline__ void unroll(F&& f) {
    if constexpr (I < N) {
        f(Index<I>{});
        unroll<N, I + 1>(f);
    }
}

// Sums v[0..N] over the lanes that differ in the bits O, O/2, … STOP, by exchanging halves: the
// lane with bit O set keeps the upper half of the values, and so on; when one value is left, every
// lane gets its sum.
template <int N, int O, int STOP>
__device__ __forceinline__ void reduce_scatter(float* v, uint32_t lane) {
    if constexpr (O >= STOP) {
        if constexpr (N > 1) {
            const bool upper = lane & O;
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                const float sent = __shfl_xor_sync(~0u, upper ? v[i] : v[i + N / 2], O);
                v[i] = (upper ? v[i + N / 2] : v[i]) + sent;
            }
            reduce_scatter<N / 2, O / 2, STOP>(v, lane);
        } else {
            v[0] += __shfl_xor_sync(~0u, v[0], O);
            reduce_scatter<1, O / 2, STOP>(v, lane);
        }
    }
}
