// A step that is a matrix-vector product: staging of the activations from mail, the product over
// the weight stream, and what becomes of the sums.
#pragma once
#include "../epilogues.cuh"
#include "../formats/all.cuh"
#include "stream.cuh"

namespace persistent {

// Sums of parts that are held before they are added up; a tile has half as many, at most.
constexpr uint32_t SLOTS = 128;

// The formats by their GGML type ids.
#define OTHER_FORMATS(X)                                                                           \
    X(0, f32) X(1, f16) X(2, q4_0) X(3, q4_1) X(6, q5_0) X(7, q5_1) X(8, q8_0) X(10, q2_k)         \
        X(11, q3_k) X(13, q5_k) X(20, iq4_nl) X(23, iq4_xs) X(39, mxfp4)
#define EVERY_FORMAT(X) X(12, q4_k) X(14, q6_k) X(30, bf16) OTHER_FORMATS(X)

// Where a warp stands, between the steps. All else is found anew in each step: kept in registers
// over all of them it would displace what the products need.
struct Block {

    // The current step, counted from the first. From shared memory: in a register it would be spilled.
    __device__ __forceinline__ uint32_t step() const { return *static_cast<volatile uint32_t*>(board().step + thread_index() / 32); }
    __device__ __forceinline__ const Task& task() const { return board().tasks[step() % ROWS_AHEAD]; }
    // Staged activations; scratch of the attention.
    __device__ __forceinline__ uint8_t* records() const { return ring() + CHUNKS * board().launch.chunk_bytes; }
    // [2][SLOTS][ROWS]
    __device__ __forceinline__ float* sums() const {
        return reinterpret_cast<float*>(records() + board().launch.record_bytes);
    }
    // [2][WARPS]
    __device__ __forceinline__ float* squares() const { return sums() + 2 * SLOTS * ROWS; }

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
// Points of a step: it begins, its inputs are staged, its first flush is summed, it ends; then its
// times in nanoseconds, modulo 2^32.
enum Point { BEGIN = 0, STAGED = 1, FIRST = 2, END = 4, BEGIN_NS = 6, END_NS = 7 };

__device__ __forceinline__ void Block::begin() const {
    if (board().launch.trace == nullptr || threadIdx.x != 0) return;
    const uint32_t now = static_cast<uint32_t>(clock64());
    note(BEGIN, now);
    note(STAGED, now);  // until there is work
    note(BEGIN_NS, static_cast<uint32_t>(global_nanoseconds()));
}
__device__ __forceinline__ void Block::end() const {
    if (board().launch.trace == nullptr || threadIdx.x != 0) return;
    note(END, static_cast<uint32_t>(clock64()));
    note(END_NS, static_cast<uint32_t>(global_nanoseconds()));
}

// Stages x (times the gain) for `Dot`, units from the last warp on, as parts are shared out; returns
// this warp's sum of squares.
template <class Dot, bool GAIN, int BATCH>
__device__ __forceinline__ float stage(const Instruction& step, const Block& block) {
    constexpr int COLUMNS = Dot::UNIT_COLUMNS, EACH = COLUMNS / 32;
    const uint32_t warp = WARPS - 1 - thread_index() / 32, lane = thread_index() % 32;
    const uint32_t columns = static_cast<uint32_t>(step.columns), units = units_of(step);
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
        const uint32_t n = unit + 1 == units_of(step) ? static_cast<uint32_t>(step.tail) : unit_length;
        const float v = __fmul_rn(value_any(format, p, token % ROWS, i % unit_length, n), as_float(step.magnitude));
        step.y[i] = v;
        post(step.y_mail, i, v, tag);
    }
}

// The partial sums of a flush.
struct Sums {
    const float* partial;  // [tiles][parts][ROWS]
    uint32_t parts;

    // Rows `row` .. of tile `n`, one or two: their parts in order, added as a tree.
    template <class T>
    __device__ __forceinline__ T total(uint32_t n, uint32_t row) const {
        const float* p = partial + n * parts * ROWS + row;
        T sum = zero(T());
        for (uint32_t first = 0; first < parts; first += 16) {
            auto part = [&](uint32_t q) {
                return first + q < parts ? *reinterpret_cast<const T*>(p + (first + q) * ROWS) : zero(T());
            };
            T s[4];
#pragma unroll
            for (int q = 0; q < 4; q++) s[q] = add(add(part(q), part(q + 4)), add(part(q + 8), part(q + 12)));
            sum = add(sum, add(add(s[0], s[1]), add(s[2], s[3])));
        }
        return sum;
    }
    static __device__ __forceinline__ float zero(float) { return 0.f; }
    static __device__ __forceinline__ float2 zero(float2) { return make_float2(0.f, 0.f); }
    static __device__ __forceinline__ float add(float a, float b) { return a + b; }
    static __device__ __forceinline__ float2 add(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
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
            first = carried(begin * ROWS + i);
        } else if (step.kind == QKV) {
            const Where w = where(begin * ROWS + 2 * i);
            if (w.inside) first = turn(w);
        }
    }

    __device__ __forceinline__ Prefetched carried(uint32_t r) const {
        Prefetched p{0.f, 0.f};
        if (r >= step.rows[0]) return p;
        if (step.residual != nullptr) p.a = __ldcg(step.residual + r);
        if (step.bias[0] != nullptr) p.b = __ldg(step.bias[0] + r);
        return p;
    }

    // 1 / rms of the input; 1 without a norm.
    __device__ __forceinline__ float scale(const float* squares) const {
        if (step.gain == nullptr) return 1.f;
        const float4* s = reinterpret_cast<const float4*>(squares);
        float4 a = s[0];
#pragma unroll
        for (int w = 1; w < WARPS / 4; w++) a.x += s[w].x, a.y += s[w].y, a.z += s[w].z, a.w += s[w].w;
        return rsqrtf(fmaf((a.x + a.y) + (a.z + a.w), __frcp_rn(static_cast<float>(step.columns)), as_float(step.eps)));
    }

    struct Where {
        uint32_t matrix, base, e0, e1, pair;
        bool inside, rotates;
    };
    __device__ __forceinline__ Where where(uint32_t at) const {
        Where w;
        uint32_t tile = at / ROWS;
        w.matrix = matrix_of(step, tile);
        const uint32_t r = tile * ROWS + at % ROWS;
        w.inside = r < static_cast<uint32_t>(step.rows[w.matrix != 0]);
        // A head's size is a power of two.
        const uint32_t e = r & (static_cast<uint32_t>(step.head_dim) - 1), half = static_cast<uint32_t>(step.half_rotary);
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
        // w.base is the head's number times its size.
        const uint64_t at = static_cast<uint64_t>(w.base) * static_cast<uint32_t>(step.capacity) + board().position * head_dim + e;
        const __half h = __float2half_rn(v);
        post(w.matrix == 2 ? step.v_mail : step.k_mail, w.base + e, __half2float(h), tag);
        static_cast<__half*>(w.matrix == 2 ? step.values : step.keys)[at] = h;
    }

    // The whole block, for `count` tiles from `base` on.
    __device__ __forceinline__ void flush(uint32_t base, uint32_t count, const Sums& sums, float scale) {
        const uint32_t i = threadIdx.x;
        if (step.kind == QKV) {
            if (i >= count * (ROWS / 2)) return;
            const uint32_t at = base * ROWS + 2 * i;
            const Where w = where(at);
            if (!w.inside) return;
            const Prefetched t = base == begin ? first : turn(w);
            const float2 ab = sums.total<float2>(i / (ROWS / 2), at % ROWS);
            float a = ab.x * scale, b = ab.y * scale;
            const float* bias = step.bias[w.matrix];
            if (bias != nullptr) a += __ldg(bias + w.base + w.e0), b += __ldg(bias + w.base + w.e1);
            if (w.rotates) {
                const float x = a;
                a = x * t.a - b * t.b;
                b = x * t.b + b * t.a;
            }
            if (w.matrix == 0) {
                post(step.y_mail, w.base + w.e0, a, tag);
                post(step.y_mail, w.base + w.e1, b, tag);
                step.y[w.base + w.e0] = a;
                step.y[w.base + w.e1] = b;
            } else {
                append(w, w.e0, a);
                append(w, w.e1, b);
            }
        } else if (step.kind == GATE_UP) {
            const uint32_t pair = i / ROWS, r = (base / 2 + pair) * ROWS + i % ROWS;
            if (i >= count / 2 * ROWS || r >= step.rows[0]) return;
            float g = sums.total<float>(2 * pair, i % ROWS) * scale;
            float u = sums.total<float>(2 * pair + 1, i % ROWS) * scale;
            if (step.bias[0] != nullptr) g += __ldg(step.bias[0] + r);
            if (step.bias[1] != nullptr) u += __ldg(step.bias[1] + r);
            const float v = __fdividef(g, 1.f + expf(-g)) * u;
            post(step.y_mail, r, v, tag);
            step.y[r] = v;
        } else {
            const uint32_t r = base * ROWS + i;
            if (i >= count * ROWS || r >= step.rows[0]) return;
            const Prefetched p = step.kind == PROJECT && base == begin ? first : carried(r);
            const float v = sums.total<float>(i / ROWS, i % ROWS) * scale + p.b + p.a;
            if (step.kind == PROJECT) post(step.y_mail, r, v, tag);
            else best = consider(best, v, r);
            step.y[r] = v;
        }
    }
};

// `count` units from unit k of a chunk on, the last of `last` columns; their records follow each other.
template <class F>
__device__ __forceinline__ void dot_units(const uint8_t* chunk, const uint8_t* records, uint32_t k, uint32_t count,
                                          uint32_t last, int lane, float& low, float& high) {
    const uint8_t* unit = chunk + k * F::UNIT_BYTES;
    const uint8_t* record = records;
#pragma unroll 1
    for (uint32_t i = 1; i < count; i++) {
        F::dot(unit, record, lane, F::UNIT_COLUMNS, low, high);
        unit += F::UNIT_BYTES;
        record += F::STAGE_BYTES;
    }
    F::dot(unit, record, lane, last, low, high);
}

// The usual formats first: a jump by table takes longer than a product.
__device__ __forceinline__ void dot_any(uint32_t format, const uint8_t* chunk, const uint8_t* records, uint32_t k,
                                        uint32_t count, uint32_t last, int lane, float& low, float& high) {
    if (format == 12) return dot_units<gemv::Q4K>(chunk, records, k, count, last, lane, low, high);
    if (format == 14) return dot_units<gemv::Q6K>(chunk, records, k, count, last, lane, low, high);
    if (format == 30) return dot_units<gemv::BF16>(chunk, records, k, count, last, lane, low, high);
    switch (format) {
#define CASE(ID, F)                                                                 \
    case ID:                                                                        \
        dot_units<gemv::F>(chunk, records, k, count, last, lane, low, high);        \
        break;
        OTHER_FORMATS(CASE)
#undef CASE
    }
}

// A warp's way through the parts of the block's tiles: now part `j` of tile `n`, counted from the first.
struct Walk {
    Shape shape;
    uint32_t chunks, chunk;  // of a tile; the first
    uint32_t second;         // from this tile on the matrix is one of the second format
    uint32_t n, j;

    __device__ __forceinline__ Walk(const Instruction& step, const Task& task, uint32_t warp) : shape(step.units) {
        chunks = (shape.units + (1u << shape.shift) - 1) >> shape.shift;
        chunk = task.chunk;
        second = 0x7fffffffu;
        if (step.kind == QKV) second = static_cast<uint32_t>(step.tiles[0]) + static_cast<uint32_t>(step.tiles[1]) - task.begin;
        n = warp * shape.inverse >> 12;
        j = warp - n * shape.parts;
    }
    __device__ __forceinline__ void advance() {
        const uint32_t more = WARPS * shape.inverse >> 12;
        n += more;
        j += WARPS - more * shape.parts;
        if (j >= shape.parts) j -= shape.parts, n++;
    }
};

// This warp's parts of tiles [base, end); their sums are left in sums[n - base][j].
__device__ __forceinline__ void add_up(const Instruction& step, const Block& block, Walk& walk, uint32_t base,
                                       uint32_t end, float* sums) {
    const int lane = static_cast<int>(thread_index() % 32);
    const Shape& shape = walk.shape;
    const uint32_t record_bytes = stage_bytes(static_cast<uint32_t>(step.format[0]));
    while (walk.n < end) {
        const uint32_t k = walk.j * shape.span, count = min(shape.span, shape.units - k);
        const uint32_t c = walk.chunk + walk.n * walk.chunks + (k >> shape.shift);
        const uint32_t format =
            static_cast<uint32_t>(step.format[static_cast<int32_t>(walk.n) >= static_cast<int32_t>(walk.second)]);
        const uint32_t last = k + count == shape.units ? static_cast<uint32_t>(step.tail) : 256u;
        float low = 0.f, high = 0.f;  // rows g and g + 8, this lane's share
        dot_any(format, wait_chunk(c), block.records() + k * record_bytes, k & ((1u << shape.shift) - 1), count, last,
                lane, low, high);
        release_chunk(c, count, shape.shift, lane);
        low += __shfl_xor_sync(~0u, low, 1);
        high += __shfl_xor_sync(~0u, high, 1);
        low += __shfl_xor_sync(~0u, low, 2);
        high += __shfl_xor_sync(~0u, high, 2);
        float* row = sums + ((walk.n - base) * shape.parts + walk.j) * ROWS + (lane >> 2);
        if ((lane & 3) == 0) row[0] = low;
        if ((lane & 3) == 1) row[8] = high;
        walk.advance();
    }
}

// y = W x and what follows.
//
// A tile's units are shared out in parts of `span` units; the parts of the block's tiles, in order, go
// to the warps in turn: part j of tile n is that of warp (n · parts + j) mod WARPS.
__device__ __forceinline__ void product(const Instruction& step, Block& block) {
    const Task& run = block.task();
    if (run.begin >= run.end) return;
    const uint32_t warp = thread_index() / 32, tiles = run.end - run.begin;
    // Parts go to the warps from the last one on: where there are few, the first ones, which flush,
    // have none and prepare meanwhile.
    Walk walk(step, run, WARPS - 1 - warp);
    Finish finish(step, block, run.begin);

    const float squares = stage_any(step, block);
    // Its own half: the step before may still read the other.
    const uint32_t turn = board().turn[warp] ^ 1;
    float* const all_squares = block.squares() + turn * WARPS;
    if (thread_index() % 32 == 0) all_squares[warp] = squares;
    __syncwarp();
    board().turn[warp] = turn;
    uint32_t buffer = board().buffer[warp];
    sync_workers();
    block.mark(STAGED);

    const uint32_t at_once = walk.shape.at_once;
    for (uint32_t base = 0; base < tiles; base += at_once) {
        float* sums = block.sums() + buffer * SLOTS * ROWS;
        const uint32_t end = min(base + at_once, tiles);
        add_up(step, block, walk, base, end, sums);
        const float scale = 32 * warp < (end - base) * ROWS ? finish.scale(all_squares) : 0.f;
        sync_workers();
        if (base == 0) block.mark(FIRST);
        finish.flush(run.begin + base, end - base, Sums{sums, walk.shape.parts}, scale);
        buffer ^= 1;
    }
    __syncwarp();
    board().buffer[warp] = buffer;
    if (step.kind == LM_HEAD) board().best[threadIdx.x] = finish.best;
}

}  // namespace persistent
