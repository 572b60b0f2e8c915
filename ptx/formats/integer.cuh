// Integer product of quants with 16-bit fixed-point activations, on tensor cores.
//
//   x = scale · v, |v| ≤ 32630 per unit; v = 256 hi + lo, hi and lo signed bytes
//   mma.m16n8k32 (s32): A = 16 rows x 32 quants, B = 32 x 8: columns 2p and 2p + 1 carry hi and lo
//   of sub-block p only (zeros elsewhere), so that the eight columns of D are the exact integer
//   sums of four sub-blocks. Scales are applied in f32 (or in integers, where the range allows).
//
// The bound keeps hi, at most (32630 + 128) / 256 < 128, a signed byte however the quotient is rounded. The error of an activation is at most
// 2^-16 of the largest of its 256: NMSE ≤ 2e-8.
#pragma once
#include "../gemv.cuh"

namespace gemv {

// Staged activations of a unit: hi bytes [256], 16 bytes of padding (the low bytes then fall into
// other banks), lo bytes [256], sums of v over 16 columns s32 [16], scale f32.
struct IntegerStage {
    static constexpr int UNIT_COLUMNS = 256;
    static constexpr int LOW = 272, SUMS = 528, SCALE = 592, STAGE_BYTES = 608;

    // A lane has TOGETHER columns in a row: all eight, or four and the four 128 columns on, for which a
    // warp that loads them at once asks without gaps.
    template <int TOGETHER = 8>
    static __device__ __forceinline__ void stage(uint8_t* record, const float (&x)[8], int lane) {
        float largest = fabsf(x[0]);
#pragma unroll
        for (int j = 1; j < 8; j++)  // a NaN stays
            asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(fabsf(x[j])));
        // Non-negative floats order like their bits; NaN is above all.
        largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
        // Below the threshold the unit is zero; NaN and Inf reach the result through the scale.
        const float inverse = largest > 1e-30f ? __fdividef(32630.f, largest) : 0.f;
        const float scale = largest > 1e-30f || largest != largest ? largest * (1.f / 32630.f) : 0.f;
        // Adding 1.5·2^23 leaves the rounded integer in the low bits; with 128 more, byte 1 is hi
        // and byte 0 is lo with its top bit flipped.
        constexpr float MAGIC = 12582912.f + 128.f;
        uint32_t u[8];
#pragma unroll
        for (int j = 0; j < 8; j++) u[j] = __float_as_uint(fmaf(x[j], inverse, MAGIC));
        uint2 hi, lo;
        hi.x = gather<1>(u[0], u[1], u[2], u[3]);
        hi.y = gather<1>(u[4], u[5], u[6], u[7]);
        lo.x = gather<0>(u[0], u[1], u[2], u[3]) ^ 0x80808080u;
        lo.y = gather<0>(u[4], u[5], u[6], u[7]) ^ 0x80808080u;
        int* const sums = reinterpret_cast<int*>(record + SUMS);
        if constexpr (TOGETHER == 8) {
            *reinterpret_cast<uint2*>(record + lane * 8) = hi;
            *reinterpret_cast<uint2*>(record + LOW + lane * 8) = lo;
            int sum = static_cast<int>((u[0] + u[1] + u[2]) + (u[3] + u[4] + u[5]) + (u[6] + u[7]) -
                                       8u * __float_as_uint(MAGIC));
            sum += __shfl_xor_sync(~0u, sum, 1);
            if ((lane & 1) == 0) sums[lane >> 1] = sum;
        } else {
            uint32_t* const high = reinterpret_cast<uint32_t*>(record + lane * 4);
            uint32_t* const low = reinterpret_cast<uint32_t*>(record + LOW + lane * 4);
            high[0] = hi.x, high[32] = hi.y, low[0] = lo.x, low[32] = lo.y;
            // Of four lanes the even ones sum up the first four columns of each, the odd ones the others.
            const int first = static_cast<int>((u[0] + u[1]) + (u[2] + u[3]) - 4u * __float_as_uint(MAGIC));
            const int second = static_cast<int>((u[4] + u[5]) + (u[6] + u[7]) - 4u * __float_as_uint(MAGIC));
            const bool odd = lane & 1;
            int sum = odd ? second : first;
            sum += __shfl_xor_sync(~0u, odd ? first : second, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            if ((lane & 2) == 0) sums[(lane >> 2) + (odd ? 8 : 0)] = sum;
        }
        if (lane == 0) *reinterpret_cast<float*>(record + SCALE) = scale;
    }

    // Byte N of four words.
    template <int N>
    static __device__ __forceinline__ uint32_t gather(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
        constexpr uint32_t PICK = N | (4 + N) << 4;
        return __byte_perm(__byte_perm(a, b, PICK), __byte_perm(c, d, PICK), 0x5410);
    }

    static __device__ __forceinline__ float scale(const uint8_t* record) {
        return *reinterpret_cast<const float*>(record + SCALE);
    }
    static __device__ __forceinline__ int sum16(const uint8_t* record, int i) {
        return reinterpret_cast<const int*>(record + SUMS)[i];
    }
    // Sum of v over 32-column sub-block i.
    static __device__ __forceinline__ int sum32(const uint8_t* record, int i) {
        const int2 s = reinterpret_cast<const int2*>(record + SUMS)[i];
        return s.x + s.y;
    }
};

// In a kernel of two formats the lane is read anew, so that what is made of it need not stay in
// registers from one unit to the next: there are none left for it.
#ifdef TWO_FORMATS
#define LANE_AGAIN(lane) asm volatile("mov.u32 %0, %%tid.x; and.b32 %0, %0, 31;" : "=r"(lane))
#else
#define LANE_AGAIN(lane)
#endif

template <bool SIGNED>
__device__ __forceinline__ void mma_integer(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (SIGNED) {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// The staged activations of a unit as a product reads them: from the record, each time.
struct Record {
    const uint8_t* at;
    int lane;

    // This lane's operands of an mma over sub-block s of 32 columns: zeros unless its column is of s.
    struct Operands {
        uint32_t words[4];
        int p;
        __device__ __forceinline__ uint32_t get(int s, int i) const {
            return p == (s & 3) ? words[2 * (s >> 2) + i] : 0u;
        }
    };
    __device__ __forceinline__ Operands operands() const {
        const int g = lane >> 2, t = lane & 3, p = g >> 1;
        const uint8_t* x = at + (g & 1) * IntegerStage::LOW + 32 * p + 4 * t;
        auto word = [&](int i) { return *reinterpret_cast<const uint32_t*>(x + i); };
        return Operands{{word(0), word(16), word(128), word(144)}, p};
    }
    // Sum of sub-block t, or t + 4.
    __device__ __forceinline__ int sum(int set) const { return IntegerStage::sum32(at, (lane & 3) + 4 * set); }
    __device__ __forceinline__ float scale() const { return IntegerStage::scale(at); }
};

// The same, held in registers: for a warp that multiplies the same unit of many rows.
struct HeldRecord {
    uint32_t words[8][2];
    int sums[2];
    float x;

    __device__ __forceinline__ HeldRecord(const uint8_t* record, int lane) {
        const Record r{record, lane};
        const Record::Operands o = r.operands();
#pragma unroll
        for (int s = 0; s < 8; s++) words[s][0] = o.get(s, 0), words[s][1] = o.get(s, 1);
        sums[0] = r.sum(0), sums[1] = r.sum(1), x = r.scale();
    }
    __device__ __forceinline__ const HeldRecord& operands() const { return *this; }
    __device__ __forceinline__ uint32_t get(int s, int i) const { return words[s][i]; }
    __device__ __forceinline__ int sum(int set) const { return sums[set]; }
    __device__ __forceinline__ float scale() const { return x; }
};

// The integer dot products of a unit with sub-blocks of 32 columns: d[set][row + column], where
// this lane's two columns are hi and lo of sub-block 4·set + t. `offset` is added per column sum. The
// fragment's quants of rows g + 8 are 2^HIGH_SHIFT times what they stand for: the sum's low bits are 0.
template <bool SIGNED, class X, class Fragment>
__device__ __forceinline__ void product32(const X& x, uint32_t columns, Fragment fragment, int (&low)[2],
                                          int (&high)[2], int offset0, int offset1) {
    const auto& b = x.operands();
    constexpr int UP = Fragment::HIGH_SHIFT;
    int d[2][4] = {{0, offset0, 0, offset0 * (1 << UP)}, {0, offset1, 0, offset1 * (1 << UP)}};
#pragma unroll
    for (int s = 0; s < 8; s++) {
        if (s * 32 < columns) {
            uint32_t a[4];
            fragment(s, a);
            mma_integer<SIGNED>(d[s >> 2], a, b.get(s, 0), b.get(s, 1));
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        low[i] = d[i][0] * 256 + d[i][1];
        high[i] = (d[i][2] * 256 + d[i][3]) >> UP;
    }
}

// Fragments from a plane of nibbles (and, for five bits, a plane of single bits). Rows g + 8 have the
// high nibbles: to be left where they are where nothing is added to them.
template <int UP>
struct NibblesTimes {
    static constexpr int HIGH_SHIFT = UP;
    const uint8_t* unit;
    int lane;
    uint4 words;
    __device__ __forceinline__ void operator()(int s, uint32_t (&a)[4]) {
        if ((s & 1) == 0) words = *reinterpret_cast<const uint4*>(unit + (s >> 1) * 512 + lane * 16);
        const uint32_t w0 = s & 1 ? words.z : words.x, w1 = s & 1 ? words.w : words.y;
        a[0] = w0 & 0x0f0f0f0fu;
        a[1] = (w0 >> (4 - UP)) & 0x0f0f0f0fu << UP;
        a[2] = w1 & 0x0f0f0f0fu;
        a[3] = (w1 >> (4 - UP)) & 0x0f0f0f0fu << UP;
    }
};
using Nibbles = NibblesTimes<0>;

struct FiveBits {
    static constexpr int HIGH_SHIFT = 0;
    Nibbles nibbles;
    const uint8_t* bits;  // the plane of fifth bits
    uint32_t word;
    __device__ __forceinline__ void operator()(int s, uint32_t (&a)[4]) {
        if ((s & 1) == 0) word = *reinterpret_cast<const uint32_t*>(bits + (s >> 1) * 128 + nibbles.lane * 4);
        nibbles(s, a);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const int at = 4 * (s & 1) + r;
            const uint32_t h = at <= 4 ? word << (4 - at) : word >> (at - 4);
            a[r] |= h & 0x10101010u;
        }
    }
};

__device__ __forceinline__ float2 half_pair(uint32_t w) {
    return __half22float2(*reinterpret_cast<const __half2*>(&w));
}

// Four 6-bit fields of this lane, of rows g and g + 8, a byte each, from the plane at byte AT.
template <uint32_t AT>
__device__ __forceinline__ void six_bit_fields(const uint8_t* unit, int lane, uint32_t& low, uint32_t& high) {
    const uint32_t a = *reinterpret_cast<const uint32_t*>(unit + AT + lane * 4);
    const uint32_t v = *reinterpret_cast<const uint16_t*>(unit + AT + 128 + lane * 2);
    low = a & 0x3f3f3f3fu;
    high = (__byte_perm(v, v >> 4, 0x5410) & 0x0f0f0f0fu) | ((a >> 2) & 0x30303030u);
}

// The quant of an element in the nibble plane.
__device__ __forceinline__ int nibble_at(const uint8_t* unit, int row, int column) {
    const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
    const int lane = 4 * (row & 7) + t;
    const uint8_t byte = unit[(s >> 1) * 512 + lane * 16 + 4 * (2 * (s & 1) + h) + b];
    return row < 8 ? byte & 15 : byte >> 4;
}

__device__ __forceinline__ int single_bit_at(const uint8_t* plane, int row, int column) {
    const int s = column >> 5, h = (column >> 4) & 1, t = (column >> 2) & 3, b = column & 3;
    const int lane = 4 * (row & 7) + t, r = 2 * h + (row >> 3);
    return (plane[(s >> 1) * 128 + lane * 4 + b] >> (4 * (s & 1) + r)) & 1;
}

__device__ __forceinline__ float half_at(const uint8_t* p) {
    return __half2float(*reinterpret_cast<const __half*>(p));
}

}  // namespace gemv
