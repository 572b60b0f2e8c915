// out[h] = Σ softmax(scale · q[h] · K[p]) V[p] over the positions p ≤ position; f16 cache.
//
// A block has a key/value head and a range of groups of earlier positions which reach
// it through the ring (stream.cuh); the last split has this position too, from mail. Both products
// are on tensor cores, sums in f32; queries and weights are in two f16 terms each (22 bits):
//
//   scores   heads x positions = q (rows g: high terms, g + 8: low) · Kᵀ
//   values   dimensions x heads = Vᵀ · weights: the scores' registers are its second operand as they
//            are, and a lane makes the first from neighbouring dimensions of four positions
//
// The warps' partial results are joined in shared memory, those of several blocks
// by mail of words {f32, 32-bit tag}: each block of a head joins an equal part of the outputs.
#pragma once
#include "stream.cuh"

namespace persistent {

constexpr int HEADS = 8;       // query heads of a key/value head, at most
constexpr int POSITIONS = 16;  // of a group
constexpr float LOG2E = 1.4426950408889634f;
// Weights are 2^SHIFT at most, so that their f16 terms reach down to 2^(-24 - SHIFT) of the largest.
constexpr float SHIFT = 15.f;

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Read anew each time: held in registers the queries would displace everything else.
__device__ __forceinline__ uint4 load_shared(const void* p) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(gemv::shared_address(p)));
    return v;
}

__device__ __forceinline__ void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Scratch, in the place of the staged activations; src/plan/program.rs computes its size.
template <int DIM>
struct Scratch {
    __half q[2][HEADS][DIM];  // two terms
    __half now[2][DIM];       // key and value of this position
    float largest[WARPS][HEADS], sum[WARPS][HEADS];
};

// Two weights as two f16 terms each.
struct Terms {
    uint32_t high, low;
    __device__ __forceinline__ Terms(float a, float b) {
        const __half2 h = __floats2half2_rn(a, b);
        const float2 f = __half22float2(h);
        const __half2 l = __floats2half2_rn(a - f.x, b - f.y);
        high = *reinterpret_cast<const uint32_t*>(&h);
        low = *reinterpret_cast<const uint32_t*>(&l);
    }
};

// What a warp has seen so far: lane (g, t) keeps the largest score of head g and its share of the sum
// of weights, and of heads 2t and 2t + 1 the weighted values of dimensions EACH · g + 2m and the next
// in out[m]: {2m, head 2t}, {2m, head 2t + 1}, {2m + 1, head 2t}, {2m + 1, head 2t + 1}.
template <int DIM>
struct Running {
    static constexpr int EACH = DIM / 8, TILES = DIM / 16;
    float largest = -INFINITY, sum = 0.f;
    float out[TILES][4] = {};

    // Takes the scores of a group: this lane has head g, positions 2t, 2t + 1, 2t + 8, 2t + 9, of
    // which `count` are there; `keys` and `values` are its rows.
    __device__ __forceinline__ void take(const float (&score)[2][2], const uint8_t* values, uint32_t pitch, uint32_t count,
                                         uint32_t lane) {
        const uint32_t g = lane >> 2, t = lane & 3;
        float top = fmaxf(fmaxf(score[0][0], score[0][1]), fmaxf(score[1][0], score[1][1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        top = fmaxf(top, largest);
        const float factor = exp2_approximate(largest - top);
        largest = top;
        const float w[4] = {exp2_approximate(score[0][0] - top + SHIFT), exp2_approximate(score[0][1] - top + SHIFT),
                            exp2_approximate(score[1][0] - top + SHIFT), exp2_approximate(score[1][1] - top + SHIFT)};
        sum = fmaf(sum, factor, (w[0] + w[1]) + (w[2] + w[3]));
        if (__any_sync(~0u, factor != 1.f)) {
            const float a = __shfl_sync(~0u, factor, 8 * t), b = __shfl_sync(~0u, factor, 8 * t + 4);
#pragma unroll
            for (int m = 0; m < TILES; m++) out[m][0] *= a, out[m][1] *= b, out[m][2] *= a, out[m][3] *= b;
        }
        const Terms first(w[0], w[1]), second(w[2], w[3]);
        const bool odd = t & 1;
        const uint8_t* const at = values + 2 * t * pitch + EACH * g * 2;
#pragma unroll
        for (int h = 0; h < EACH / 8; h++) {
            uint32_t v[4][4];
#pragma unroll
            for (int p = 0; p < 4; p++) {
                // Lanes of other parity begin with the other half: other banks.
                const uint8_t* row = at + ((p & 1) + 8 * (p >> 1)) * pitch + 16 * h;
                const uint2 x = *reinterpret_cast<const uint2*>(row + (odd ? 8 : 0));
                const uint2 y = *reinterpret_cast<const uint2*>(row + (odd ? 0 : 8));
                v[p][0] = odd ? y.x : x.x, v[p][1] = odd ? y.y : x.y;
                v[p][2] = odd ? x.x : y.x, v[p][3] = odd ? x.y : y.y;
            }
            if (count < POSITIONS) {
                // What is not there has no weight, but may be no number.
#pragma unroll
                for (int p = 0; p < 4; p++) {
                    const bool there = 2 * t + (p & 1) + 8 * (p >> 1) < count;
#pragma unroll
                    for (int i = 0; i < 4; i++) v[p][i] = there ? v[p][i] : 0u;
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t a0 = __byte_perm(v[0][i], v[1][i], 0x5410), a1 = __byte_perm(v[0][i], v[1][i], 0x7632);
                const uint32_t a2 = __byte_perm(v[2][i], v[3][i], 0x5410), a3 = __byte_perm(v[2][i], v[3][i], 0x7632);
                mma_f16(out[4 * h + i], a0, a1, a2, a3, first.high, second.high);
                mma_f16(out[4 * h + i], a0, a1, a2, a3, first.low, second.low);
            }
        }
    }
};

template <int DIM>
__device__ __forceinline__ void attend(const Instruction& step, const Task& share, const volatile Work& work) {
    const uint32_t warp = thread_index() / 32, lane = thread_index() % 32, g = lane >> 2, t = lane & 3;
    const Tag tag = tag_of(step.x_tag, board().epoch);
    Scratch<DIM>& s = *reinterpret_cast<Scratch<DIM>*>(Memory().records);
    float* const outs = reinterpret_cast<float*>(&s + 1);  // [WARPS][group][DIM]
    const float scale = as_float(step.magnitude) * LOG2E;

    const uint32_t wanted = static_cast<uint32_t>(step.group) * DIM;
    const bool last = share.split + 1 == share.splits;
    // Each word is asked for once, all at the same time: the queries by the first warps, key and value of
    // this position by the last. Rows of heads that there are not stay as they are: what comes of them goes nowhere.
    const uint32_t i0 = 4 * thread_index();
    note_waiting(true);
    if (i0 - 4 * lane < wanted) {
        float v[1][4];
        await_all<1, 4>(v, step.x + share.head * wanted + i0, 0, i0 < wanted ? 1 : 0, tag);
        note_waiting(false);
        const Terms a(v[0][0] * scale, v[0][1] * scale), b(v[0][2] * scale, v[0][3] * scale);
        if (i0 < wanted) {
            *reinterpret_cast<uint2*>(&s.q[0][i0 / DIM][i0 % DIM]) = make_uint2(a.high, b.high);
            *reinterpret_cast<uint2*>(&s.q[1][i0 / DIM][i0 % DIM]) = make_uint2(a.low, b.low);
        }
    } else if (last && warp + 1 == WARPS) {
        constexpr int MINE = DIM / 32;
        float kv[2][MINE];
        await_all<2, MINE>(kv, step.k_mail + share.head * DIM + lane * MINE,
                           static_cast<uint32_t>(step.v_mail - step.k_mail), 3, tag);
#pragma unroll
        for (int e = 0; e < MINE; e++) {
            s.now[0][lane * MINE + e] = __float2half_rn(kv[0][e]);
            s.now[1][lane * MINE + e] = __float2half_rn(kv[1][e]);
        }
    }
    sync_workers();

    // Asked anew: there is no register for the answer.
    if ((work.code & CODE_TRACE) != 0 && thread_index() == 0) note(work.index, STAGED, cycles());
    const Shape shape(step.units);
    const uint32_t groups = share.end - share.begin;
    Running<DIM> run;
    uint32_t known = share.chunk;
    // Group `groups` is this position alone.
    for (uint32_t i = warp; i < groups + (last ? 1u : 0u); i += WARPS) {
        const bool now = i == groups;
        const uint32_t place = Shape::divide(i, shape.inverse), chunk = share.chunk + place * 2;
        const uint32_t inside = (i - place * shape.each) * (POSITIONS * DIM * 2);
        const uint32_t count = now ? 1u : min(static_cast<uint32_t>(POSITIONS), board().position - (share.begin + i) * POSITIONS);
        const uint8_t* const keys = now ? reinterpret_cast<const uint8_t*>(s.now[0]) : wait_chunk(chunk, known) + inside;
        const uint8_t* const values = now ? reinterpret_cast<const uint8_t*>(s.now[1]) : wait_chunk(chunk + 1, known) + inside;
        float d[2][2][4] = {};  // two sums each: a product waits for the one before it
        // This position has one row: it is read in the place of all, and only the first counts.
        const uint32_t pitch = now ? 0u : DIM * 2;
        const uint8_t* const rows[2] = {keys + g * pitch + t * 16, keys + (g + 8) * pitch + t * 16};
#pragma unroll
        for (int j = 0; j < DIM / 32; j++) {
            const uint4 a = load_shared(&s.q[0][g][32 * j + 8 * t]);
            const uint4 b = load_shared(&s.q[1][g][32 * j + 8 * t]);
#pragma unroll
            for (int n = 0; n < 2; n++) {
                const uint4 k = *reinterpret_cast<const uint4*>(rows[n] + j * 64);
                mma_f16(d[n][0], a.x, b.x, a.y, b.y, k.x, k.y);
                mma_f16(d[n][1], a.z, b.z, a.w, b.w, k.z, k.w);
            }
        }
        float score[2][2];
#pragma unroll
        for (int n = 0; n < 2; n++)
#pragma unroll
            for (int c = 0; c < 2; c++)
                score[n][c] = 8 * n + 2 * t + c < count ? (d[n][0][c] + d[n][1][c]) + (d[n][0][2 + c] + d[n][1][2 + c]) : -INFINITY;
        run.take(score, values, pitch, count, lane);
        if (!now) release_chunk(chunk, lane), release_chunk(chunk + 1, lane);
    }

    if ((work.code & CODE_TRACE) != 0 && thread_index() == 0) note(work.index, FIRST, cycles());
    // Read again: not kept meanwhile.
    const uint32_t group = static_cast<uint32_t>(*static_cast<const volatile uint64_t*>(&step.group)), outputs = group * DIM;
    // Join the warps that had work.
    const uint32_t active = min(WARPS, groups + (last ? 1u : 0u));
    run.sum += __shfl_xor_sync(~0u, run.sum, 1);
    run.sum += __shfl_xor_sync(~0u, run.sum, 2);
    if (t == 0) s.largest[warp][g] = run.largest, s.sum[warp][g] = run.sum;
#pragma unroll
    for (int c = 0; c < 2; c++) {
        float* const row = outs + warp * outputs + (2 * t + c) * DIM + Running<DIM>::EACH * g;
        if (2 * t + c < group && warp < active) {
#pragma unroll
            for (int m = 0; m < Running<DIM>::TILES; m++)
                *reinterpret_cast<float2*>(row + 2 * m) = make_float2(run.out[m][c], run.out[m][2 + c]);
        }
    }
    // Where the results go.
    const Tag y_tag = tag_of(step.y_tag, board().epoch);
    uint32_t* const y_mail = step.y_mail + share.head * outputs;
    float* const y = step.y + share.head * outputs;
    sync_workers();
    const uint32_t tag32 = board().epoch * board().launch.steps + board().launch.first + work.index;
    const uint32_t words = outputs + 2 * HEADS;  // of a split: out, largest, sum
    uint64_t* const partials = step.partials + static_cast<uint64_t>(share.head) * (gridDim.x / step.kv_heads) * words;
    auto store = [&](uint32_t o, float v) {
        post(y_mail, o, v, y_tag);
        y[o] = v;
    };
    for (uint32_t o = thread_index(); o < outputs; o += THREADS) {
        const uint32_t h = o / DIM;
        float top = -INFINITY, total = 0.f, value = 0.f;
        // Four at a time, so that their loads go together; warps without work have a largest of -infinity.
#pragma unroll 1
        for (uint32_t w = 0; w < active; w += 4) {
            float m[4], l[4], v[4];
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                m[k] = s.largest[w + k][h], l[k] = s.sum[w + k][h];
                v[k] = w + k < active ? outs[(w + k) * outputs + o] : 0.f;
            }
            const float most = fmaxf(fmaxf(fmaxf(m[0], m[1]), fmaxf(m[2], m[3])), top);
            const float before = exp2_approximate(top - most);
            total *= before, value *= before, top = most;
#pragma unroll
            for (uint32_t k = 0; k < 4; k++) {
                const float f = exp2_approximate(m[k] - most);
                total = fmaf(f, l[k], total);
                value = fmaf(f, v[k], value);
            }
        }
        if (share.splits == 1) {
            store(o, __fdividef(value, total));
        } else {
            auto send = [&](uint32_t at, float v) {
                const uint64_t word = static_cast<uint64_t>(tag32) << 32 | __float_as_uint(v);
                asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(partials + share.split * words + at),
                             "l"(word)
                             : "memory");
            };
            send(o, value);
            if (o % DIM == 0) {
                send(outputs + h, top);
                send(outputs + HEADS + h, total);
            }
        }
    }
    sync_workers();  // the scratch is free
    if (share.splits == 1) return;

    // Join the splits: this block has outputs [begin, end), a thread one output of one split.
    const uint32_t begin = outputs * share.split / share.splits, end = outputs * (share.split + 1) / share.splits;
    // Three words at a time: each look costs a round trip.
    auto receive = [&](uint32_t split, const uint32_t (&at)[3], float* to) {
        uint64_t w[3];
        bool all;
        do {
            all = true;
#pragma unroll
            for (int i = 0; i < 3; i++)
                asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(w[i]) : "l"(partials + split * words + at[i]) : "memory");
#pragma unroll
            for (int i = 0; i < 3; i++) all = all && static_cast<uint32_t>(w[i] >> 32) == tag32;
        } while (!all);
#pragma unroll
        for (int i = 0; i < 3; i++) to[i] = __uint_as_float(static_cast<uint32_t>(w[i]));
    };
    const uint32_t width = end - begin;
    float* const joined = reinterpret_cast<float*>(Memory().records);  // [splits][width][largest, sum, out]
    for (uint32_t i = thread_index(); i < width * share.splits; i += THREADS) {
        const uint32_t split = i / width, o = begin + i % width, h = o / DIM;
        receive(split, {outputs + h, outputs + HEADS + h, o}, joined + 3 * i);
    }
    sync_workers();
    for (uint32_t i = thread_index(); i < width; i += THREADS) {
        float top = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll 4
        for (uint32_t j = i; j < width * share.splits; j += width) top = fmaxf(top, joined[3 * j]);
#pragma unroll 4
        for (uint32_t j = i; j < width * share.splits; j += width) {
            const float f = exp2_approximate(joined[3 * j] - top);
            total = fmaf(f, joined[3 * j + 1], total);
            value = fmaf(f, joined[3 * j + 2], value);
        }
        store(begin + i, __fdividef(value, total));
    }
    sync_workers();
}

}  // namespace persistent
