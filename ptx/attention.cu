// Attention of one token over the cache, split over blocks along the context.
//
//   out[h] = Σ_p softmax_p(cap(scale · q[h] · keys[g, p])) values[g, p],  g = h / group,
//   position − window < p ≤ position (window 0: 0 ≤ p),  cap(s) = c tanh(s / c) (c 0: cap(s) = s)
//
//   q, out [kv_heads · group, head_dim] f32;  keys, values [kv_heads, capacity, head_dim] T
//
// Block b serves key/value head b % kv_heads and part b / kv_heads of the positions seen. The parts
// are cut on the device from the position, so that one graph serves every depth: up to SINGLE
// positions there is one part, which writes `out` itself; beyond, each part writes its maximum,
// sum and weighted values to `partial`, and the block that arrives last adds them up in the order
// of the parts, whatever the order of arrival.
//
// Data path: a row of the cache is read by L lanes, 8 elements each; a warp reads 32 / L rows at
// once. Each lane copies its own 16-byte words into its own slots of a shared-memory ring
// (cp.async) and reads only what it copied: streaming needs no barrier, and 32 to 40 KB are in
// flight per block while at most 128 registers leave room on the multiprocessor for the kernels
// before and after. The heads of a group share every key
// and value read; their scores are added over the lanes by exchanging halves, so that each lane
// ends with the score of one row and head and computes one exponential.
//
// Short contexts take another way (attention_head.cuh): there, latency is all that counts.
//
// Built with -DKV_F16=1 (T = f16, attention_f16) or -DKV_F16=0 (T = f32, attention_f32).
#include "common.cuh"
#include "stream.cuh"
#include "unrolled.cuh"

#if KV_F16
#define KERNEL attention_f16
using Element = uint16_t;
#else
#define KERNEL attention_f32
using Element = float;
#endif

namespace {

constexpr uint32_t THREADS = 256, WARPS = THREADS / 32;
// Up to this many positions a second part would cost more (fence, arrival, re-read: some 1.5 µs)
// than it saves.
constexpr uint32_t SINGLE = 256;
// A part beyond has at least this many positions, and a multiple of PART_STEP.
constexpr uint32_t PART_MIN = 64, PART_STEP = 16;

// Ring: per warp UNITS units of SLOTS 16-byte words a lane. A tile is a run of units of keys, then
// as many of values; a unit's slots are filled again as soon as they have been read.
constexpr uint32_t SLOTS = 2, UNITS = 5, WORD = 16, SLOT_BYTES = 32 * WORD;
constexpr uint32_t UNIT_BYTES = SLOTS * SLOT_BYTES;
constexpr uint32_t RING_BYTES = UNITS * UNIT_BYTES;  // of a warp
// 16-byte words of 8 elements; rows that a lane reads per unit.
constexpr uint32_t WORDS = 8 * sizeof(Element) / WORD;
constexpr uint32_t UNIT_ROWS = SLOTS / WORDS;

// Shared memory: rings | queries and probabilities (6 KB for every shape) | corrections.
constexpr uint32_t QP_BYTES = 6144, MAX_GROUP = 8;
constexpr uint32_t SHARED_BYTES = WARPS * RING_BYTES + QP_BYTES + WARPS * 2 * MAX_GROUP * 4;

// Finite, so that a part without a valid row has no NaN; below every score.
constexpr float LOWEST = -1e30f;
constexpr float LOG2_E = 1.4426950408889634f;

// What a block computes; in shared memory, so that it takes no registers from the loop.
struct Params {
    const float* q;
    const Element* keys;    // of this block's head: [capacity, head_dim]
    const Element* values;
    float* out;
    float* partial;
    uint32_t head, group, heads, head_dim, splits;
    uint32_t position, current;  // of this token; where its row begins, bytes from the head's first
    uint32_t start, end;    // this block's positions
    uint32_t part, parts;   // parts that are not empty
    float scale;
    float softcap;          // 0: none
};

// cap · tanh(s / cap) of a score s that is an exponent of two; c is the cap in the same unit. As
// exact as is needed: some 1e-7 of the cap.
__device__ __forceinline__ float capped(float s, float cap) {
    const float c = cap * LOG2_E;
    return c - 2.0f * c / (1.0f + exp2_approx(s * (2.0f / cap)));
}

__device__ __forceinline__ void widen(uint32_t pair, float& lo, float& hi) {
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\t"
        "cvt.f32.f16 %1, h;\n\t}" : "=f"(lo), "=f"(hi) : "r"(pair));
}

// 8 elements, from WORDS slots of a lane (32 lanes apart).
__device__ __forceinline__ void read_row(const uint8_t* slot, float (&v)[8]) {
    if constexpr (WORDS == 1) {
        const uint4 w = *reinterpret_cast<const uint4*>(slot);
        widen(w.x, v[0], v[1]);
        widen(w.y, v[2], v[3]);
        widen(w.z, v[4], v[5]);
        widen(w.w, v[6], v[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 w = *reinterpret_cast<const float4*>(slot + i * SLOT_BYTES);
            v[4 * i] = w.x, v[4 * i + 1] = w.y, v[4 * i + 2] = w.z, v[4 * i + 3] = w.w;
        }
    }
}

// Where a lane's rows and scores are. The rows of a warp's tile are contiguous.
template <int L, int G>
struct Lane {
    static constexpr uint32_t SL = 32 / L;                  // rows of a warp per slot
    static constexpr uint32_t B = G <= 4 ? 2 : 1;                      // units of keys (and of values) a tile
    static constexpr uint32_t R = B * UNIT_ROWS;            // rows of a lane a tile
    static constexpr uint32_t TILE = WARPS * SL * R;        // positions of a tile of the block
    static constexpr int N = R * G;                         // scores of a lane before the sum
    static constexpr int V = N > L ? N / L : 1;             // and after
    static constexpr int COPIES = N < L ? L / N : 1;        // lanes that end with the same score

    uint32_t lane = thread_index() % 32, warp = thread_index() / 32;
    uint32_t chunk = lane % L, slot = lane / L;
    // First of the V scores that the lane keeps: of row `row` and heads `g0..g0 + V`.
    uint32_t index = chunk / COPIES * V, g0 = index % G, row = index / G;

    // In bytes from the start of the head's cache (below 4 GiB): from a row of the lane to the
    // next, the lane's first word of the part, and the bound below which words are valid.
    uint32_t stride, begin, bound;
    const uint8_t *keys, *values;

    __device__ __forceinline__ explicit Lane(const Params& p) {
        const uint32_t row_bytes = p.head_dim * sizeof(Element);
        stride = SL * row_bytes;
        begin = (p.start + warp * R * SL + slot) * row_bytes + chunk * 8 * sizeof(Element);
        bound = chunk * 8 < p.head_dim ? p.end * row_bytes : 0;
        keys = reinterpret_cast<const uint8_t*>(p.keys);
        values = reinterpret_cast<const uint8_t*>(p.values);
    }
};

// Starts copying unit U, counted from the tile whose first word of the lane is at `tile`.
// BEFORE: called before pdl_wait(); leaves out this token's row, which the predecessor writes.
template <int L, int G, int U, bool BEFORE>
__device__ __forceinline__ void start_unit(const Lane<L, G>& at, uint32_t tile, uint32_t to,
                                           uint32_t current = 0) {
    using At = Lane<L, G>;
    constexpr uint32_t AHEAD = U / (2 * At::B), UNIT = U % (2 * At::B);
    constexpr uint32_t FIRST = AHEAD * WARPS * At::R + UNIT % At::B * UNIT_ROWS;
    const uint8_t* cache = UNIT < At::B ? at.keys : at.values;
#pragma unroll
    for (uint32_t r = 0; r < UNIT_ROWS; ++r) {
        const uint32_t from = tile + (FIRST + r) * at.stride;
        const bool valid = from < at.bound;
        if (BEFORE && valid && from >= current) continue;
#pragma unroll
        for (uint32_t w = 0; w < WORDS; ++w) {
            copy_async(to + (r * WORDS + w) * SLOT_BYTES, cache + from + w * WORD, valid);
        }
    }
    commit();
}

template <int L, int G, bool BEFORE, int U = 0>
__device__ __forceinline__ void fill_ring(const Lane<L, G>& at, uint32_t ring,
                                          uint32_t current = 0) {
    if constexpr (U < UNITS) {
        start_unit<L, G, U, BEFORE>(at, at.begin, ring + U * UNIT_BYTES, current);
        fill_ring<L, G, BEFORE, U + 1>(at, ring, current);
    }
}

// This token's row, where fill_ring left it out.
template <int L, int G>
__device__ __forceinline__ void fill_current(const Params& p, const Lane<L, G>& at, uint8_t* ring) {
    using At = Lane<L, G>;
    if (p.position >= p.end) return;  // another part has it
    const uint32_t from_start = p.position - p.start;
    const uint32_t tile = from_start / At::TILE, rest = from_start % At::TILE;
    const uint32_t row = rest / At::SL % At::R;
    if (rest % At::SL != at.slot || rest / At::SL / At::R != at.warp) return;
    if (at.chunk * 8 >= p.head_dim) return;  // zeros already
    const uint32_t key_unit = tile * 2 * At::B + row / UNIT_ROWS, value_unit = key_unit + At::B;
    if (key_unit >= UNITS) return;
    const uint32_t from = p.current + at.chunk * 8 * sizeof(Element);
    uint4 k[WORDS], v[WORDS];
#pragma unroll
    for (uint32_t w = 0; w < WORDS; ++w) {
        k[w] = load_l2(at.keys + from + w * WORD);
        v[w] = load_l2(at.values + from + w * WORD);
    }
    uint8_t* slot = ring + row % UNIT_ROWS * WORDS * SLOT_BYTES;
#pragma unroll
    for (uint32_t w = 0; w < WORDS; ++w) {
        uint8_t* to = slot + w * SLOT_BYTES;
        *reinterpret_cast<uint4*>(to + key_unit * UNIT_BYTES) = k[w];
        if (value_unit < UNITS) *reinterpret_cast<uint4*>(to + value_unit * UNIT_BYTES) = v[w];
    }
}

// A single part's older rows beyond the ring, into L2: with weights streaming through L2, short
// contexts come from device memory too, and their latency is all there is to hide.
template <int L, int G>
__device__ __forceinline__ void prefetch_rest(const Params& p, const Lane<L, G>& at) {
    using At = Lane<L, G>;
    constexpr uint32_t IN_RING = UNITS / (2 * At::B) * WARPS * At::R;  // rows of a lane
    const uint32_t bound = at.bound < p.current ? at.bound : p.current;
#pragma unroll 1
    for (uint32_t from = at.begin + IN_RING * at.stride; from < bound;
         from += WARPS * At::R * at.stride) {
#pragma unroll
        for (uint32_t r = 0; r < At::R; ++r) {
            const uint32_t row = from + r * at.stride;
            if (row < bound) {
                prefetch_l2(at.keys + row);
                prefetch_l2(at.values + row);
            }
        }
    }
}

// Heads first..first + G (those below p.group) of the block's group over the block's part.
// filled: the ring was filled before pdl_wait(), without this token's row.
template <int L, int G>
__device__ __forceinline__ void attend(const Params& p, uint32_t first, bool filled,
                                       uint8_t* shared) {
    using At = Lane<L, G>;
    constexpr int N = At::N, V = At::V;
    constexpr uint32_t SL = At::SL, TILE = At::TILE, R = At::R, B = At::B;
    // Registers hold the queries of up to 4 heads; of 8 they are read again for every tile.
    constexpr bool Q_IN_REGISTERS = G <= 4;
    static_assert(2 * L * G <= THREADS && G <= MAX_GROUP);
    static_assert(8 * L * G * 4 + WARPS * 4 * SL * R * G <= QP_BYTES);
    static_assert(8 * L * G * 4 + 8 * G <= RING_BYTES);

    At at(p);
    uint8_t* ring = shared + at.warp * RING_BYTES + at.lane * WORD;
    const uint32_t ring_at = shared_address(ring);
    float4* queries = reinterpret_cast<float4*>(shared + WARPS * RING_BYTES);  // [G, 2, L]
    float* probabilities = reinterpret_cast<float*>(queries + 2 * L * G) + at.warp * SL * R * G;
    float* corrections =
        reinterpret_cast<float*>(shared + WARPS * RING_BYTES + QP_BYTES) + at.warp * 2 * MAX_GROUP;

    // Queries, scaled so that scores are exponents of two; zeros for heads and elements beyond.
    // The thread is read anew: what is made of it must not stay in registers over the heads' turns.
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    if (thread < 2 * L * G) {
        const uint32_t g = thread / (2 * L), half = thread / L % 2;
        const uint32_t element = thread % L * 8 + half * 4;
        uint4 w = make_uint4(0, 0, 0, 0);
        if (first + g < p.group && element < p.head_dim) {
            w = load_l2(p.q + (p.head * p.group + first + g) * p.head_dim + element);
        }
        const float f = p.scale * LOG2_E;
        queries[thread] = make_float4(__uint_as_float(w.x) * f, __uint_as_float(w.y) * f,
                                           __uint_as_float(w.z) * f, __uint_as_float(w.w) * f);
    }
    if (filled) {
        fill_current(p, at, ring);
    } else {
        fill_ring<L, G, false>(at, ring_at);
    }
    __syncthreads();

    auto query = [&](int g, float (&v)[8]) {
        const float4 lo = queries[2 * L * g + at.chunk], hi = queries[2 * L * g + L + at.chunk];
        v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
        v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
    };
    float q[Q_IN_REGISTERS ? G : 1][8];
    if constexpr (Q_IN_REGISTERS) {
#pragma unroll
        for (int g = 0; g < G; ++g) query(g, q[g]);
    }

    float acc[G * 8], max[V], sum[V];
#pragma unroll
    for (int i = 0; i < G * 8; ++i) acc[i] = 0.0f;
#pragma unroll
    for (int j = 0; j < V; ++j) max[j] = LOWEST, sum[j] = 0.0f;

    uint32_t stage = 0;
    auto next_stage = [&] { stage = stage == (UNITS - 1) * UNIT_BYTES ? 0 : stage + UNIT_BYTES; };
    // Positions from the warp's first row of the tile to the end; the lane's place in the cache.
    int32_t left = static_cast<int32_t>(p.end - p.start - at.warp * R * SL);
    uint32_t from = at.begin;

#pragma unroll 1
    for (; left > 0; left -= TILE, from += WARPS * R * at.stride) {
        // Keeps multiples of the stride from being held in registers through the loop; of eight heads
        // the stride itself is read again.
        if constexpr (G == 8) {
            uint32_t head_dim;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(head_dim) : "r"(shared_address(&p.head_dim)));
            at.stride = SL * head_dim * sizeof(Element);
        }
        asm volatile("" : "+r"(at.stride));
        // Scores of R rows and G heads. UNITS groups are committed beyond those used up.
        float s[N];
        unroll<B>([&](auto b) {
            wait_groups<UNITS - 1>();
            float k[UNIT_ROWS][8];
#pragma unroll
            for (uint32_t r = 0; r < UNIT_ROWS; ++r) {
                read_row(ring + stage + r * WORDS * SLOT_BYTES, k[r]);
            }
            start_unit<L, G, b.value + UNITS, false>(at, from, ring_at + stage);
            next_stage();
#pragma unroll
            for (int g = 0; g < G; ++g) {
                float from_shared[8];
                if constexpr (!Q_IN_REGISTERS) query(g, from_shared);
                const float(&v)[8] = Q_IN_REGISTERS ? q[Q_IN_REGISTERS ? g : 0] : from_shared;
#pragma unroll
                for (uint32_t r = 0; r < UNIT_ROWS; ++r) {
                    float dot = v[0] * k[r][0];
#pragma unroll
                    for (int i = 1; i < 8; ++i) dot = fmaf(v[i], k[r][i], dot);
                    s[(b.value * UNIT_ROWS + r) * G + g] = dot;
                }
            }
        });
        reduce_scatter<N, L / 2, 1>(s, at.lane);

        // Online softmax, base 2: the lane's own V scores.
        const bool valid = static_cast<int32_t>(at.row * SL + at.slot) < left;
        float* weights = probabilities + at.slot * R * G;
        float old[V];
        bool raised = false;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            if (p.softcap != 0.0f) s[j] = capped(s[j], p.softcap);
            if (!valid) s[j] = -INFINITY;
            float top = s[j];
#pragma unroll
            for (int o = L / R; o < 32; o <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, o));
            old[j] = max[j];
            max[j] = fmaxf(max[j], top);
            raised |= max[j] > old[j];
        }
        // The vote also keeps the writes below behind the reads of the tile before.
        raised = __any_sync(~0u, raised);
        __syncwarp();
#pragma unroll
        for (int j = 0; j < V; ++j) {
            const float weight = exp2_approx(s[j] - max[j]);
            if (raised) {
                const float correction = exp2_approx(old[j] - max[j]);
                sum[j] *= correction;
                corrections[at.g0 + j] = correction;  // the same from every lane of this head
            }
            sum[j] += weight;
            weights[at.row * G + at.g0 + j] = weight;
        }
        __syncwarp();
        if (raised) {
#pragma unroll
            for (int g = 0; g < G; ++g) {
                const float correction = corrections[g];
#pragma unroll
                for (int i = 0; i < 8; ++i) acc[g * 8 + i] *= correction;
            }
        }

        // Values.
        unroll<B>([&](auto b) {
            wait_groups<UNITS - 1>();
            float v[UNIT_ROWS][8];
#pragma unroll
            for (uint32_t r = 0; r < UNIT_ROWS; ++r) {
                read_row(ring + stage + r * WORDS * SLOT_BYTES, v[r]);
            }
            start_unit<L, G, B + b.value + UNITS, false>(at, from, ring_at + stage);
            next_stage();
#pragma unroll
            for (uint32_t r = 0; r < UNIT_ROWS; ++r) {
#pragma unroll
                for (int g = 0; g < G; ++g) {
                    const float weight = weights[(b.value * UNIT_ROWS + r) * G + g];
#pragma unroll
                    for (int i = 0; i < 8; ++i) {
                        acc[g * 8 + i] = fmaf(weight, v[r][i], acc[g * 8 + i]);
                    }
                }
            }
        });
    }

    // Over the rows of the warp; its ring, drained, then holds its weighted values [G, 8 L] and
    // (maximum, sum) [G].
    wait_groups<0>();
    __syncwarp();
    const At end(p);
    float2* own = reinterpret_cast<float2*>(shared + end.warp * RING_BYTES);
#pragma unroll
    for (int j = 0; j < V; ++j) {
#pragma unroll
        for (int o = L / R; o < 32; o <<= 1) sum[j] += __shfl_xor_sync(~0u, sum[j], o);
        if (end.slot == 0 && end.row == 0 && end.chunk % At::COPIES == 0) {
            own[4 * L * G + end.g0 + j] = make_float2(max[j], sum[j]);
        }
    }
    reduce_scatter<G * 8, 16, L>(acc, end.lane);
    constexpr int LEFT = G * 8 / SL;
#pragma unroll
    for (int i = 0; i < LEFT; i += 2) {
        const uint32_t index = end.slot * LEFT + i, g = index / 8, element = index % 8;
        own[(g * 8 * L + end.chunk * 8 + element) / 2] = make_float2(acc[i], acc[i + 1]);
    }
    __syncthreads();

    // Over the warps, in their order; a thread makes two elements.
#pragma unroll 1
    for (uint32_t i = thread_index(); i < G * 4 * L; i += THREADS) {
        const uint32_t g = i / (4 * L), element = i % (4 * L) * 2;
        if (first + g >= p.group || element >= p.head_dim) continue;
        float2 stats[WARPS], values[WARPS];
        float top = LOWEST;
#pragma unroll
        for (uint32_t w = 0; w < WARPS; ++w) {
            const float2* of = reinterpret_cast<const float2*>(shared + w * RING_BYTES);
            stats[w] = of[4 * L * G + g];
            values[w] = of[i];
            top = fmaxf(top, stats[w].x);
        }
        float total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll
        for (uint32_t w = 0; w < WARPS; ++w) {
            const float factor = exp2_approx(stats[w].x - top);
            total = fmaf(factor, stats[w].y, total);
            x = fmaf(factor, values[w].x, x);
            y = fmaf(factor, values[w].y, y);
        }
        const uint32_t head = p.head * p.group + first + g;
        if (p.parts == 1) {
            *reinterpret_cast<float2*>(p.out + head * p.head_dim + element) =
                make_float2(x / total, y / total);
        } else {
            // partial: values [splits, heads, head_dim], then (maximum, sum) [splits, heads].
            const uint32_t row = p.part * p.heads + head;
            *reinterpret_cast<float2*>(p.partial + row * p.head_dim + element) = make_float2(x, y);
            if (element == 0) {
                reinterpret_cast<float2*>(p.partial + p.splits * p.heads * p.head_dim)[row] =
                    make_float2(top, total);
            }
        }
    }
}

// Adds up the parts of the block's head, in their order.
__device__ __forceinline__ void combine(const Params& p) {
    constexpr uint32_t BATCH = 8;
    const float2* stats =
        reinterpret_cast<const float2*>(p.partial + p.splits * p.heads * p.head_dim);
    const float2* values = reinterpret_cast<const float2*>(p.partial);
    const uint32_t pairs = p.head_dim / 2, first = p.head * p.group;
#pragma unroll 1
    for (uint32_t i = thread_index(); i < p.group * pairs; i += THREADS) {
        const uint32_t head = first + i / pairs, pair = i % pairs;
        float top = LOWEST, total = 0.0f, x = 0.0f, y = 0.0f;
#pragma unroll 1
        for (uint32_t part = 0; part < p.parts; part += BATCH) {
            float2 stat[BATCH], value[BATCH];
            float raised = top;
#pragma unroll
            for (uint32_t j = 0; j < BATCH; ++j) {
                // From L2: other blocks wrote it during this kernel. Of a part too many: zeros.
                stat[j] = make_float2(LOWEST, 0.0f);
                value[j] = make_float2(0.0f, 0.0f);
                if (part + j < p.parts) {
                    const uint32_t row = (part + j) * p.heads + head;
                    stat[j] = __ldcg(stats + row);
                    value[j] = __ldcg(values + row * pairs + pair);
                }
            }
#pragma unroll
            for (uint32_t j = 0; j < BATCH; ++j) raised = fmaxf(raised, stat[j].x);
            const float correction = exp2_approx(top - raised);
            top = raised, total *= correction, x *= correction, y *= correction;
#pragma unroll
            for (uint32_t j = 0; j < BATCH; ++j) {
                const float factor = exp2_approx(stat[j].x - top);
                total = fmaf(factor, stat[j].y, total);
                x = fmaf(factor, value[j].x, x);
                y = fmaf(factor, value[j].y, y);
            }
        }
        *reinterpret_cast<float2*>(p.out + head * p.head_dim + 2 * pair) =
            make_float2(x / total, y / total);
    }
}

// The whole of an active block, for rows of up to 8 L elements and G heads at a time.
template <int L, int G>
__device__ __forceinline__ void run(const Params& p, uint8_t* shared) {
    // Before the wait: only rows below the position. They were written by earlier launches of the
    // graph, on which the first kernel of this one depends in full.
    {
        const Lane<L, G> at(p);
        const uint32_t ring = shared_address(shared + at.warp * RING_BYTES + at.lane * WORD);
        fill_ring<L, G, true>(at, ring, p.current);
        if (p.parts == 1) prefetch_rest(p, at);
    }
    pdl_wait();
#pragma unroll 1
    for (uint32_t first = 0; first < p.group; first += G) {
        if (first != 0) __syncthreads();  // the rings are read as partial results until here
        attend<L, G>(p, first, first == 0, shared);
    }
}

// Heads at a time: those of the group up to MOST; larger groups take turns, each of which reads the
// keys and values again. Eight heads of 256 elements, or of 32-bit caches, need more registers
// than there are.
template <int L>
__device__ __forceinline__ void run_group(const Params& p, uint8_t* shared) {
    constexpr int MOST = L == 32 || WORDS == 2 ? 4 : 8;
    if (p.group == 1) {
        run<L, 1>(p, shared);
    } else if (p.group == 2) {
        run<L, 2>(p, shared);
    } else if (MOST == 4 || p.group <= 4) {
        run<L, 4>(p, shared);
    } else {
        run<L, MOST>(p, shared);
    }
}

#if KV_F16
#include "attention_head.cuh"
#endif

}  // namespace

// counters[1 + g] is zero before and after; partial holds splits · heads · (head_dim + 2) f32;
// head_dim is a multiple of 16 up to 256; grid kv_heads · splits.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
KERNEL(const StepState* step, const float* q, const Element* keys, const Element* values,
       float* out, float* partial, uint32_t* counters, uint32_t group, uint32_t kv_heads,
       uint32_t head_dim, uint32_t capacity, uint32_t splits, float scale, uint32_t window,
       float softcap) {
    __shared__ __align__(16) uint8_t shared[SHARED_BYTES];
    pdl_launch();
    const uint4 state = load_step(step);
    const uint32_t head = blockIdx.x % kv_heads, end = state.y + 1;
    // Positions seen, and the first of them.
    const uint32_t n = window != 0 && window < end ? window : end, first = end - n;
    uint32_t part = blockIdx.x / kv_heads, size = n;
#if KV_F16
    // Short contexts: a block a query head (attention_head.cuh).
    const uint32_t short_parts = (n + HEAD_PART - 1) / HEAD_PART;
    const bool by_head = head_dim <= 128 && (short_parts == 1 || short_parts * group <= splits);
    const uint32_t takers = group < splits ? group : splits, taker = part % takers;
    if (by_head) {
        part /= takers;
        size = HEAD_PART;
    }
#else
    constexpr bool by_head = false;
#endif
    if (n > SINGLE && !by_head) {
        size = (n + splits - 1) / splits;
        size = (size + PART_STEP - 1) / PART_STEP * PART_STEP;
        size = size < PART_MIN ? PART_MIN : size;
    }
    // The second bound is the cache's own: a step state with another capacity reads nothing.
    if (!step_active(state) || state.y >= capacity || part * size >= n || part >= splits) {
        pdl_wait();
        return;
    }
    __shared__ Params params;
    Params p;
    const size_t base = static_cast<size_t>(head) * capacity * head_dim;
    p.q = q, p.keys = keys + base, p.values = values + base;
    p.out = out, p.partial = partial;
    p.head = head, p.group = group, p.heads = kv_heads * group, p.head_dim = head_dim;
    p.splits = splits, p.position = state.y, p.start = first + part * size;
    p.current = state.y * head_dim * sizeof(Element);
    p.end = end - p.start < size ? end : p.start + size;
    p.part = part, p.parts = (n + size - 1) / size, p.scale = scale, p.softcap = softcap;
    if (threadIdx.x == 0) params = p;
    __syncthreads();
#if KV_F16
    if (by_head) {
        attend_heads(params, taker, takers, reinterpret_cast<float*>(shared));
        if (params.parts > 1 && last_to_arrive(counters + 1 + params.head, params.parts * takers)) {
            combine(params);
        }
        return;
    }
#endif
    if (head_dim <= 64) {
        run_group<8>(params, shared);
    } else if (head_dim <= 128) {
        run_group<16>(params, shared);
    } else {
        run_group<32>(params, shared);
    }
    if (params.parts > 1 && last_to_arrive(counters + 1 + params.head, params.parts)) combine(params);
}
