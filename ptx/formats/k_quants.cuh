// Formats of 256 columns with two levels of scales: Q4_K, Q5_K, Q6_K.
//
//   Q4_K, Q5_K  w = d sc(j) q - dmin mn(j), j a sub-block of 32, sc and mn 6 bits
//   Q6_K        w = d sc(j) (q - 32), j a sub-block of 16, sc a signed byte
#pragma once
#include "integer.cuh"

namespace gemv {

template <int BITS>
struct K45 : IntegerStage {
    static constexpr uint32_t BIT_PLANE = 2048, SCALES = BITS == 5 ? 2560 : 2048;
    static constexpr uint32_t UNIT_BYTES = SCALES + 256;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t) { return UNIT_BYTES; }

    using Held = HeldRecord;
    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        dot_of(unit, Record{record, lane}, lane, columns, low, high);
    }
    template <class X>
    static __device__ __forceinline__ void dot_of(const uint8_t* unit, const X& x, int lane, uint32_t, float& low,
                                                  float& high) {
        const int g = lane >> 2;
        int l[2], h[2];
        if constexpr (BITS == 5) {
            FiveBits five{{unit, lane, {}}, unit + BIT_PLANE, 0};
            product32<false>(x, 256, five, l, h, 0, 0);
        } else {
            product32<false>(x, 256, NibblesTimes<4>{unit, lane, {}}, l, h, 0, 0);
        }
        uint32_t fl, fh;  // sc, mn of sub-block t; sc, mn of t + 4
        six_bit_fields<SCALES>(unit, lane, fl, fh);
        const uint2 dw = *reinterpret_cast<const uint2*>(unit + SCALES + 192 + g * 8);
        const float2 dl = half_pair(dw.x), dh = half_pair(dw.y);
        const int s0 = x.sum(0), s1 = x.sum(1);
        low = fmaf(x.scale(), combine(fl, l, s0, s1, dl), low);
        high = fmaf(x.scale(), combine(fh, h, s0, s1, dh), high);
    }

    static __device__ __forceinline__ float combine(uint32_t f, const int (&q)[2], int s0, int s1, float2 d) {
        const int sc0 = f & 0xff, mn0 = (f >> 8) & 0xff, sc1 = (f >> 16) & 0xff, mn1 = f >> 24;
        // |q| ≤ 32·15·32630 for four bits: two products of 6 bits more still fit 32 bits signed.
        const float dot = BITS == 4 ? __int2float_rn(sc0 * q[0] + sc1 * q[1])
                                    : __int2float_rn(sc0 * q[0]) + __int2float_rn(sc1 * q[1]);
        return d.x * dot - d.y * __int2float_rn(mn0 * s0 + mn1 * s1);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int j = column >> 5, lane = 4 * (row & 7) + (j & 3);
        uint32_t fl, fh;  // sc, mn of sub-block t; sc, mn of t + 4
        six_bit_fields<SCALES>(unit, lane, fl, fh);
        const uint32_t f = (row < 8 ? fl : fh) >> (j < 4 ? 0 : 16);
        const uint8_t* p = unit + SCALES + 192 + (row & 7) * 8 + (row >> 3) * 4;
        int q = nibble_at(unit, row, column);
        if constexpr (BITS == 5) q |= single_bit_at(unit + BIT_PLANE, row, column) << 4;
        const float d = __fmul_rn(half_at(p), static_cast<float>(f & 0xff));
        const float m = __fmul_rn(half_at(p + 2), static_cast<float>((f >> 8) & 0xff));
        return __fsub_rn(__fmul_rn(d, static_cast<float>(q)), m);
    }
};

using Q4K = K45<4>;
using Q5K = K45<5>;

struct Q6K : IntegerStage {
    static constexpr uint32_t HIGH = 2048, SCALES = 3072, D = 3328, UNIT_BYTES = 3360;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t) { return UNIT_BYTES; }

    // Operands over 16 columns: half `half` of a step's 32 is zero but for its own sub-block.
    struct Lazy {
        const uint8_t* record;
        int lane;
        __device__ __forceinline__ void operands(int set, uint32_t (&b)[2][2]) const {
            const int g = lane >> 2, p = g >> 1;
            const uint32_t x = *reinterpret_cast<const uint32_t*>(record + (g & 1) * LOW + 16 * p + 4 * (lane & 3) + 64 * set);
#pragma unroll
            for (int i = 0; i < 4; i++) b[i >> 1][i & 1] = p == i ? x : 0u;
        }
        __device__ __forceinline__ int offset(int set) const { return -32 * sum16(record, 4 * set + (lane & 3)); }
        __device__ __forceinline__ float x() const { return scale(record); }
    };
    struct Held {
        uint32_t words[4][2][2];
        int offsets[4];
        float factor;
        __device__ __forceinline__ Held(const uint8_t* record, int lane) {
            const Lazy lazy{record, lane};
#pragma unroll
            for (int set = 0; set < 4; set++) lazy.operands(set, words[set]), offsets[set] = lazy.offset(set);
            factor = lazy.x();
        }
        __device__ __forceinline__ void operands(int set, uint32_t (&b)[2][2]) const {
#pragma unroll
            for (int i = 0; i < 4; i++) b[i >> 1][i & 1] = words[set][i >> 1][i & 1];
        }
        __device__ __forceinline__ int offset(int set) const { return offsets[set]; }
        __device__ __forceinline__ float x() const { return factor; }
    };

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        dot_of(unit, Lazy{record, lane}, lane, columns, low, high);
    }
    template <class X>
    static __device__ __forceinline__ void dot_of(const uint8_t* unit, const X& x, int lane, uint32_t, float& low,
                                                  float& high) {
        const int g = lane >> 2;
        Nibbles nibbles{unit, lane, {}};
        const uint2 sw = *reinterpret_cast<const uint2*>(unit + SCALES + lane * 8);
        uint4 hw;
        float a = 0.f, b = 0.f;
#pragma unroll
        for (int set = 0; set < 4; set++) {
            // Sub-blocks 4·set .. 4·set + 3; this lane's columns are hi and lo of 4·set + t. The
            // quants are 0..63: their offset of 32 starts the sum.
            const int offset = x.offset(set);
            int d[4] = {0, offset, 0, offset};
            uint32_t xb[2][2];
            x.operands(set, xb);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int s = 2 * set + half;
                if ((s & 3) == 0) hw = *reinterpret_cast<const uint4*>(unit + HIGH + (s >> 2) * 512 + lane * 16);
                const uint32_t w = (s & 3) == 0 ? hw.x : (s & 3) == 1 ? hw.y : (s & 3) == 2 ? hw.z : hw.w;
                uint32_t q[4];
                nibbles(s, q);
                q[0] |= (w << 4) & 0x30303030u;
                q[1] |= (w << 2) & 0x30303030u;
                q[2] |= w & 0x30303030u;
                q[3] |= (w >> 2) & 0x30303030u;
                mma_integer<false>(d, q, xb[half][0], xb[half][1]);
            }
            const int sl = static_cast<int8_t>(sw.x >> (8 * set)), sh = static_cast<int8_t>(sw.y >> (8 * set));
            // |sum| ≤ 16·32·32630 and the scale is a signed byte: the product fits 32 bits.
            a += __int2float_rn((d[0] * 256 + d[1]) * sl);
            b += __int2float_rn((d[2] * 256 + d[3]) * sh);
        }
        const float2 dd = half_pair(*reinterpret_cast<const uint32_t*>(unit + D + g * 4));
        const float xs = x.x();
        low = fmaf(xs * dd.x, a, low);
        high = fmaf(xs * dd.y, b, high);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
        const int lane = 4 * (row & 7) + t, r = 2 * h + (row >> 3);
        const int hi = (unit[HIGH + (s >> 2) * 512 + lane * 16 + 4 * (s & 3) + b] >> (2 * r)) & 3;
        const int q = (nibble_at(unit, row, column) | hi << 4) - 32;
        const int j = column >> 4, owner = 4 * (row & 7) + (j & 3);
        const int sc = static_cast<int8_t>(unit[SCALES + owner * 8 + (row >> 3) * 4 + (j >> 2)]);
        const float d = half_at(unit + D + (row & 7) * 4 + (row >> 3) * 2);
        return __fmul_rn(__fmul_rn(d, static_cast<float>(sc)), static_cast<float>(q));
    }
};

}  // namespace gemv
