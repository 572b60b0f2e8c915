// out[h] = Σ softmax(scale · q[h] · K[p]) V[p] over the positions p ≤ position; f16 cache.
//
// A block has a key/value head and a range of groups of earlier positions, which reach it through the
// ring (stream.cuh); the last split has this position too, from mail. Scores are products on tensor cores, q in two f16 terms (22 bits) in the rows g and g + 8 of A; values are
// weighted in f32. The warps' partial results are joined in shared memory, those of several blocks
// by mail of words {f32, 32-bit tag}: each block of a head joins an equal part of the outputs.
#pragma once
#include "product.cuh"

namespace persistent {

constexpr int HEADS = 8;         // query heads of a key/value head, at most
constexpr int GROUP_BYTES = 2048;  // keys, or values, of a group of positions
constexpr float LOG2E = 1.4426950408889634f;

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
    __half q[2][HEADS][DIM];            // two terms
    float weights[WARPS][GROUP_BYTES / 2 / DIM][HEADS];
    float rescale[WARPS][HEADS];
    float largest[WARPS][HEADS], sum[WARPS][HEADS];
};

// What a warp has seen so far: lane (g, t) keeps the largest score of head g and its share of the
// sum of weights, and the weighted values of every head in its EACH dimensions.
template <int DIM, int PADDED>
struct Running {
    static constexpr int P = GROUP_BYTES / 2 / DIM, EACH = DIM / 32, TILES = P / 8;
    float largest = -INFINITY, sum = 0.f;
    float out[PADDED][EACH] = {};

    // Takes the scores of P positions (this lane: head g, columns 2t and 2t + 1 of each tile);
    // their weights then lie in shared memory and what was summed before is scaled to them.
    __device__ __forceinline__ void weigh(Scratch<DIM>& s, uint32_t warp, uint32_t lane, const float (&score)[TILES][2]) {
        const uint32_t g = lane >> 2, t = lane & 3;
        float top = largest;
#pragma unroll
        for (int i = 0; i < TILES; i++) top = fmaxf(top, fmaxf(score[i][0], score[i][1]));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
        top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
        const float factor = exp2_approximate(largest - top);
        largest = top;
        sum *= factor;
        __syncwarp();  // the weights before have been read
#pragma unroll
        for (int i = 0; i < TILES; i++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                const float w = exp2_approximate(score[i][c] - top);
                sum += w;
                s.weights[warp][8 * i + 2 * t + c][g] = w;
            }
        }
        if (t == 0) s.rescale[warp][g] = factor;
        __syncwarp();
#pragma unroll
        for (int h = 0; h < PADDED; h++) {
            const float f = s.rescale[warp][h];
#pragma unroll
            for (int e = 0; e < EACH; e++) out[h][e] *= f;
        }
    }
    // Adds the value of position p of the chunk.
    __device__ __forceinline__ void add(const Scratch<DIM>& s, uint32_t warp, uint32_t p, const float (&v)[EACH]) {
#pragma unroll
        for (int h = 0; h < PADDED; h++) {
            const float w = s.weights[warp][p][h];
#pragma unroll
            for (int e = 0; e < EACH; e++) out[h][e] = fmaf(w, v[e], out[h][e]);
        }
    }
};

// HEADS_PADDED: the group padded to 1, 4 or 8.
template <int DIM, int PADDED>
__device__ __forceinline__ void attend(const Instruction& step, Block& block) {
    constexpr int P = GROUP_BYTES / 2 / DIM, EACH = DIM / 32, TILES = P / 8;
    const Task& share = block.task();
    if (share.split >= share.splits) return;
    const uint32_t warp = thread_index() / 32, lane = thread_index() % 32, g = lane >> 2, t = lane & 3;
    const uint32_t group = static_cast<uint32_t>(step.group), outputs = group * DIM;
    const uint32_t tag = tag_of(step.x_tag, board().epoch);
    Scratch<DIM>& s = *reinterpret_cast<Scratch<DIM>*>(block.records());
    float* const outs = reinterpret_cast<float*>(&s + 1);  // [WARPS][group][DIM]
    const float scale = as_float(step.magnitude) * LOG2E;

    for (uint32_t i = threadIdx.x; i < HEADS * DIM; i += THREADS) {
        float v = 0.f;
        if (i < outputs) v = await(step.x + share.head * outputs + i, tag) * scale;
        const __half high = __float2half_rn(v);
        s.q[0][i / DIM][i % DIM] = high;
        s.q[1][i / DIM][i % DIM] = __float2half_rn(v - __half2float(high));
    }
    sync_workers();

    block.mark(STAGED);
    const uint32_t first_chunk = share.chunk, shift = Shape(step.units).shift;
    Running<DIM, PADDED> run;
    for (uint32_t i = warp; i < share.end - share.begin; i += WARPS) {
        const uint32_t group_at = share.begin + i, c = (i >> shift) * 2;
        const uint32_t count = min(static_cast<uint32_t>(P), board().position - group_at * P);
        float score[TILES][2];
        const uint8_t* keys = wait_chunk(first_chunk + c) + (i & ((1u << shift) - 1)) * GROUP_BYTES;
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            float d[4] = {0.f, 0.f, 0.f, 0.f};
            const uint8_t* row = keys + (8 * n + g) * DIM * 2 + t * 16;
#pragma unroll
            for (int j = 0; j < DIM / 32; j++) {
                const uint4 k = *reinterpret_cast<const uint4*>(row + j * 64);
                const uint4 a = load_shared(&s.q[0][g][32 * j + 8 * t]);
                const uint4 b = load_shared(&s.q[1][g][32 * j + 8 * t]);
                mma_f16(d, a.x, b.x, a.y, b.y, k.x, k.y);
                mma_f16(d, a.z, b.z, a.w, b.w, k.z, k.w);
            }
#pragma unroll
            for (int c = 0; c < 2; c++)
                score[n][c] = 8 * n + 2 * t + c < count ? d[c] + d[2 + c] : -INFINITY;
        }
        release_chunk(first_chunk + c, 1, shift, lane);
        const uint8_t* values = wait_chunk(first_chunk + c + 1) + (i & ((1u << shift) - 1)) * GROUP_BYTES;
        run.weigh(s, warp, lane, score);
#pragma unroll 2
        for (uint32_t p = 0; p < count; p++) {
            const uint8_t* at = values + p * DIM * 2 + lane * EACH * 2;
            float v[EACH];
            if constexpr (EACH == 4) {
                const uint2 w = *reinterpret_cast<const uint2*>(at);
                const float2 a = gemv::half_pair(w.x), b = gemv::half_pair(w.y);
                v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
            } else {
                const float2 a = gemv::half_pair(*reinterpret_cast<const uint32_t*>(at));
                v[0] = a.x, v[1] = a.y;
            }
            run.add(s, warp, p, v);
        }
        release_chunk(first_chunk + c + 1, 1, shift, lane);
    }
    if (warp == (share.end - share.begin) % WARPS && share.split + 1 == share.splits) {
        // This position: one column, by a warp that has a group less than others or none.
        // Key and value together: each look costs a round trip.
        float kv[2][EACH];
        await_all<2, EACH>(kv, step.k_mail + share.head * DIM + lane * EACH,
                           static_cast<uint32_t>(step.v_mail - step.k_mail), 3, tag);
        float score[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES; i++) score[i][0] = score[i][1] = -INFINITY;
#pragma unroll
        for (int h = 0; h < PADDED; h++) {
            float d = 0.f;
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const uint32_t c = lane * EACH + e;
                d = fmaf(__half2float(s.q[0][h][c]) + __half2float(s.q[1][h][c]), kv[0][e], d);
            }
            d = warp_sum(d);
            if (g == h && t == 0) score[0][0] = d;
        }
        if (g >= PADDED && t == 0) score[0][0] = 0.f;  // a head that is not there: finite
        run.weigh(s, warp, lane, score);
        run.add(s, warp, 0, kv[1]);
    }

    block.mark(FIRST);
    // Join the warps. One without work has largest = -inf and weight 0.
    run.sum += __shfl_xor_sync(~0u, run.sum, 1);
    run.sum += __shfl_xor_sync(~0u, run.sum, 2);
    if (t == 0) s.largest[warp][g] = run.largest, s.sum[warp][g] = run.sum;
#pragma unroll
    for (int h = 0; h < PADDED; h++) {
        if (h < group) {
#pragma unroll
            for (int e = 0; e < EACH; e++) outs[warp * outputs + h * DIM + lane * EACH + e] = run.out[h][e];
        }
    }
    sync_workers();
    const uint32_t tag32 = board().epoch * board().launch.steps + board().launch.first + block.step();
    const uint32_t words = outputs + 2 * HEADS;  // of a split: out, largest, sum
    uint64_t* const partials = step.partials + static_cast<uint64_t>(share.head) * (gridDim.x / step.kv_heads) * words;
    auto store = [&](uint32_t o, float v) {
        const uint32_t at = share.head * outputs + o;
        step.y[at] = v;
        post(step.y_mail, at, v, tag_of(step.y_tag, board().epoch));
    };
    for (uint32_t o = threadIdx.x; o < outputs; o += THREADS) {
        const uint32_t h = o / DIM;
        float top = s.largest[0][h];
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, s.largest[w][h]);
        float total = 0.f, value = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float f = exp2_approximate(s.largest[w][h] - top);
            total = fmaf(f, s.sum[w][h], total);
            value = fmaf(f, outs[w * outputs + o], value);
        }
        if (share.splits == 1) {
            store(o, value / total);
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
    float* const joined = reinterpret_cast<float*>(block.records());  // [splits][width][largest, sum, out]
    for (uint32_t i = threadIdx.x; i < width * share.splits; i += THREADS) {
        const uint32_t split = i / width, o = begin + i % width, h = o / DIM;
        receive(split, {outputs + h, outputs + HEADS + h, o}, joined + 3 * i);
    }
    sync_workers();
    for (uint32_t i = threadIdx.x; i < width; i += THREADS) {
        float top = -INFINITY, total = 0.f, value = 0.f;
        for (uint32_t j = i; j < width * share.splits; j += width) top = fmaxf(top, joined[3 * j]);
        for (uint32_t j = i; j < width * share.splits; j += width) {
            const float f = exp2_approximate(joined[3 * j] - top);
            total = fmaf(f, joined[3 * j + 1], total);
            value = fmaf(f, joined[3 * j + 2], value);
        }
        store(begin + i, value / total);
    }
    sync_workers();
}

template <int DIM>
__device__ __forceinline__ void attend_group(const Instruction& step, Block& block) {
    if (step.group == 1) attend<DIM, 1>(step, block);
    else if (step.group <= 4) attend<DIM, 4>(step, block);
    else attend<DIM, 8>(step, block);
}

}  // namespace persistent
