// A step that is a matrix-vector product: staging of the activations from mail, the product over
// the weight stream, and what becomes of the sums.
#pragma once
#include "../epilogues.cuh"
#include "../formats/all.cuh"
#include "stream.cuh"

namespace persistent {

using gemv::FLUSH;

// The formats by their GGML type ids.
#define EVERY_FORMAT(X)                                                                            \
    X(0, f32) X(1, f16) X(2, q4_0) X(3, q4_1) X(6, q5_0) X(7, q5_1) X(8, q8_0) X(10, q2_k)         \
        X(11, q3_k) X(12, q4_k) X(13, q5_k) X(14, q6_k) X(20, iq4_nl) X(23, iq4_xs) X(30, bf16)    \
            X(39, mxfp4)

// Where a warp stands, between the steps. All else is found anew in each step: kept in registers
// over all of them it would displace what the products need.
struct Block {

    // The current step, counted from the first. From shared memory: in a register it would be spilled.
    __device__ __forceinline__ uint32_t step() const { return *static_cast<volatile uint32_t*>(board().step + thread_index() / 32); }
    __device__ __forceinline__ const Task& task() const { return board().tasks[step() % ROWS_AHEAD]; }
    // Staged activations; scratch of the attention.
    __device__ __forceinline__ uint8_t* records() const { return ring() + board().launch.ring_bytes; }
    // [2][FLUSH][WARPS][ROWS]
    __device__ __forceinline__ float* sums() const {
        return reinterpret_cast<float*>(records() + board().launch.record_bytes);
    }
    // [2][WARPS]
    __device__ __forceinline__ float* squares() const { return sums() + 2 * FLUSH * WARPS * ROWS; }

    // Notes that this block is past `point`; clock cycles.
    __device__ __forceinline__ void mark(int point) const {
        if (board().launch.trace != nullptr && threadIdx.x == 0) note(point, static_cast<uint32_t>(clock64()));
    }
    __device__ __forceinline__ void note(int point, uint32_t value) const {
        board().launch.trace[((board().launch.first + step()) * gridDim.x + blockIdx.x) * 8 + point] = value;
    }
    __device__ __forceinline__ void begin() const;
    __device__ __forceinline__ void end() const;
};
// Points of a step: it begins, its inputs are staged, its first flush is summed, it ends, cycles for
// which the first warp waited for weights; then its times in nanoseconds, modulo 2^32.
enum Point { BEGIN = 0, STAGED = 1, FIRST = 2, STARVED = 3, END = 4, BEGIN_NS = 6, END_NS = 7 };

__device__ __forceinline__ void Block::begin() const {
    if (board().launch.trace == nullptr || threadIdx.x != 0) return;
    const uint32_t now = static_cast<uint32_t>(clock64());
    note(BEGIN, now);
    note(STAGED, now);  // until there is work
    note(STARVED, 0);
    note(BEGIN_NS, static_cast<uint32_t>(global_nanoseconds()));
}
__device__ __forceinline__ void Block::end() const {
    if (board().launch.trace == nullptr || threadIdx.x != 0) return;
    note(END, static_cast<uint32_t>(clock64()));
    note(END_NS, static_cast<uint32_t>(global_nanoseconds()));
}

// Stages x (times the gain) for `Dot`; returns this warp's sum of squares.
template <class Dot, bool GAIN, int BATCH>
__device__ __forceinline__ float stage(const Instruction& step, const Block& block) {
    constexpr int COLUMNS = Dot::UNIT_COLUMNS, EACH = COLUMNS / 32;
    const uint32_t warp = thread_index() / 32, lane = thread_index() % 32;
    const uint32_t columns = static_cast<uint32_t>(step.columns), units = static_cast<uint32_t>(step.units);
    const uint32_t tag = tag_of(step.x_tag, board().epoch);
    const float* gain = step.gain;
    float squares = 0.f;
    for (uint32_t first = warp; first < units; first += BATCH * WARPS) {
        float g[BATCH][EACH], v[BATCH][EACH];
        if (GAIN) {
            // Constant, but perhaps far away: asked for before the wait.
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                gemv::Stager<Dot, 1, 1>::load_gain(g[b], gain, columns, first + b * WARPS, lane);
        }
        uint32_t mine = 0;
        const uint32_t at = first * COLUMNS + lane * EACH;
#pragma unroll
        for (int b = 0; b < BATCH; b++) mine |= (at + b * WARPS * COLUMNS < columns ? 1u : 0u) << b;
        await_all(v, step.x + at, WARPS * COLUMNS, mine, tag);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            const uint32_t unit = first + b * WARPS;
            if (unit >= units) continue;
            if (GAIN) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    squares = fmaf(v[b][j], v[b][j], squares);
                    v[b][j] *= g[b][j];
                }
            }
            Dot::stage(block.records() + unit * Dot::STAGE_BYTES, v[b], lane);
        }
    }
    return GAIN ? warp_sum(squares) : 0.f;
}

template <class Dot>
__device__ __forceinline__ float stage_either(const Instruction& step, const Block& block) {
    return step.gain != nullptr ? stage<Dot, true, 1>(step, block) : stage<Dot, false, 2>(step, block);
}

__device__ __forceinline__ float stage_any(const Instruction& step, const Block& block) {
    switch (step.format[0]) {
        case 0: return stage_either<gemv::F32>(step, block);
        case 1: return stage_either<gemv::F16>(step, block);
        case 30: return stage_either<gemv::BF16>(step, block);
        default: return stage_either<gemv::IntegerStage>(step, block);
    }
}

__device__ __forceinline__ uint32_t stage_bytes(uint32_t format) {
    switch (format) {
        case 0: return gemv::F32::STAGE_BYTES;
        case 1: return gemv::F16::STAGE_BYTES;
        case 30: return gemv::BF16::STAGE_BYTES;
        default: return gemv::IntegerStage::STAGE_BYTES;
    }
}
__device__ __forceinline__ uint32_t unit_columns(uint32_t format) {
    switch (format) {
        case 0: return gemv::F32::UNIT_COLUMNS;
        case 1: return gemv::F16::UNIT_COLUMNS;
        case 30: return gemv::BF16::UNIT_COLUMNS;
        default: return gemv::IntegerStage::UNIT_COLUMNS;
    }
}

__device__ __forceinline__ float value_any(uint32_t format, const uint8_t* unit, int row, int column, uint32_t n) {
    switch (format) {
#define CASE(ID, F) \
    case ID: return gemv::F::value(unit, row, column, n);
        EVERY_FORMAT(CASE)
#undef CASE
    }
    return 0.f;
}

// y[i] = scale · table[token, i], rows of y shared out as the projections' are.
__device__ __forceinline__ void embed(const Instruction& step, const Block& block) {
    const uint32_t columns = static_cast<uint32_t>(step.columns), token = board().token;
    const uint32_t items = (columns + ROWS - 1) / ROWS;
    const uint32_t begin = items * blockIdx.x / gridDim.x * ROWS;
    const uint32_t end = min(items * (blockIdx.x + 1) / gridDim.x * ROWS, columns);
    const uint32_t tag = tag_of(step.y_tag, board().epoch), format = static_cast<uint32_t>(step.format[0]);
    const uint32_t unit_length = unit_columns(format);
    for (uint32_t i = begin + threadIdx.x; i < end; i += THREADS) {
        const uint32_t unit = i / unit_length;
        const uint8_t* p = step.weight[0] + token / ROWS * step.tile_bytes[0] + unit * step.unit_bytes[0];
        const uint32_t n = unit + 1 == step.units ? static_cast<uint32_t>(step.tail) : unit_length;
        const float v = __fmul_rn(value_any(format, p, token % ROWS, i % unit_length, n), as_float(step.magnitude));
        step.y[i] = v;
        post(step.y_mail, i, v, tag);
    }
}

// The partial sums of a flush.
struct Sums {
    const float* partial;  // [FLUSH][WARPS][ROWS]
    uint32_t first;        // warp that had the first unit of the first tile
    uint32_t units;

    // Row `row` of tile `n`: its warps' sums in the order of their units.
    __device__ __forceinline__ float total(uint32_t n, uint32_t row) const {
        const float* p = partial + n * WARPS * ROWS + row;
        if (units >= WARPS) {
            float s[4];
#pragma unroll
            for (int w = 0; w < 4; w++) s[w] = (p[w * ROWS] + p[(w + 4) * ROWS]) + (p[(w + 8) * ROWS] + p[(w + 12) * ROWS]);
            return (s[0] + s[1]) + (s[2] + s[3]);
        }
        float s = 0.f;
        const uint32_t from = first + n * units;
        for (uint32_t q = 0; q < units; q++) s += p[(from + q) % WARPS * ROWS];
        return s;
    }
};

// What an epilogue thread needs for its first row (or pair of rows), asked for before the wait.
struct Prefetched {
    float a, b;  // residual and bias (PROJECT); cosine and sine (QKV)
};

struct Finish {
    const Instruction& step;
    const Block& block;
    uint32_t begin;  // the block's first tile
    uint32_t tag;
    Prefetched first;
    Candidate best = no_candidate();

    __device__ __forceinline__ Finish(const Instruction& s, const Block& b, uint32_t t)
        : step(s), block(b), begin(t), tag(tag_of(s.y_tag, board().epoch)), first{0.f, 0.f} {
        const uint32_t i = threadIdx.x;
        if (step.kind == PROJECT) {
            if (i < FLUSH * ROWS) first = carried(begin * ROWS + i);
        } else if (step.kind == QKV) {
            if (i < FLUSH * ROWS / 2) first = turn(where(begin * ROWS + 2 * i));
        }
    }

    __device__ __forceinline__ Prefetched carried(uint32_t r) const {
        Prefetched p{0.f, 0.f};
        if (r >= step.rows[0]) return p;
        if (step.residual != nullptr) p.a = __ldcg(step.residual + r);
        if (step.bias[0] != nullptr) p.b = __ldg(step.bias[0] + r);
        return p;
    }

    struct Where {
        uint32_t matrix, base, e0, e1, pair;
        bool inside, rotates;
    };
    __device__ __forceinline__ Where where(uint32_t at) const {
        Where w;
        uint32_t tile = at / ROWS;
        w.matrix = matrix_of(step, tile);
        const uint32_t r = tile * ROWS + at % ROWS, head_dim = static_cast<uint32_t>(step.head_dim);
        w.inside = r < step.rows[w.matrix != 0];
        const uint32_t e = r % head_dim, half = static_cast<uint32_t>(step.half_rotary);
        w.base = r - e;
        w.pair = e / 2;
        w.e0 = e, w.e1 = e + 1;
        w.rotates = w.matrix != 2 && e < 2 * half;
        if (step.halves != 0 && w.rotates) w.e0 = w.pair, w.e1 = w.pair + half;
        return w;
    }
    // Cosine and sine of a pair's angle; one f32 rounding for the angle, as the reference has it.
    __device__ __forceinline__ Prefetched turn(const Where& w) const {
        if (!w.inside || !w.rotates) return Prefetched{1.f, 0.f};
        float sin, cos;
        sincosf(static_cast<float>(board().position) * __ldg(step.freqs + w.pair), &sin, &cos);
        return Prefetched{cos * as_float(step.magnitude), sin * as_float(step.magnitude)};
    }

    __device__ __forceinline__ void append(const Where& w, uint32_t e, float v) const {
        const uint32_t head_dim = static_cast<uint32_t>(step.head_dim);
        const uint64_t at = (static_cast<uint64_t>(w.base / head_dim) * step.capacity + board().position) * head_dim + e;
        const __half h = __float2half_rn(v);
        static_cast<__half*>(w.matrix == 2 ? step.values : step.keys)[at] = h;
        post(w.matrix == 2 ? step.v_mail : step.k_mail, w.base + e, __half2float(h), tag);
    }

    // The whole block, for up to FLUSH tiles from `base` on.
    __device__ __forceinline__ void flush(uint32_t base, uint32_t count, const Sums& sums, const float* squares) {
        const uint32_t i = threadIdx.x;
        float scale = 1.f;
        if (step.gain != nullptr) {
            const float4* s = reinterpret_cast<const float4*>(squares);
            float4 a = s[0];
#pragma unroll
            for (int w = 1; w < WARPS / 4; w++) a.x += s[w].x, a.y += s[w].y, a.z += s[w].z, a.w += s[w].w;
            scale = rsqrtf(((a.x + a.y) + (a.z + a.w)) / static_cast<float>(step.columns) + as_float(step.eps));
        }
        if (step.kind == QKV) {
            if (i >= count * (ROWS / 2)) return;
            const uint32_t at = base * ROWS + 2 * i;
            const Where w = where(at);
            if (!w.inside) return;
            const Prefetched t = base == begin ? first : turn(w);
            float a = sums.total(i / (ROWS / 2), at % ROWS) * scale;
            float b = sums.total(i / (ROWS / 2), at % ROWS + 1) * scale;
            const float* bias = step.bias[w.matrix];
            if (bias != nullptr) a += __ldg(bias + w.base + w.e0), b += __ldg(bias + w.base + w.e1);
            if (w.rotates) {
                const float x = a;
                a = x * t.a - b * t.b;
                b = x * t.b + b * t.a;
            }
            if (w.matrix == 0) {
                step.y[w.base + w.e0] = a;
                step.y[w.base + w.e1] = b;
                post(step.y_mail, w.base + w.e0, a, tag);
                post(step.y_mail, w.base + w.e1, b, tag);
            } else {
                append(w, w.e0, a);
                append(w, w.e1, b);
            }
        } else if (step.kind == GATE_UP) {
            const uint32_t pair = i / ROWS, r = (base / 2 + pair) * ROWS + i % ROWS;
            if (i >= count / 2 * ROWS || r >= step.rows[0]) return;
            float g = sums.total(2 * pair, i % ROWS) * scale;
            float u = sums.total(2 * pair + 1, i % ROWS) * scale;
            if (step.bias[0] != nullptr) g += __ldg(step.bias[0] + r);
            if (step.bias[1] != nullptr) u += __ldg(step.bias[1] + r);
            const float v = __fdividef(g, 1.f + expf(-g)) * u;
            step.y[r] = v;
            post(step.y_mail, r, v, tag);
        } else {
            const uint32_t r = base * ROWS + i;
            if (i >= count * ROWS || r >= step.rows[0]) return;
            const Prefetched p = step.kind == PROJECT && base == begin ? first : carried(r);
            const float v = sums.total(i / ROWS, i % ROWS) * scale + p.b + p.a;
            step.y[r] = v;
            if (step.kind == PROJECT) post(step.y_mail, r, v, tag);
            else best = consider(best, v, r);
        }
    }
};

// The units of a warp, in order: unit `k` of tile `n`, counted from the block's first.
struct Place {
    uint32_t n, k;

    __device__ __forceinline__ void advance(uint32_t units) {
        k += WARPS;
        while (k >= units) k -= units, n++;
    }
};

__device__ __forceinline__ void dot_any(uint32_t format, const uint8_t* unit, const uint8_t* record, int lane,
                                        uint32_t columns, float& low, float& high) {
    switch (format) {
#define CASE(ID, F)                                           \
    case ID:                                                  \
        gemv::F::dot(unit, record, lane, columns, low, high); \
        break;
        EVERY_FORMAT(CASE)
#undef CASE
    }
}

// This warp's units of tiles [place.n, end); a tile's sum is left in sums[n - base][warp] when the
// warp has added its units of it.
__device__ __forceinline__ void add_up(const Instruction& step, const Block& block, Place& place, uint32_t base,
                                       uint32_t end, float* sums, uint32_t& starved) {
    const uint32_t units = static_cast<uint32_t>(step.units), warp = thread_index() / 32, lane = thread_index() % 32;
    const uint32_t chunks = (units + UNITS - 1) / UNITS, first = block.task().chunk;
    const uint32_t record_bytes = stage_bytes(static_cast<uint32_t>(step.format[0]));
    const uint32_t columns = unit_columns(static_cast<uint32_t>(step.format[0]));
    float low = 0.f, high = 0.f;  // rows g and g + 8, this lane's share
    while (place.n < end) {
        const uint32_t n = place.n, k = place.k, c = first + n * chunks + k / UNITS;
        uint32_t tile = block.task().begin + n;
        const uint32_t f = step.kind == QKV && matrix_of(step, tile) == 2;
        const uint32_t before = static_cast<uint32_t>(clock64());
        const uint8_t* unit = wait_chunk(c) + k % UNITS * static_cast<uint32_t>(step.unit_bytes[f]);
        starved += static_cast<uint32_t>(clock64()) - before;
        dot_any(static_cast<uint32_t>(step.format[f]), unit, block.records() + k * record_bytes,
                static_cast<int>(lane), k + 1 == units ? static_cast<uint32_t>(step.tail) : columns, low, high);
        release_chunk(c, lane);
        place.advance(units);
        if (place.n != n) {
            low += __shfl_xor_sync(~0u, low, 1);
            high += __shfl_xor_sync(~0u, high, 1);
            low += __shfl_xor_sync(~0u, low, 2);
            high += __shfl_xor_sync(~0u, high, 2);
            const uint32_t t = lane & 3;
            float* row = sums + ((n - base) * WARPS + warp) * ROWS + (lane >> 2);
            if (t == 0) row[0] = low;
            if (t == 1) row[8] = high;
            low = high = 0.f;
        }
    }
}

// y = W x and what follows.
//
// The units of the block's tiles, in order, go to the warps in turn: unit k of tile n is that of warp
// (n · units + k) mod WARPS. A warp adds up its units of a tile and leaves the sum in shared memory.
__device__ __forceinline__ void product(const Instruction& step, Block& block) {
    const Task& run = block.task();
    if (run.begin >= run.end) return;
    const uint32_t units = static_cast<uint32_t>(step.units), warp = thread_index() / 32;
    Finish finish(step, block, run.begin);

    const float squares = stage_any(step, block);
    // Its own half: the step before may still read the other.
    const uint32_t turn = board().turn[warp] ^ 1;
    float* const all_squares = block.squares() + turn * WARPS;
    if (thread_index() % 32 == 0) all_squares[warp] = squares;
    __syncwarp();
    board().turn[warp] = turn;
    const uint32_t tiles = run.end - run.begin;
    uint32_t buffer = board().buffer[warp], starved = 0;
    Place place{0, warp};
    while (place.k >= units) place.k -= units, place.n++;
    sync_workers();
    block.mark(STAGED);

    for (uint32_t base = 0; base < tiles; base += FLUSH) {
        float* sums = block.sums() + buffer * FLUSH * WARPS * ROWS;
        const uint32_t end = min(base + FLUSH, tiles);
        add_up(step, block, place, base, end, sums, starved);
        sync_workers();
        if (base == 0) block.mark(FIRST);
        finish.flush(run.begin + base, end - base, Sums{sums, base * units % WARPS, units}, all_squares);
        buffer ^= 1;
    }
    __syncwarp();
    board().buffer[warp] = buffer;
    if (board().launch.trace != nullptr && threadIdx.x == 0) block.note(STARVED, starved);
    if (step.kind == LM_HEAD) board().best[threadIdx.x] = finish.best;
}

}  // namespace persistent
