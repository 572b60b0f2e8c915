// Formats without scales: BF16 and F16 on tensor cores with activations in three 16-bit terms
// (24 bits: the product is that of f32 activations), F32 by multiply-add.
//
//   mma.m16n8k16: columns 0, 1, 2 of B carry the first, second and third term, the rest zeros;
//   the sum of the columns of D is the product.
#pragma once
#include "../gemv.cuh"

namespace gemv {

// Staged activations of a unit: three terms [128] of 16 bits, each followed by 16 bytes of padding,
// and the power of two that undoes their scaling.
template <class T>
struct Half {
    static constexpr int UNIT_COLUMNS = 128;
    static constexpr int TERM = 272, SCALE = 816, STAGE_BYTES = 832;
    static constexpr uint32_t UNIT_BYTES = UNIT_COLUMNS * 32;
    static constexpr bool IS_BF16 = Same<T, __nv_bfloat16>::value;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t columns) { return columns * 32; }

    static __device__ __forceinline__ T round(float v) {
        if constexpr (IS_BF16) return __float2bfloat16_rn(v);
        else return __float2half_rn(v);
    }
    static __device__ __forceinline__ float widen(T v) {
        if constexpr (IS_BF16) return __bfloat162float(v);
        else return __half2float(v);
    }

    static __device__ __forceinline__ void stage(uint8_t* record, const float (&x)[4], int lane) {
        float up = 1.f, down = 1.f;
        if constexpr (!IS_BF16) {
            // Scale by the power of two that brings the largest into [2^13, 2^14): f16 has no
            // range to spare for both an outlier and the third term of a small value.
            float largest = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
            largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
            const int exponent = min(max(static_cast<int>(__float_as_uint(largest) >> 23) - 127, -100), 120);
            up = __uint_as_float(static_cast<uint32_t>(127 + 13 - exponent) << 23);
            down = __uint_as_float(static_cast<uint32_t>(127 - 13 + exponent) << 23);
        }
#pragma unroll
        for (int term = 0; term < 3; term++) {
            uint2 w;
            T* h = reinterpret_cast<T*>(&w);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float rest = x[j] * up;
#pragma unroll
                for (int k = 0; k < term; k++) rest -= widen(round(rest));
                h[j] = round(rest);
            }
            *reinterpret_cast<uint2*>(record + term * TERM + lane * 8) = w;
        }
        if (lane == 0) *reinterpret_cast<float*>(record + SCALE) = down;
    }

    // This lane's operands of 16 columns, from the record, or held in registers.
    struct Lazy {
        const uint8_t* record;
        int lane;
        __device__ __forceinline__ uint2 operand(int k) const {
            const int g = lane >> 2;
            uint2 b = make_uint2(0u, 0u);
            if (g < 3) b = *reinterpret_cast<const uint2*>(record + g * TERM + (lane & 3) * 8 + k * 32);
            return b;
        }
        __device__ __forceinline__ float down() const { return *reinterpret_cast<const float*>(record + SCALE); }
    };
    struct Held {
        uint2 words[8];
        float factor;
        __device__ __forceinline__ Held(const uint8_t* record, int lane) {
            const Lazy lazy{record, lane};
#pragma unroll
            for (int k = 0; k < 8; k++) words[k] = lazy.operand(k);
            factor = lazy.down();
        }
        __device__ __forceinline__ uint2 operand(int k) const { return words[k]; }
        __device__ __forceinline__ float down() const { return factor; }
    };

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        dot_of(unit, Lazy{record, lane}, lane, columns, low, high);
    }
    template <class X>
    static __device__ __forceinline__ void dot_of(const uint8_t* unit, const X& x, int lane, uint32_t columns,
                                                  float& low, float& high) {
        // Two chains of products: one alone would wait for its own accumulator.
        float d[2][4] = {};
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (k * 16 < columns) {
                const uint4 a = *reinterpret_cast<const uint4*>(unit + k * 512 + lane * 16);
                mma(d[k & 1], a, x.operand(k));
            }
        }
        const float down = x.down();
        low = fmaf(down, (d[0][0] + d[0][1]) + (d[1][0] + d[1][1]), low);
        high = fmaf(down, (d[0][2] + d[0][3]) + (d[1][2] + d[1][3]), high);
    }

    static __device__ __forceinline__ void mma(float (&d)[4], const uint4& a, const uint2& b) {
        if constexpr (IS_BF16) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
        } else {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
        }
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int k = column >> 4, t = (column >> 2) & 3, j = column & 3, lane = 4 * (row & 7) + t;
        const int word = (row >> 3) + 2 * (j >> 1);
        return widen(reinterpret_cast<const T*>(unit + k * 512 + lane * 16)[word * 2 + (j & 1)]);
    }
};

using BF16 = Half<__nv_bfloat16>;
using F16 = Half<__half>;

struct F32 {
    static constexpr int UNIT_COLUMNS = 64, STAGE_BYTES = 256;
    static constexpr uint32_t UNIT_BYTES = 4096;
    static __host__ __device__ constexpr uint32_t bytes(uint32_t columns) { return columns * 64; }

    static __device__ __forceinline__ void stage(uint8_t* record, const float (&x)[2], int lane) {
        *reinterpret_cast<float2*>(record + lane * 8) = make_float2(x[0], x[1]);
    }

    static __device__ __forceinline__ void dot(const uint8_t* unit, const uint8_t* record, int lane,
                                               uint32_t columns, float& low, float& high) {
        const int t = lane & 3;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (i * 16 < columns) {
                const float4 a = *reinterpret_cast<const float4*>(unit + 2 * i * 512 + lane * 16);
                const float4 b = *reinterpret_cast<const float4*>(unit + (2 * i + 1) * 512 + lane * 16);
                const float4 x = *reinterpret_cast<const float4*>(record + i * 64 + t * 16);
                low = fmaf(a.x, x.x, fmaf(a.y, x.y, fmaf(a.z, x.z, fmaf(a.w, x.w, low))));
                high = fmaf(b.x, x.x, fmaf(b.y, x.y, fmaf(b.z, x.z, fmaf(b.w, x.w, high))));
            }
        }
    }

    static __device__ __forceinline__ float value(const uint8_t* unit, int row, int column, uint32_t) {
        const int i = column >> 4, t = (column >> 2) & 3, lane = 4 * (row & 7) + t;
        return reinterpret_cast<const float*>(unit + (2 * i + (row >> 3)) * 512 + lane * 16)[column & 3];
    }
};

}  // namespace gemv
