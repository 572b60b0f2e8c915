// A step that is a matrix-vector product: staging of the activations from mail, the product over
// the weight stream, and what becomes of the sums.
#pragma once
#include "../epilogues.cuh"
#include "../formats/all.cuh"
#include "stream.cuh"

namespace persistent {

// Sums of parts that are held before they are added up.
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
        if (board().launch.trace != nullptr && thread_index() == 0) note(point, static_cast<uint32_t>(clock64()));
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
    if (board().launch.trace == nullptr || thread_index() != 0) return;
    const uint32_t now = static_cast<uint32_t>(clock64());
    note(BEGIN, now);
    note(STAGED, now);  // until there is work
    note(BEGIN_NS, static_cast<uint32_t>(global_nanoseconds()));
}
__device__ __forceinline__ void Block::end() const {
    if (board().launch.trace == nullptr || thread_index() != 0) return;
    note(END, static_cast<uint32_t>(clock64()));
    note(END_NS, static_cast<uint32_t>(global_nanoseconds()));
}

// Units of x that a warp stages: from `first` on, `stride` apart.
struct Staged {
    uint32_t first, end, stride;
};

// Stages x (times the gain) for `Dot`; returns this warp's sum of squares.
template <class Dot, bool GAIN, int BATCH>
__device__ __forceinline__ float stage(const Instruction& step, const Block& block, const Staged& mine) {
    constexpr uint32_t COLUMNS = Dot::UNIT_COLUMNS, EACH = COLUMNS / 32;
    const uint32_t lane = thread_index() % 32, columns = static_cast<uint32_t>(step.columns);
    const uint32_t tag = tag_of(step.x_tag, board().epoch);
    const float* gain = step.gain;
    float squares = 0.f;
    for (uint32_t first = mine.first; first < mine.end; first += BATCH * mine.stride) {
        float g[BATCH][EACH], v[BATCH][EACH];
        if (GAIN) {
            // Constant, but perhaps far away: asked for before the wait.
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                gemv::Stager<Dot, 1, 1>::load_gain(g[b], gain, columns, first + b * mine.stride, lane);
        }
        uint32_t there = 0;
        const uint32_t at = first * COLUMNS + lane * EACH;
#pragma unroll
        for (int b = 0; b < BATCH; b++)
            there |= (at + b * mine.stride * COLUMNS < columns ? 1u : 0u) << b;
        await_all(v, step.x + at, mine.stride * COLUMNS, there, tag);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            if (first + b * mine.stride >= mine.end) continue;
            if (GAIN) {
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    squares = fmaf(v[b][j], v[b][j], squares);
                    v[b][j] *= g[b][j];
                }
            }
            Dot::stage(block.records() + (first + b * mine.stride) * Dot::STAGE_BYTES, v[b], lane);
        }
    }
    return GAIN ? warp_sum(squares) : 0.f;
}

template <class Dot>
__device__ __forceinline__ float stage_either(const Instruction& step, const Block& block, const Staged& mine) {
    return step.gain != nullptr ? stage<Dot, true, 1>(step, block, mine)
                                : stage<Dot, false, 2>(step, block, mine);
}

__device__ __forceinline__ float stage_any(const Instruction& step, const Block& block, const Staged& mine) {
    switch (step.format[0]) {
        case 0: return stage_either<gemv::F32>(step, block, mine);
        case 1: return stage_either<gemv::F16>(step, block, mine);
        case 30: return stage_either<gemv::BF16>(step, block, mine);
        default: return stage_either<gemv::IntegerStage>(step, block, mine);
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
    for (uint32_t i = begin + thread_index(); i < end; i += THREADS) {
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
        auto part = [&](uint32_t q) { return q < parts ? *reinterpret_cast<const T*>(p + q * ROWS) : zero(T()); };
        T s[4];
#pragma unroll
        for (int q = 0; q < 4; q++) s[q] = add(add(part(q), part(q + 4)), add(part(q + 8), part(q + 12)));
        return add(add(s[0], s[1]), add(s[2], s[3]));
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
        const uint32_t i = thread_index();
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
        const uint32_t i = thread_index();
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

// Where a warp stands in a step's product: units `first`, first + parts, … of tiles n ≡ set mod sets.
// Neighbours have neighbouring units: they arrive together.
struct Place {
    uint32_t set, first;

    __device__ __forceinline__ Place(const Shape& shape, uint32_t warp) : set(0), first(warp) {
        while (first >= shape.parts) first -= shape.parts, set++;
    }
};

// A warp's way through a batch of the block's tiles: it is at n, goes on by the number of sets.
struct Batch {
    uint32_t n, end;
    uint32_t chunk;  // the block's first
    uint32_t known;  // the first chunk that may not have arrived
    const uint8_t* records;
    float* sums;  // of tile 0 and this warp's part
};

// A warp's part of the sums of rows g and g + 8 of a tile.
__device__ __forceinline__ void keep_sums(float* to, float low, float high, uint32_t lane) {
    const bool odd = lane & 1;
    float sum = odd ? high : low;
    sum += __shfl_xor_sync(~0u, odd ? low : high, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if ((lane & 2) == 0) to[(lane & 1) * 8 + (lane >> 2)] = sum;
}

template <class F>
__device__ __forceinline__ void add_up_one(const Shape& shape, const Place& place, Batch& batch, uint32_t tail) {
    const uint32_t last = place.first + 1 == shape.units ? tail : static_cast<uint32_t>(F::UNIT_COLUMNS);
    const uint32_t lane = thread_index() % 32, chunks = (shape.units + (1u << shape.shift) - 1) >> shape.shift;
    const typename F::Held x(batch.records + place.first * F::STAGE_BYTES, static_cast<int>(lane));
    const uint32_t inside = (place.first & ((1u << shape.shift) - 1)) * F::UNIT_BYTES;
    uint32_t c = batch.chunk + batch.n * chunks + (place.first >> shape.shift);
    float* to = batch.sums + batch.n * shape.parts * ROWS;
#pragma unroll 1
    for (; batch.n < batch.end; batch.n += shape.sets) {
        float low = 0.f, high = 0.f;
        F::dot_of(wait_chunk(c, batch.known) + inside, x, static_cast<int>(lane), last, low, high);
        release_chunk(c, 1, shape.shift, lane);
        keep_sums(to, low, high, lane);
        c += shape.sets * chunks;
        to += shape.sets * shape.parts * ROWS;
    }
}

template <class F>
__device__ __forceinline__ void add_up_run(const Shape& shape, const Place& place, Batch& batch, uint32_t tail) {
    const int lane = static_cast<int>(thread_index() % 32);
    const uint32_t inside = (1u << shape.shift) - 1, chunks = (shape.units + inside) >> shape.shift;
#pragma unroll 1
    for (; batch.n < batch.end; batch.n += shape.sets) {
        float low = 0.f, high = 0.f;
#pragma unroll 1
        for (uint32_t k = place.first; k < shape.units; k += shape.parts) {
            const uint32_t c = batch.chunk + batch.n * chunks + (k >> shape.shift);
            const uint8_t* unit = wait_chunk(c, batch.known) + (k & inside) * F::UNIT_BYTES;
            F::dot(unit, batch.records + k * F::STAGE_BYTES, lane,
                   k + 1 == shape.units ? tail : static_cast<uint32_t>(F::UNIT_COLUMNS), low, high);
            release_chunk(c, 1, shape.shift, lane);
        }
        keep_sums(batch.sums + batch.n * shape.parts * ROWS, low, high, static_cast<uint32_t>(lane));
    }
}

// Whether a format's product takes activations that are held in registers.
template <class...>
using Void = void;
template <class F, class = void>
struct Holds {
    static constexpr bool value = false;
};
template <class F>
struct Holds<F, Void<typename F::Held>> {
    static constexpr bool value = true;
};

template <class F>
__device__ __forceinline__ void add_up_as(const Shape& shape, const Place& place, Batch& batch, uint32_t tail) {
    if constexpr (Holds<F>::value) {
        if (shape.parts == shape.units) return add_up_one<F>(shape, place, batch, tail);
    }
    add_up_run<F>(shape, place, batch, tail);
}

// This warp's parts of a batch of tiles. The usual formats first: a jump by table takes longer than a
// product.
__device__ __forceinline__ void add_up(const Instruction& step, uint32_t which, const Place& place, Batch& batch) {
    if (batch.n >= batch.end) return;
    // Read anew for each batch: nothing of it is kept in registers meanwhile.
    const Shape shape(step.units);
    const uint32_t format = static_cast<uint32_t>(step.format[which]), tail = static_cast<uint32_t>(step.tail);
    if (format == 12) return add_up_as<gemv::Q4K>(shape, place, batch, tail);
    if (format == 14) return add_up_as<gemv::Q6K>(shape, place, batch, tail);
    if (format == 30) return add_up_as<gemv::BF16>(shape, place, batch, tail);
    switch (format) {
#define CASE(ID, F)                                              \
    case ID:                                                     \
        add_up_as<gemv::F>(shape, place, batch, tail);           \
        break;
        OTHER_FORMATS(CASE)
#undef CASE
    }
}

// y = W x and what follows.
//
// The warps are in sets of `parts`; each set has every `sets`-th of the block's tiles, and of them a
// warp always the same units. Where there is one set a warp stages what it multiplies and need not
// wait for the others.
__device__ __forceinline__ void product(const Instruction& step, Block& block) {
    const Task& run = block.task();
    if (run.begin >= run.end) return;
    const uint32_t warp = thread_index() / 32, tiles = run.end - run.begin;
    const Shape shape(step.units);
    // From the last warp on: where there are few parts, the first warps, which flush, have none and
    // prepare meanwhile.
    const Place place(shape, WARPS - 1 - warp);
    const bool works = place.set < shape.sets, own = shape.sets == 1;
    Finish finish(step, block, run.begin);

    const uint32_t stride = own ? shape.parts : WARPS, first = WARPS - 1 - warp;
    const float squares = stage_any(step, block, Staged{first, works || !own ? shape.units : 0, stride});
    // Its own half: the step before may still read the other.
    const uint32_t turn = board().turn[warp] ^ 1;
    float* const all_squares = block.squares() + turn * WARPS;
    if (thread_index() % 32 == 0) all_squares[warp] = squares;
    __syncwarp();
    board().turn[warp] = turn;
    uint32_t buffer = board().buffer[warp];
    if (!own) sync_workers();
    block.mark(STAGED);

    Batch batch{place.set, 0, run.chunk, run.chunk, block.records(), nullptr};
    for (uint32_t base = 0; base < tiles;) {
        const uint32_t end = min(base + Shape(step.units).at_once, tiles);
        float* const sums = block.sums() + buffer * SLOTS * ROWS;
        batch.sums = sums + (place.first - base * Shape(step.units).parts) * ROWS;
        // From this tile on the matrix is one of the second format.
        uint32_t second = end;
        if (step.kind == QKV) {
            const uint32_t before = static_cast<uint32_t>(step.tiles[0]) + static_cast<uint32_t>(step.tiles[1]);
            second = min(end, before - min(before, run.begin));
        }
        batch.end = works ? second : 0;
        add_up(step, 0, place, batch);
        if (second < end) {
            batch.end = works ? end : 0;
            add_up(step, 1, place, batch);
        }
        sync_workers();
        if (base == 0) block.mark(FIRST);
        const float scale = 32 * warp < (end - base) * ROWS ? finish.scale(all_squares) : 0.f;
        finish.flush(run.begin + base, end - base, Sums{sums, Shape(step.units).parts}, scale);
        buffer ^= 1;
        base = end;
    }
    __syncwarp();
    board().buffer[warp] = buffer;
    if (step.kind == LM_HEAD) board().best[thread_index()] = finish.best;
}

}  // namespace persistent
