// The program of the persistent kernel: the plan's fused steps as data, and the mail by which one
// step's results reach the next.
//
// Mail. Every vector that another block reads is published twice: as f32 in the workspace, for the
// host and for the block's own later use, and as words of mail, f32 rounded to 32 - n bits whose low
// n bits are a tag. A reader polls until the tag is that of the version it needs: value and
// validity are one 32-bit word, so nothing has to be fenced and no counter stands between two steps.
//
//   tag = (epoch · writes + ordinal) mod 2^n,   2^n the least power of two above `writes`
//
// writes: how often the vector is published in a token; ordinal: which of them; epoch: the step's
// number. A word's successive tags differ by one. A version is overwritten only by blocks that have
// seen results which every reader of that version contributed to after reading it.
//
// What a norm reads is posted times the norm's gain: once, instead of a product in every block. Behind the
// vector's words are those of the sums of squares (without the gain) of every 16 elements; 1 / rms is
// a factor of the finished sums.
#pragma once
#include "../common.cuh"

namespace persistent {

enum Kind : uint32_t { EMBED = 0, QKV = 1, ATTENTION = 2, PROJECT = 3, GATE_UP = 4, LM_HEAD = 5 };

// One step. Mirrors src/plan/program.rs slot by slot; a slot has 64 bits.
struct alignas(128) Instruction {
    // What the weight stream needs.
    uint64_t kind;
    uint64_t items;  // tiles, or pairs of tiles (GATE_UP); positions of a chunk (ATTENTION)
    const uint8_t* weight[3];
    uint64_t tiles[2];       // of the first and of the second matrix
    uint64_t units;          // and how they are shared out: Shape
    uint64_t unit_bytes[2];  // of the first format and of the last matrix's
    uint64_t tile_bytes[2];
    uint64_t unused[2];
    uint64_t tail;           // columns of a tile's last unit
    uint64_t format[2];      // GGML type ids
    // What the product needs.
    const uint32_t* x;  // mail
    uint64_t x_tag;     // writes << 16 | ordinal
    const float* gain;  // of the norm that reads y: y is posted times it (EMBED, PROJECT), or null
    uint64_t eps;       // of the norm of x (QKV, GATE_UP, LM_HEAD)
    uint64_t columns;
    float* y;
    uint32_t* y_mail;
    uint64_t y_tag;
    const float* residual;
    const float* bias[3];
    uint64_t rows[2];
    // Rotation and cache (QKV), cache (ATTENTION).
    const float* freqs;
    uint64_t half_rotary;
    uint64_t halves;
    uint64_t magnitude;  // of a rotation; scale of the scores; of an embedding
    uint64_t head_dim;
    uint64_t kv_heads;
    uint64_t group;  // query heads of a key/value head
    uint64_t capacity;
    void* keys;
    void* values;
    uint32_t* k_mail;
    uint32_t* v_mail;
    uint64_t* partials;
    // The choice of the next token (LM_HEAD).
    float* candidates;
    uint32_t* counters;
    const uint32_t* forced;
    uint64_t* ring;
};
static_assert(sizeof(Instruction) == 384, "the host twin has 48 slots");

// How the units of a block's tiles are shared out: `parts` warps are a set; member m of set r has the
// units m, m + parts, … of the tiles r, r + sets, …
struct Shape {
    uint32_t units, parts, sets;
    uint32_t at_once;  // tiles whose parts are added up together
    uint32_t each;     // units of a chunk
    uint32_t inverse;  // 2^15 / each, rounded up

    __device__ __forceinline__ explicit Shape(uint64_t slot) {
        const uint32_t low = static_cast<uint32_t>(slot), high = static_cast<uint32_t>(slot >> 32);
        units = low & 0xffffu, parts = low >> 16 & 0xffu, sets = low >> 24;
        at_once = high & 0xffu, each = high >> 8 & 0xffu, inverse = high >> 16;
    }
    // Chunks that `n` units fill.
    __device__ __forceinline__ uint32_t chunks(uint32_t n) const { return divide(n + each - 1, inverse); }
    // k / each, for k below 4096.
    static __device__ __forceinline__ uint32_t divide(uint32_t k, uint32_t inverse) { return k * inverse >> 15; }
};
__device__ __forceinline__ uint32_t units_of(const Instruction& i) { return static_cast<uint32_t>(i.units) & 0xffffu; }

__device__ __forceinline__ float as_float(uint64_t slot) {
    return __uint_as_float(static_cast<uint32_t>(slot));
}

// A block without work in a step goes on to its next: it may look for a version that is `writes` ahead
// of what is there, so there are more tags than writes. No more than that: they are bits of the value.
struct Tag {
    uint32_t value, mask;  // mask: 2^n - 1
};

// The tag of a version: `slot` is writes << 16 | ordinal.
__device__ __forceinline__ Tag tag_of(uint64_t slot, uint32_t epoch) {
    const uint32_t s = static_cast<uint32_t>(slot), writes = s >> 16, mask = ~0u >> __clz(writes | 1);
    return Tag{(epoch * writes + (s & 0xffffu)) & mask, mask};
}

// v with its low bits replaced; rounded to nearest, infinities and NaNs kept.
__device__ __forceinline__ uint32_t sealed(float v, Tag tag) {
    const uint32_t w = __float_as_uint(v);
    const bool finite = is_finite(v);
    const uint32_t rounded = finite ? w + (tag.mask + 1) / 2 : (v != v ? w | 0x400000u : w);
    return (rounded & ~tag.mask) | tag.value;
}
__device__ __forceinline__ float opened(uint32_t w, Tag tag) { return __uint_as_float(w & ~tag.mask); }

__device__ __forceinline__ void post(uint32_t* mail, uint32_t at, float v, Tag tag) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(mail + at), "r"(sealed(v, tag)) : "memory");
}

__device__ __forceinline__ uint32_t peek(const uint32_t* mail) {
    uint32_t w;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(mail) : "memory");
    return w;
}
__device__ __forceinline__ uint2 peek2(const uint32_t* mail) {
    uint2 w;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(mail) : "memory");
    return w;
}
__device__ __forceinline__ uint4 peek4(const uint32_t* mail) {
    uint4 w;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(mail)
                 : "memory");
    return w;
}

// Where the sums of squares of a vector of `n` elements begin.
__device__ __forceinline__ uint32_t squares_of(uint32_t n) { return (n + 3) & ~3u; }

// Waits for one word.
__device__ __forceinline__ float await(const uint32_t* mail, Tag tag) {
    uint32_t w;
    do w = peek(mail);
    while (((w ^ tag.value) & tag.mask) != 0);
    return opened(w, tag);
}

// Words [BATCH][N] of each lane, at `mail` + b · stride; of eight the last four are 128 words after the first,
// so that what a warp asks for at once has no gaps: all blocks look at the same words at the same time, and
// what they ask for is most of what a look takes. Bit b of `mine` says whether there are such (first) words,
// bit BATCH + b the last four; the others are 0.
template <int BATCH, int N>
struct Look {
    static constexpr int EACH = N == 8 ? 4 : N, PARTS = N / EACH;
    uint32_t w[PARTS * BATCH][EACH];

    __device__ __forceinline__ void ask(const uint32_t* mail, uint32_t stride, uint32_t mine, Tag tag) {
#pragma unroll
        for (int i = 0; i < PARTS * BATCH; i++)
#pragma unroll
            for (int j = 0; j < EACH; j++) w[i][j] = tag.value;
        ask_again(mail, stride, mine);
    }
    __device__ __forceinline__ void ask_again(const uint32_t* mail, uint32_t stride, uint32_t missing) {
#pragma unroll
        for (int i = 0; i < PARTS * BATCH; i++) {
            const uint32_t* const at = mail + i / BATCH * 128 + i % BATCH * stride;
            if ((missing >> i & 1) == 0) continue;
            if constexpr (EACH == 4) {
                const uint4 q = peek4(at);
                w[i][0] = q.x, w[i][1] = q.y, w[i][2] = q.z, w[i][3] = q.w;
            } else {
                const uint2 q = peek2(at);
                w[i][0] = q.x, w[i][1] = q.y;
            }
        }
    }
    // Waits for what was asked for, and asks again for what is missing; all lanes of the warp.
    __device__ __forceinline__ void wait(float (&v)[BATCH][N], const uint32_t* mail, uint32_t stride, Tag tag) {
        for (;;) {
            uint32_t missing = 0;
#pragma unroll
            for (int i = 0; i < PARTS * BATCH; i++) {
                uint32_t wrong = 0;
#pragma unroll
                for (int j = 0; j < EACH; j++) wrong |= w[i][j] ^ tag.value;
                missing |= ((wrong & tag.mask) != 0 ? 1u : 0u) << i;
            }
            if (!__any_sync(~0u, missing != 0)) break;
            ask_again(mail, stride, missing);
        }
#pragma unroll
        for (int b = 0; b < BATCH; b++)
#pragma unroll
            for (int j = 0; j < N; j++) v[b][j] = opened(w[j / EACH * BATCH + b][j % EACH], tag);
    }
};
template <int BATCH, int N>
__device__ __forceinline__ void await_all(float (&v)[BATCH][N], const uint32_t* mail, uint32_t stride, uint32_t mine,
                                          Tag tag) {
    Look<BATCH, N> look;
    look.ask(mail, stride, mine, tag);
    look.wait(v, mail, stride, tag);
}

}  // namespace persistent
