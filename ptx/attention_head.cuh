// Attention over a short context: a block a query head, in little code and few steps. Included by
// attention.cu within its namespace, for f16 caches and heads of up to 128 elements.
//
// Up to HEAD_PART positions a block needs no other; beyond, the parts of a head are added up as
// those of attention.cu. The block takes CHUNK positions at a time: two threads share a key (half
// a row each, in registers), sixteen share a value row (8 elements each, 8 rows a thread). The
// keys and values of the block's first chunk are loaded before the wait, later ones as soon as
// their registers are free.
#pragma once

// Positions of a part, and of a step of its loop.
constexpr uint32_t HEAD_PART = 256, CHUNK = 128;
// A thread's words of a key half and rows of values.
constexpr uint32_t KEY_WORDS = 8, VALUE_ROWS = 8, VALUE_GROUPS = 16;

struct HeadThread {
    uint32_t row_key = threadIdx.x / 2, half = threadIdx.x % 2;
    uint32_t group_value = threadIdx.x / 16, element = threadIdx.x % 16 * 8;
    uint4 key[KEY_WORDS], value[VALUE_ROWS];

    // Keys of positions from + …, those below `limit`.
    __device__ __forceinline__ void load_keys(const Params& p, uint32_t from, uint32_t limit) {
        const uint32_t at = from + row_key;
        const uint4* row = reinterpret_cast<const uint4*>(p.keys + at * p.head_dim + half * (p.head_dim / 2));
#pragma unroll
        for (uint32_t i = 0; i < KEY_WORDS; i++) {
            if (at < limit && i * 16 < p.head_dim) key[i] = __ldcg(row + i);
        }
    }
    __device__ __forceinline__ void load_values(const Params& p, uint32_t from, uint32_t limit) {
#pragma unroll
        for (uint32_t j = 0; j < VALUE_ROWS; j++) {
            const uint32_t at = from + j * VALUE_GROUPS + group_value;
            if (at < limit && element < p.head_dim) {
                value[j] = __ldcg(reinterpret_cast<const uint4*>(p.values + at * p.head_dim + element));
            }
        }
    }
    // This token's row, which the predecessor wrote; the others of the first chunk are there.
    __device__ __forceinline__ void load_current(const Params& p) {
        if (p.start + row_key == p.position) load_keys(p, p.start, p.position + 1);
#pragma unroll
        for (uint32_t j = 0; j < VALUE_ROWS; j++) {
            const uint32_t at = p.start + j * VALUE_GROUPS + group_value;
            if (at == p.position && element < p.head_dim) {
                value[j] = __ldcg(reinterpret_cast<const uint4*>(p.values + at * p.head_dim + element));
            }
        }
    }
};

__device__ __forceinline__ void widen8(const uint4& w, float (&v)[8]) {
    widen(w.x, v[0], v[1]);
    widen(w.y, v[2], v[3]);
    widen(w.z, v[4], v[5]);
    widen(w.w, v[6], v[7]);
}

// Heads first, first + step, … of the group, over the block's part.
__device__ __forceinline__ void attend_heads(const Params& p, uint32_t first, uint32_t step, float* shared) {
    float* query = shared;                      // [head_dim]
    float* weights = shared + 128;              // [CHUNK]
    float* tops = weights + CHUNK;              // [WARPS], then sums [WARPS]
    float* sums = tops + WARPS;
    float* partial = sums + WARPS;              // [VALUE_GROUPS, 128]
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    HeadThread t;
#pragma unroll
    for (uint32_t i = 0; i < KEY_WORDS; i++) t.key[i] = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (uint32_t j = 0; j < VALUE_ROWS; j++) t.value[j] = make_uint4(0, 0, 0, 0);
    // Rows below the position were written by earlier launches of the graph.
    const uint32_t old = min(p.end, p.position);
    t.load_keys(p, p.start, old);
    t.load_values(p, p.start, old);
    pdl_wait();

#pragma unroll 1
    for (uint32_t g = first; g < p.group; g += step) {
        const uint32_t head = p.head * p.group + g;
        if (g != first) {
            __syncthreads();
            t.load_keys(p, p.start, p.end);
            t.load_values(p, p.start, p.end);
        } else {
            t.load_current(p);
        }
        if (threadIdx.x < p.head_dim) {
            query[threadIdx.x] = __ldcg(p.q + head * p.head_dim + threadIdx.x) * (p.scale * LOG2_E);
        }
        __syncthreads();
        float acc[8] = {}, top = LOWEST, total = 0.0f;
#pragma unroll 1
        for (uint32_t from = p.start; from < p.end; from += CHUNK) {
            float score = 0.0f;
            const float4* q = reinterpret_cast<const float4*>(query + t.half * (p.head_dim / 2));
#pragma unroll
            for (uint32_t i = 0; i < KEY_WORDS; i++) {
                if (i * 16 < p.head_dim) {
                    float k[8];
                    widen8(t.key[i], k);
                    const float4 a = q[2 * i], b = q[2 * i + 1];
                    score = fmaf(a.x, k[0], fmaf(a.y, k[1], fmaf(a.z, k[2], fmaf(a.w, k[3], score))));
                    score = fmaf(b.x, k[4], fmaf(b.y, k[5], fmaf(b.z, k[6], fmaf(b.w, k[7], score))));
                }
            }
            t.load_keys(p, from + CHUNK, p.end);
            score += __shfl_xor_sync(~0u, score, 1);
            if (p.softcap != 0.0f) score = capped(score, p.softcap);
            if (from + t.row_key >= p.end) score = -INFINITY;
            const float warp_top = warp_max(score);
            if (lane == 0) tops[warp] = warp_top;
            __syncthreads();
            float raised = top;
#pragma unroll
            for (uint32_t w = 0; w < WARPS; w++) raised = fmaxf(raised, tops[w]);
            const float weight = exp2_approx(score - raised);
            if (t.half == 0) weights[t.row_key] = weight;
            const float warp_total = warp_sum(t.half == 0 ? weight : 0.0f);
            if (lane == 0) sums[warp] = warp_total;
            __syncthreads();
            const float correction = exp2_approx(top - raised);
            top = raised;
            total *= correction;
#pragma unroll
            for (uint32_t w = 0; w < WARPS; w++) total += sums[w];
#pragma unroll
            for (int i = 0; i < 8; i++) acc[i] *= correction;
#pragma unroll
            for (uint32_t j = 0; j < VALUE_ROWS; j++) {
                // A row past the end has weight zero; its registers hold an older, finite row.
                const float w = weights[j * VALUE_GROUPS + t.group_value];
                float v[8];
                widen8(t.value[j], v);
#pragma unroll
                for (int i = 0; i < 8; i++) acc[i] = fmaf(w, v[i], acc[i]);
            }
            t.load_values(p, from + CHUNK, p.end);
        }
        float4* own = reinterpret_cast<float4*>(partial + t.group_value * 128 + t.element);
        own[0] = make_float4(acc[0], acc[1], acc[2], acc[3]);
        own[1] = make_float4(acc[4], acc[5], acc[6], acc[7]);
        __syncthreads();
        if (threadIdx.x < p.head_dim) {
            float sum = 0.0f;
#pragma unroll
            for (uint32_t v = 0; v < VALUE_GROUPS; v++) sum += partial[v * 128 + threadIdx.x];
            if (p.parts == 1) {
                p.out[head * p.head_dim + threadIdx.x] = sum / total;
            } else {
                // As in attention.cu: values [splits, heads, head_dim], then (maximum, sum).
                const uint32_t row = p.part * p.heads + head;
                p.partial[row * p.head_dim + threadIdx.x] = sum;
                if (threadIdx.x == 0) {
                    reinterpret_cast<float2*>(p.partial + p.splits * p.heads * p.head_dim)[row] =
                        make_float2(top, total);
                }
            }
        }
    }
}
