// Runs CUDA kernels on the host: the threads of a block are fibres on one system thread, which change
// only at barriers and shuffles. Blocks run one after another, so shared memory is static memory. The
// order is always the same: a thread runs on until it must wait, the lowest number first. So a missing
// barrier lets a thread read what its neighbours have not written yet.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Dim { uint32_t x = 0, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum class State { ready, barrier, shuffle, ended };

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(64 << 10);
    State state = State::ready;
    uint32_t parity = 0;   // which of its two slots the next shuffle uses
    uint32_t slots[2];
};

inline std::vector<Fibre> fibres;
inline ucontext_t scheduler;
inline uint32_t current;
inline std::function<void()> body;
inline uint64_t ticks;

inline void wait(State state) {
    fibres[current].state = state;
    swapcontext(&fibres[current].context, &scheduler);
}

inline void enter() {
    body();
    fibres[current].state = State::ended;
    swapcontext(&fibres[current].context, &scheduler);
}

// Lets every fibre of `from` to `to` go on if all that have not ended wait in `state`.
inline bool release(State state, uint32_t from, uint32_t to) {
    bool any = false;
    for (uint32_t i = from; i < to; i++) {
        if (fibres[i].state != state && fibres[i].state != State::ended) return false;
        any |= fibres[i].state == state;
    }
    for (uint32_t i = from; i < to; i++) {
        if (fibres[i].state == state) fibres[i].state = State::ready;
    }
    return any;
}

// 0, or 1 where threads wait for one another in vain.
inline int run_block(uint32_t threads) {
    for (uint32_t i = 0; i < threads; i++) {
        Fibre& f = fibres[i];
        f.state = State::ready;
        f.parity = 0;
        getcontext(&f.context);
        f.context.uc_stack = {f.stack.data(), 0, f.stack.size()};
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (;;) {
        bool ran = false, waiting = false;
        for (current = 0; current < threads; current++) {
            if (fibres[current].state != State::ready) continue;
            threadIdx.x = current;
            swapcontext(&scheduler, &fibres[current].context);
            ran = true;
        }
        for (uint32_t w = 0; w < threads; w += 32) {
            ran |= release(State::shuffle, w, w + 32 < threads ? w + 32 : threads);
        }
        ran |= release(State::barrier, 0, threads);
        for (uint32_t i = 0; i < threads; i++) waiting |= fibres[i].state != State::ended;
        if (!waiting) return 0;
        if (!ran) return 1;
    }
}

inline int launch(uint32_t grid, uint32_t threads, std::function<void()> kernel) {
    if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
    body = std::move(kernel);
    gridDim.x = grid;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++) {
        if (run_block(threads) != 0) return 1;
    }
    return 0;
}

// The value of thread `from` of this warp, once all its lanes are here.
inline uint32_t shuffle_from(uint32_t value, uint32_t from) {
    Fibre& f = fibres[current];
    const uint32_t self = current, parity = f.parity;
    f.slots[parity] = value;
    f.parity ^= 1;
    wait(State::shuffle);
    threadIdx.x = self;
    return fibres[from].slots[parity];
}
// The value of the lane whose number differs from this one's by `mask`.
inline uint32_t shuffle(uint32_t value, uint32_t mask) { return shuffle_from(value, current ^ mask); }

inline uint64_t clock() { return ++ticks; }

inline uint16_t half(float v) {
    const _Float16 h = static_cast<_Float16>(v);
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::State::barrier); }
inline void __threadfence_system() {}

inline uint32_t __float_as_uint(float v) { uint32_t u; memcpy(&u, &v, 4); return u; }
inline float __uint_as_float(uint32_t u) { float v; memcpy(&v, &u, 4); return v; }
inline float __int_as_float(int32_t i) { return __uint_as_float(static_cast<uint32_t>(i)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __shfl_xor_sync(uint32_t, float v, int mask) {
    return __uint_as_float(shim::shuffle(__float_as_uint(v), static_cast<uint32_t>(mask)));
}
inline uint32_t __shfl_xor_sync(uint32_t, uint32_t v, int mask) {
    return shim::shuffle(v, static_cast<uint32_t>(mask));
}
inline float __shfl_sync(uint32_t, float v, int lane) {
    const uint32_t from = (shim::current & ~31u) + static_cast<uint32_t>(lane);
    return __uint_as_float(shim::shuffle_from(__float_as_uint(v), from));
}
inline uint32_t __shfl_sync(uint32_t, uint32_t v, int lane) {
    return shim::shuffle_from(v, (shim::current & ~31u) + static_cast<uint32_t>(lane));
}
inline uint32_t atomicInc(uint32_t* at, uint32_t most) {
    const uint32_t old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}
template <typename T> inline T __ldcg(const T* at) { return *at; }
template <typename T> inline T __ldg(const T* at) { return *at; }
