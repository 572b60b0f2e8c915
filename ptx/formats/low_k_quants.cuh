// Formats of 256 columns with a plane of 2-bit quants and sub-blocks of 16: Q2_K, Q3_K.
//
//   Q2_K  w = d sc(j) q - dmin mn(j), sc and mn 4 bits
//   Q3_K  w = d (sc(j) - 32) (q - 4), sc 6 bits; the third bit of q has a plane of its own
//
// Unit planes: bit pairs [1024]; [third bits [512]]; scales; d (and dmin) a row.
#pragma once
#include "integer.cuh"

namespace gemv {

// Integer dot products of the quants of a unit with the activations: add(set, low, high) for sets
// 0..4 of four sub-blocks, with this lane's sums for sub-block 4·set + t of rows g and g + 8.
//
// Quants are masked out of their words where they stand, not shifted to the lowest bits: register
// r of a fragment (rows g and g + 8, then the same of the step's second half) then holds 4^r q, and
// third bits of step s hold 2^(4 (s & 1) + r). A sum's terms share one such factor, which a shift
// takes off again, exactly.
template <bool THIRD_BITS, class Add>
__device__ __forceinline__ void product16(const uint8_t* unit, const uint8_t* record, int lane, Add add) {
    LANE_AGAIN(lane);
    const int g = lane >> 2, t = lane & 3, p = g >> 1;
    const uint8_t* x = record + (g & 1) * IntegerStage::LOW + 16 * p + 4 * t;
    const int shift = 4 * (t & 1), third_shift = 4 * (t >> 1) + 2 * (t & 1);
    uint4 pairs;
#pragma unroll
    for (int set = 0; set < 4; set++) {
        int d[4] = {}, e[4] = {};
        uint32_t thirds = 0;
        if constexpr (THIRD_BITS) thirds = *reinterpret_cast<const uint32_t*>(unit + 1024 + set * 128 + lane * 4);
        const uint32_t xb = *reinterpret_cast<const uint32_t*>(x + 64 * set);
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const int s = 2 * set + k;
            if ((s & 3) == 0) pairs = *reinterpret_cast<const uint4*>(unit + (s >> 2) * 512 + lane * 16);
            const uint32_t w = (s & 3) == 0 ? pairs.x : (s & 3) == 1 ? pairs.y : (s & 3) == 2 ? pairs.z : pairs.w;
            const uint32_t b0 = p == 2 * k ? xb : 0u, b1 = p == 2 * k + 1 ? xb : 0u;
            uint32_t q[4];
#pragma unroll
            for (int r = 0; r < 4; r++) q[r] = w & (0x03030303u << (2 * r));
            mma_integer<false>(d, q, b0, b1);
            if constexpr (THIRD_BITS) {
#pragma unroll
                for (int r = 0; r < 4; r++) q[r] = thirds & (0x01010101u << (4 * k + r));
                mma_integer<false>(e, q, b0, b1);
            }
        }
        // Within 32 bits: |sum| ≤ 16·192·32630 before the shift.
        int low = (d[0] * 256 + d[1]) >> shift, high = (d[2] * 256 + d[3]) >> (shift + 2);
        if constexpr (THIRD_BITS) {
            low += ((e[0] * 256 + e[1]) >> third_shift) * 4;
            high += ((e[2] * 256 + e[3]) >> (third_shift + 1)) * 4;
        }
        add(set, low, high);
    }
}

__device__ __forceinline__ int bit_pair_at(const uint8_t* unit, int row, int column) {
    const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
    const int lane = 4 * (row & 7) + t, r = 2 * h + (row >> 3);
    return (unit[(s >> 2) * 512 + lane * 16 + 4 * (s & 3) + b] >> (2 * r)) & 3;
}

struct Q2K : IntegerStage {
    static constexpr uint32_t SCALES = 1024, D = 1280, UNIT_BYTES = 1344;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t) { return UNIT_BYTES; }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane, uint32_t,
                                               float& low, float& high) {
        const int g = lane >> 2, t = lane & 3;
        const uint2 fields = *reinterpret_cast<const uint2*>(unit + SCALES + lane * 8);
        // 64·3·15·32630 and 64·15·32630 bound the sums of all four sets.
        int dl = 0, dh = 0, ml = 0, mh = 0;
        product16<false>(unit, record, lane, [&](int set, int l, int h) {
            const int sum = sum16(record, 4 * set + t);
            const uint32_t fl = fields.x >> (8 * set), fh = fields.y >> (8 * set);
            dl += l * static_cast<int>(fl & 15);
            dh += h * static_cast<int>(fh & 15);
            ml += sum * static_cast<int>((fl >> 4) & 15);
            mh += sum * static_cast<int>((fh >> 4) & 15);
        });
        const uint2 dw = *reinterpret_cast<const uint2*>(unit + D + g * 8);
        const float2 cl = half_pair(dw.x), ch = half_pair(dw.y);
        const float x = scale(record);
        low = fmaf(x, cl.x * __int2float_rn(dl) - cl.y * __int2float_rn(ml), low);
        high = fmaf(x, ch.x * __int2float_rn(dh) - ch.y * __int2float_rn(mh), high);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int j = column >> 4, owner = 4 * (row & 7) + (j & 3);
        const int field = unit[SCALES + owner * 8 + (row >> 3) * 4 + (j >> 2)];
        const uint8_t* p = unit + D + (row & 7) * 8 + (row >> 3) * 4;
        const float d = __fmul_rn(half_at(p), static_cast<float>(field & 15));
        const float m = __fmul_rn(half_at(p + 2), static_cast<float>(field >> 4));
        return __fsub_rn(__fmul_rn(d, static_cast<float>(bit_pair_at(unit, row, column))), m);
    }
};

struct Q3K : IntegerStage {
    static constexpr uint32_t THIRDS = 1024, SCALES = 1536, D = 1728, UNIT_BYTES = 1760;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t) { return UNIT_BYTES; }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane, uint32_t,
                                               float& low, float& high) {
        const int g = lane >> 2, t = lane & 3;
        uint32_t fl, fh;
        six_bit_fields<SCALES>(unit, lane, fl, fh);
        // 64·4·32·32630 bounds the sums of all four sets.
        int dl = 0, dh = 0;
        product16<true>(unit, record, lane, [&](int set, int l, int h) {
            const int offset = 4 * sum16(record, 4 * set + t);
            dl += (l - offset) * (static_cast<int>((fl >> (8 * set)) & 63) - 32);
            dh += (h - offset) * (static_cast<int>((fh >> (8 * set)) & 63) - 32);
        });
        const float2 d = half_pair(*reinterpret_cast<const uint32_t*>(unit + D + g * 4));
        const float x = scale(record);
        low = fmaf(x * d.x, __int2float_rn(dl), low);
        high = fmaf(x * d.y, __int2float_rn(dh), high);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int j = column >> 4;
        uint32_t fl, fh;
        six_bit_fields<SCALES>(unit, 4 * (row & 7) + (j & 3), fl, fh);
        const int sc = static_cast<int>(((row < 8 ? fl : fh) >> (8 * (j >> 2))) & 63) - 32;
        const int q = (bit_pair_at(unit, row, column) | single_bit_at(unit + THIRDS, row, column) << 2) - 4;
        const float d = half_at(unit + D + (row & 7) * 4 + (row >> 3) * 2);
        return __fmul_rn(__fmul_rn(d, static_cast<float>(sc)), static_cast<float>(q));
    }
};

}  // namespace gemv
