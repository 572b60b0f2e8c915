// Runs CUDA kernels on the host: types, instructions and functions of the device over the fibres of
// `fibres.h`, and of compute capability 9.0 those of `bulk.h`.
// Copies to shared memory happen when they are waited for: a missing wait reads what was there before.
#pragma once
#include "fibres.h"

#include <cmath>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

struct alignas(8) float2 { float x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

namespace shim {

// A parameter from its 8-byte slot.
template <class T>
T parameter(uint64_t slot) {
    T value;
    memcpy(&value, &slot, sizeof value);
    return value;
}

// What a launch is given; `mod.rs` has the same.
struct Launch {
    uint32_t grid, block, shared, plant;
    bool together, backwards;
};

template <class... A, size_t... I>
int call(void (*kernel)(A...), const Launch& l, const uint64_t* slots, std::index_sequence<I...>) {
    backwards = l.backwards, plant = l.plant;
    return launch(l.grid, l.block, l.shared, l.together, [=] { kernel(parameter<A>(slots[I])...); });
}
template <class... A>
int call(void (*kernel)(A...), const Launch& l, const uint64_t* slots) {
    return call(kernel, l, slots, std::index_sequence_for<A...>());
}

// Shows a value to the warp. What any lane has shown, once all lanes are here.
template <class T>
struct Exchange {
    static_assert(sizeof(T) <= sizeof(Fibre::slots[0]));
    uint32_t parity;
    explicit Exchange(T own) {
        Fibre& f = fibre();
        parity = f.parity;
        memcpy(f.slots[parity], &own, sizeof own);
        f.parity ^= 1;
        wait(State::exchange);
    }
    T of(uint32_t lane) const {
        T value;
        memcpy(&value, here->fibres[(current & ~31u) + lane % 32].slots[parity], sizeof value);
        return value;
    }
};

// What the PTX of the sources does on one thread; `mod.rs` says which instruction is which function.
template <class... A> void nothing(A&&...) {}
template <class T>
void clock(T& t, uint32_t = 0) { t = static_cast<T>(++ticks); }
inline void thread_index(uint32_t& t) { t = threadIdx.x; }
inline void block_index(uint32_t& b) { b = blockIdx.x; }
inline void block_count(uint32_t& n) { n = gridDim.x; }
template <class T> void lane_index(T& lane) { lane = threadIdx.x % 32; }
inline uint16_t half(float v) { return bits_as<uint16_t>(static_cast<_Float16>(v)); }
inline float from_half(uint16_t v) { return static_cast<float>(bits_as<_Float16>(v)); }
template <class T> void store_half(T* at, float v) { at->bits = half(v); }
inline void widen(float& low, float& high, uint32_t pair) {
    low = from_half(static_cast<uint16_t>(pair)), high = from_half(static_cast<uint16_t>(pair >> 16));
}
inline void max_nan(float& out, float a, float b) { out = a != a || b != b ? NAN : fmaxf(a, b); }
inline void power_of_two(float& y, float x) { y = exp2f(x); }
inline void load_words(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, const void* at) {
    const uint4 v = *static_cast<const uint4*>(at);
    x = v.x, y = v.y, z = v.z, w = v.w;
}
// An address in shared memory is 32 bits from where the memory of the launch's size begins.
inline uint8_t* at_shared(uint32_t address) { return dynamic + static_cast<int32_t>(address); }
inline void load_shared_words(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, uint32_t address) {
    load_words(x, y, z, w, at_shared(address));
}
template <class T> void load_shared(T& out, uint32_t address) { memcpy(&out, at_shared(address), sizeof out); }
inline void copy_async(uint32_t to, const void* from, int bytes) {
    fibre().open.push_back({at_shared(to), from, bytes != 0});
}
inline void commit() {
    Fibre& f = fibre();
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
inline void wait_groups(size_t left) {
    auto& groups = fibre().groups;
    for (; groups.size() > left; groups.pop_front()) {
        for (const Copy& c : groups.front()) {
            if (c.valid) memcpy(c.to, c.from, 16);
            else memset(c.to, 0, 16);
        }
    }
}

// D += A B over a warp, A 16 x K by rows and B K x 8 by columns, in words of EACH elements: lane
// 4g + t has rows g and g + 8 of A and D, column g of B, columns 2t and 2t + 1 of D.
template <int EACH, class Sum, class D, class ElementA, class ElementB>
__attribute__((always_inline)) inline void matrix(D& d0, D& d1, D& d2, D& d3, const uint32_t (&own)[6],
                                                  ElementA a_of, ElementB b_of) {
    struct Words { uint32_t w[6]; };
    Words words;
    memcpy(words.w, own, sizeof own);
    const Exchange<Words> all(words);
    const uint32_t g = current % 32 / 4, t = current % 4;
    D* const d[4] = {&d0, &d1, &d2, &d3};
    for (uint32_t i = 0; i < 4; i++) {
        Sum sum = 0;
        for (uint32_t k = 0; k < 8; k++) {
            const uint32_t part = k / 4, lane = k % 4;
            const uint32_t a = all.of(4 * g + lane).w[2 * part + i / 2];
            const uint32_t b = all.of(4 * (2 * t + i % 2) + lane).w[4 + part];
            for (uint32_t at = 0; at < EACH; at++) {
                sum += static_cast<Sum>(a_of(a, at)) * static_cast<Sum>(b_of(b, at));
            }
        }
        *d[i] = static_cast<D>(static_cast<Sum>(*d[i]) + sum);
    }
}

__attribute__((always_inline)) inline int signed_byte(uint32_t w, uint32_t at) { return static_cast<int8_t>(w >> (8 * at)); }
__attribute__((always_inline)) inline int unsigned_byte(uint32_t w, uint32_t at) { return static_cast<uint8_t>(w >> (8 * at)); }
__attribute__((always_inline)) inline float half_of(uint32_t w, uint32_t at) { return from_half(static_cast<uint16_t>(w >> (16 * at))); }
__attribute__((always_inline)) inline float bfloat_of(uint32_t w, uint32_t at) { return bits_as<float>(w >> (16 * at) << 16); }

#define MATRIX(NAME, EACH, SUM, D, A_OF, B_OF)                                                      \
    inline void NAME(D& d0, D& d1, D& d2, D& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                     uint32_t b0, uint32_t b1) {                                                    \
        matrix<EACH, SUM>(d0, d1, d2, d3, {a0, a1, a2, a3, b0, b1}, A_OF, B_OF);                    \
    }
MATRIX(matrix_signed, 4, int, int, signed_byte, signed_byte)
MATRIX(matrix_unsigned, 4, int, int, unsigned_byte, signed_byte)
MATRIX(matrix_half, 2, double, float, half_of, half_of)
MATRIX(matrix_bfloat, 2, double, float, bfloat_of, bfloat_of)
#undef MATRIX

}  // namespace shim

inline void __syncthreads() { shim::meet(0, shim::EVERYONE); }
// Cleared behind a wait of its own: by then all have read what was asked before.
inline int __syncthreads_or(int mine) {
    int& any = shim::here->any;
    __syncthreads();
    any = 0;
    __syncthreads();
    any |= mine != 0;
    __syncthreads();
    return any;
}
inline void __threadfence() {}
inline void __threadfence_system() {}
inline int64_t clock64() { return static_cast<int64_t>(++shim::ticks); }
// An address in shared memory, as the 32 bits that instructions take.
inline size_t __cvta_generic_to_shared(const void* p) {
    return static_cast<size_t>(static_cast<const uint8_t*>(p) - shim::dynamic);
}

inline uint32_t __float_as_uint(float v) { return bits_as<uint32_t>(v); }
inline float __uint_as_float(uint32_t u) { return bits_as<float>(u); }
inline float __int_as_float(int32_t i) { return bits_as<float>(i); }
inline float __int2float_rn(int i) { return static_cast<float>(i); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __half2float(__half h) { return shim::from_half(h.bits); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half __float2half_rn(float v) { return {shim::half(v)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline float __bfloat162float(__nv_bfloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.bits) << 16); }
// To nearest, ties to even; finite values.
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    const uint32_t u = __float_as_uint(v);
    return {static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint64_t>(a) * b >> 32; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<unsigned __int128>(a) * b >> 64; }
inline int __clz(uint32_t v) { return v == 0 ? 32 : __builtin_clz(v); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t select) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) {
        out |= static_cast<uint32_t>(bytes >> (8 * (select >> (4 * i) & 7)) & 0xFF) << (8 * i);
    }
    return out;
}
template <class A, class B>
std::common_type_t<A, B> min(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
std::common_type_t<A, B> max(A a, B b) {
    using T = std::common_type_t<A, B>;
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

template <class T>
T __shfl_xor_sync(uint32_t, T v, int mask) {
    return shim::Exchange<T>(v).of(shim::current % 32 ^ static_cast<uint32_t>(mask));
}
// What a test plants in the place of one exchange.
template <class T>
T wrong_lane(uint32_t mask, T v, int lane) {
    return __shfl_xor_sync(mask, v, lane / 2);
}
template <class T>
T __shfl_sync(uint32_t, T v, int lane) {
    return shim::Exchange<T>(v).of(static_cast<uint32_t>(lane));
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
    const shim::Exchange<uint32_t> all(v);
    for (uint32_t lane = 0; lane < 32; lane++) v = max(v, all.of(lane));
    return v;
}
inline uint32_t __ballot_sync(uint32_t, bool v) {
    const shim::Exchange<uint32_t> all(v);
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < 32; lane++) lanes |= all.of(lane) << lane;
    return lanes;
}
inline void __syncwarp() { shim::Exchange<uint32_t> all(0); }
inline bool __any_sync(uint32_t, bool v) { return __reduce_max_sync(~0u, v) != 0; }
inline uint32_t atomicInc(uint32_t* at, uint32_t most) {
    const uint32_t old = *at;
    *at = old >= most ? 0 : old + 1;
    return old;
}
template <class T>
T atomicAdd(T* at, T v) {
    const T old = *at;
    *at += v;
    return old;
}
template <class T> T __ldcg(const T* at) { return *at; }
template <class T> T __ldg(const T* at) { return *at; }
