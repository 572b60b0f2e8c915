// Formats with one f16 scale (and minimum) per 32 columns: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.
//
//   Q4_0  w = d (q - 8)      Q5_0  w = d (q - 16)      Q8_0  w = d q
//   Q4_1  w = d q + m        Q5_1  w = d q + m
//
// Unit planes: quants; [fifth bits]; d as pairs (row g, row g + 8) at 32 s + 4 g; [m likewise].
#pragma once
#include "integer.cuh"

namespace gemv {

// A pair plane's values of this lane: sub-blocks t and t + 4 of rows g and g + 8.
struct Pairs {
    float2 first, second;
    __device__ __forceinline__ Pairs(const uint8_t* plane, int lane, uint32_t columns) {
        const int g = lane >> 2, t = lane & 3;
        auto at = [&](int s) -> float2 {
            return s * 32 < columns ? half_pair(*reinterpret_cast<const uint32_t*>(plane + s * 32 + g * 4))
                                    : make_float2(0.f, 0.f);
        };
        first = at(t);
        second = at(t + 4);
    }
};

struct Bytes {
    static constexpr int HIGH_SHIFT = 0;
    const uint8_t* unit;
    int lane;
    __device__ __forceinline__ void operator()(int s, uint32_t (&a)[4]) const {
        const uint4 w = *reinterpret_cast<const uint4*>(unit + s * 512 + lane * 16);
        a[0] = w.x, a[1] = w.y, a[2] = w.z, a[3] = w.w;
    }
};

// BITS 4, 5 or 8; with a minimum, or an offset that is subtracted from the quant.
template <int BITS, bool MINIMUM, int OFFSET>
struct Legacy : IntegerStage {
    static constexpr uint32_t STEP_QUANTS = BITS == 8 ? 512 : 256;
    static constexpr uint32_t STEP_BYTES = STEP_QUANTS + (BITS == 5 ? 64 : 0) + (MINIMUM ? 64 : 32);
    static constexpr uint32_t UNIT_BYTES = 8 * STEP_BYTES;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t columns) { return columns / 32 * STEP_BYTES; }

    static __device__ __forceinline__ const uint8_t* scales(const uint8_t* unit, uint32_t columns) {
        return unit + columns / 32 * (STEP_QUANTS + (BITS == 5 ? 64 : 0));
    }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        dot_of(unit, Record{record, lane}, lane, columns, low, high);
    }
    using Held = HeldRecord;
    template <class X>
    static __device__ __forceinline__ void dot_of(const uint8_t* unit, const X& x, int lane, uint32_t columns,
                                                  float& low, float& high) {
        // Two copies: a full unit without a test per step, and the tail of a row.
        if (columns == UNIT_COLUMNS) {
            dot_part(unit, x, lane, UNIT_COLUMNS, low, high);
        } else {
            dot_part(unit, x, lane, columns, low, high);
        }
    }

    template <class X>
    static __device__ __forceinline__ void dot_part(const uint8_t* unit, const X& x, int lane, uint32_t columns,
                                                    float& low, float& high) {
        const int s0 = x.sum(0), s1 = x.sum(1);
        const int o0 = MINIMUM ? 0 : -OFFSET * s0, o1 = MINIMUM ? 0 : -OFFSET * s1;
        int l[2], h[2];
        if constexpr (BITS == 8) {
            product32<true>(x, columns, Bytes{unit, lane}, l, h, 0, 0);
        } else if constexpr (BITS == 5) {
            FiveBits five{{unit, lane, {}}, unit + columns / 32 * 256, 0};
            product32<false>(x, columns, five, l, h, o0, o1);
        } else {
            product32<false>(x, columns, NibblesTimes<4>{unit, lane, {}}, l, h, o0, o1);
        }
        const uint8_t* plane = scales(unit, columns);
        const Pairs d(plane, lane, columns);
        float a = fmaf(d.first.x, __int2float_rn(l[0]), d.second.x * __int2float_rn(l[1]));
        float b = fmaf(d.first.y, __int2float_rn(h[0]), d.second.y * __int2float_rn(h[1]));
        if constexpr (MINIMUM) {
            const Pairs m(plane + columns, lane, columns);
            const float f0 = __int2float_rn(s0), f1 = __int2float_rn(s1);
            a = fmaf(m.first.x, f0, fmaf(m.second.x, f1, a));
            b = fmaf(m.first.y, f0, fmaf(m.second.y, f1, b));
        }
        low = fmaf(x.scale(), a, low);
        high = fmaf(x.scale(), b, high);
    }

    // Element (row, column) of a unit of `columns` columns: the file's value, bit for bit.
    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t columns) {
        const uint8_t* plane = scales(unit, columns);
        const int at = (column >> 5) * 32 + (row & 7) * 4 + (row >> 3) * 2;
        const float d = half_at(plane + at);
        int q;
        if constexpr (BITS == 8) {
            const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
            const int lane = 4 * (row & 7) + t, r = 2 * h + (row >> 3);
            q = static_cast<int8_t>(unit[s * 512 + lane * 16 + 4 * r + b]);
        } else {
            q = nibble_at(unit, row, column);
            if constexpr (BITS == 5) q |= single_bit_at(unit + columns / 32 * 256, row, column) << 4;
        }
        if constexpr (MINIMUM) return __fadd_rn(__fmul_rn(d, static_cast<float>(q)), half_at(plane + columns + at));
        return __fmul_rn(d, static_cast<float>(q - OFFSET));
    }
};

using Q4_0 = Legacy<4, false, 8>;
using Q4_1 = Legacy<4, true, 0>;
using Q5_0 = Legacy<5, false, 16>;
using Q5_1 = Legacy<5, true, 0>;
using Q8_0 = Legacy<8, false, 0>;

}  // namespace gemv
