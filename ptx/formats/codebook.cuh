// Formats whose 4-bit codes stand for signed bytes of a table: IQ4_NL, IQ4_XS, MXFP4.
//
//   IQ4_NL  w = d KV[c]              d f16, one per 32 columns
//   MXFP4   w = 2^(e - 128) FP4[c]   e u8, one per 32 columns
//   IQ4_XS  w = d (sc(j) - 32) KV[c] sc 6 bits, one per 32 columns
//
// Unit planes: codes; scales. A step's codes are two words a lane, one a half: four codes of row g in
// the low half of a word, four of row g + 8 in the high half.
#pragma once
#include "legacy.cuh"

namespace gemv {

// The sixteen values of a table, a byte each, four a word.
struct KV {
    static constexpr uint32_t WORDS[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
};
struct FP4 {
    static constexpr uint32_t WORDS[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
};

// Fragments from the plane of codes.
template <class Table>
struct Codes {
    static constexpr int HIGH_SHIFT = 0;
    const uint8_t* unit;
    int lane;

    // The values of four codes of row g and of four of row g + 8. A byte permute chooses among
    // eight bytes: one looks in the lower half of the table, one in the upper, and a third takes
    // what the codes' top bits ask for.
    static __device__ __forceinline__ void look_up(uint32_t w, uint32_t& a0, uint32_t& a1) {
        constexpr uint32_t T0 = Table::WORDS[0], T1 = Table::WORDS[1];
        constexpr uint32_t T2 = Table::WORDS[2], T3 = Table::WORDS[3];
        const uint32_t index = w & 0x77777777u, choice = 0x32103210u | ((w & 0x88888888u) >> 1);
        a0 = __byte_perm(__byte_perm(T0, T1, index), __byte_perm(T2, T3, index), choice);
        a1 = __byte_perm(__byte_perm(T0, T1, index >> 16), __byte_perm(T2, T3, index >> 16), choice >> 16);
    }

    __device__ __forceinline__ void operator()(int s, uint32_t (&a)[4]) {
        const uint2 words = *reinterpret_cast<const uint2*>(unit + s * 256 + lane * 8);
        look_up(words.x, a[0], a[1]);
        look_up(words.y, a[2], a[3]);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column) {
        const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
        const int lane = 4 * (row & 7) + t;
        const uint8_t byte = unit[s * 256 + lane * 8 + 4 * h + 2 * (row >> 3) + (b >> 1)];
        uint32_t value, unused;
        look_up(byte >> (4 * (b & 1)), value, unused);
        return static_cast<float>(static_cast<int8_t>(value));
    }
};

// 2^(e - 128); the two lowest are subnormal.
__device__ __forceinline__ float power_of_two(uint32_t e) {
    return __uint_as_float(max(static_cast<int>((e - 1) << 23), 0x00200000 << min(e, 1u)));
}

// Scales of sub-blocks t and t + 4 of rows g and g + 8 from a plane of exponents.
struct Powers {
    float2 first, second;
    __device__ __forceinline__ Powers(const uint8_t* plane, int lane, uint32_t columns) {
        const int g = lane >> 2, t = lane & 3;
        auto at = [&](int s) -> float2 {
            if (s * 32 >= columns) return make_float2(0.f, 0.f);
            const uint32_t w = *reinterpret_cast<const uint16_t*>(plane + s * 16 + g * 2);
            return make_float2(power_of_two(w & 0xff), power_of_two(w >> 8));
        };
        first = at(t);
        second = at(t + 4);
    }
};

// IQ4_NL and MXFP4: one scale of EACH bytes per 32 columns, read in pairs of rows. (A parameter
// must not have the name of a member of the base, which would hide it.)
template <class Table, class Scales, int EACH>
struct Coded : IntegerStage {
    static constexpr uint32_t STEP_BYTES = 256 + 16 * EACH, UNIT_BYTES = 8 * STEP_BYTES;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t columns) { return columns / 32 * STEP_BYTES; }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        // Two copies, as in legacy.cuh.
        if (columns == UNIT_COLUMNS) {
            dot_of(unit, record, lane, UNIT_COLUMNS, low, high);
        } else {
            dot_of(unit, record, lane, columns, low, high);
        }
    }

    static __device__ __forceinline__ void dot_of(const uint8_t* unit, const uint8_t* record, int lane,
                                                  uint32_t columns, float& low, float& high) {
        LANE_AGAIN(lane);
        int l[2], h[2];
        product32<true>(Record{record, lane}, columns, Codes<Table>{unit, lane}, l, h, 0, 0);
        const Scales d(unit + columns / 32 * 256, lane, columns);
        const float x = scale(record);
        low = fmaf(x, fmaf(d.first.x, __int2float_rn(l[0]), d.second.x * __int2float_rn(l[1])), low);
        high = fmaf(x, fmaf(d.first.y, __int2float_rn(h[0]), d.second.y * __int2float_rn(h[1])), high);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t columns) {
        const int at = 16 * (column >> 5) + 2 * (row & 7) + (row >> 3);
        const uint8_t* p = unit + columns / 32 * 256 + EACH * at;
        float d;
        if constexpr (EACH == 1) d = power_of_two(*p);
        else d = half_at(p);
        return __fmul_rn(d, Codes<Table>::value(unit, row, column));
    }
};

using IQ4NL = Coded<KV, Pairs, 2>;
using MXFP4 = Coded<FP4, Powers, 1>;

struct IQ4XS : IntegerStage {
    static constexpr uint32_t LOWS = 2048, HIGHS = 2112, D = 2144, UNIT_BYTES = 2176;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t) { return UNIT_BYTES; }

    // The scale of sub-block t + 4·i of row g + 8·r of a lane.
    static __device__ __forceinline__ int field(const uint8_t* unit, int lane, int r, int i) {
        const uint32_t lows = *reinterpret_cast<const uint16_t*>(unit + LOWS + lane * 2);
        const uint32_t highs = unit[HIGHS + lane];
        const int n = 2 * r + i;
        return static_cast<int>(((lows >> (4 * n)) & 15) | ((highs >> (2 * n)) & 3) << 4) - 32;
    }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane, uint32_t,
                                               float& low, float& high) {
        int l[2], h[2];
        product32<true>(Record{record, lane}, 256, Codes<KV>{unit, lane}, l, h, 0, 0);
        const float2 d = half_pair(*reinterpret_cast<const uint32_t*>(unit + D + (lane >> 2) * 4));
        // A sum, up to 32·127·32630, times its scale would not fit 32 bits.
        auto scaled = [&](int r, const int(&q)[2]) {
            return fmaf(__int2float_rn(field(unit, lane, r, 0)), __int2float_rn(q[0]),
                        __int2float_rn(field(unit, lane, r, 1)) * __int2float_rn(q[1]));
        };
        const float x = scale(record);
        low = fmaf(x * d.x, scaled(0, l), low);
        high = fmaf(x * d.y, scaled(1, h), high);
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int j = column >> 5, lane = 4 * (row & 7) + (j & 3);
        const float d = half_at(unit + D + (row & 7) * 4 + (row >> 3) * 2);
        const float sc = static_cast<float>(field(unit, lane, row >> 3, j >> 2));
        return __fmul_rn(__fmul_rn(d, sc), Codes<KV>::value(unit, row, column));
    }
};

}  // namespace gemv
