// A step that is a matrix-vector product, up to the sums: staging of the activations from mail, and the
// product over the weight stream. What becomes of the sums is in finish.cuh.
#pragma once
#include "../formats/all.cuh"
#include "stream.cuh"

namespace persistent {

// Stages the warp's units of x for `Dot`, BATCH at a time.
template <class Dot, uint32_t BATCH>
__device__ __forceinline__ void stage(const Instruction& step, const Work& w, uint8_t* record) {
    constexpr uint32_t COLUMNS = Dot::UNIT_COLUMNS, EACH = COLUMNS / 32;
    const uint32_t lane = thread_index() % 32, columns = w.columns, staged = w.staged;
    const uint32_t apart = staged >> 8 & 0xffu;
    const Tag tag{staged >> 16 & 0xffu, (1u << (w.code >> CODE_TAG_BITS)) - 1};
    uint32_t unit = thread_index() / 32;
    record += unit * Dot::STAGE_BYTES;
    for (uint32_t left = staged & 0xffu; left > 0; left -= min(left, BATCH)) {
        float v[BATCH][EACH];
        uint32_t there = 0;
        const uint32_t at = unit * COLUMNS + lane * min(EACH, 4u);
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++) {
            const uint32_t first = at + b * apart * COLUMNS;
            there |= (b < left && first < columns ? 1u : 0u) << b;
            if (EACH == 8) there |= (b < left && first + 128 < columns ? 1u : 0u) << (BATCH + b);
        }
        await_all(v, step.x + at, apart * COLUMNS, there, tag);
#pragma unroll
        for (uint32_t b = 0; b < BATCH; b++)
            if (b < left) {
                uint8_t* const to = record + b * apart * Dot::STAGE_BYTES;
                if constexpr (EACH == 8) Dot::template stage<4>(to, v[b], lane);
                else Dot::stage(to, v[b], lane);
            }
        unit += BATCH * apart;
        record += BATCH * apart * Dot::STAGE_BYTES;
    }
}

template <class Dot>
__device__ __forceinline__ void stage_either(const Instruction& step, const Work& w, uint8_t* records) {
    if ((w.staged & 0xffu) <= 1) stage<Dot, 1>(step, w, records);
    else stage<Dot, 2>(step, w, records);
}

__device__ __forceinline__ void stage_any(const Instruction& step, const Work& w, uint32_t code, uint8_t* records) {
    const uint32_t format = code & CODE_FORMAT;
    if (format == 30u << 8) stage_either<gemv::BF16>(step, w, records);
    else if (format == 0u << 8) stage_either<gemv::F32>(step, w, records);
    else if (format == 1u << 8) stage_either<gemv::F16>(step, w, records);
    else stage_either<gemv::IntegerStage>(step, w, records);
}

// Where a warp is on its way through the block's tiles.
struct Way {
    uint32_t n;      // the next tile of its own
    uint32_t chunk;  // of its first unit
    uint32_t known;  // the first chunk that may not have arrived
    uint8_t* sums;   // of tile n and this warp's part
    uint8_t* records;
};

// A warp's part of the sums of rows g and g + 8 of a tile.
__device__ __forceinline__ void keep_sums(float* to, float low, float high, uint32_t lane) {
    const bool odd = lane & 1;
    float sum = odd ? high : low;
    sum += __shfl_xor_sync(~0u, odd ? low : high, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if ((lane & 2) == 0) to[(lane & 1) * 8 + (lane >> 2)] = sum;
}

// One unit of each tile, its activations held in registers; up to tile `end`.
template <class F>
__device__ __forceinline__ void add_up_one(const Work& w, Way& way, uint32_t end) {
    const uint32_t lane = thread_index() % 32, inside = w.inside * F::UNIT_BYTES;
    const uint32_t last = w.first + 1 == w.units ? w.tail & 0xffffu : static_cast<uint32_t>(F::UNIT_COLUMNS);
    const uint32_t apart = w.apart, sums_apart = w.sums_apart, sets = w.sets;
    const typename F::Held x(way.records + w.first * F::STAGE_BYTES, static_cast<int>(lane));
#pragma unroll 1
    do {
        float low = 0.f, high = 0.f;
        F::dot_of(wait_chunk(way.chunk, way.known) + inside, x, static_cast<int>(lane), last, low, high);
        release_chunk(way.chunk, lane);
        keep_sums(reinterpret_cast<float*>(way.sums), low, high, lane);
        way.chunk += apart, way.sums += sums_apart, way.n += sets;
    } while (way.n < end);
}

// Several units of each tile.
template <class F>
__device__ __forceinline__ void add_up_run(const Work& w, Way& way, uint32_t end) {
    const uint32_t lane = thread_index() % 32, each = w.staged >> 24, inverse = w.tail >> 16;
    const uint32_t first = w.first, parts = w.parts, units = w.units, before = Shape::divide(first, inverse);
#pragma unroll 1
    do {
        float low = 0.f, high = 0.f;
#pragma unroll 1
        for (uint32_t k = first; k < units; k += parts) {
            const uint32_t place = Shape::divide(k, inverse), c = way.chunk + place - before;
            const uint8_t* unit = wait_chunk(c, way.known) + (k - place * each) * F::UNIT_BYTES;
            F::dot(unit, way.records + k * F::STAGE_BYTES, static_cast<int>(lane),
                   k + 1 == units ? w.tail & 0xffffu : static_cast<uint32_t>(F::UNIT_COLUMNS), low, high);
            release_chunk(c, lane);
        }
        keep_sums(reinterpret_cast<float*>(way.sums), low, high, lane);
        way.chunk += w.apart, way.sums += w.sums_apart, way.n += w.sets;
    } while (way.n < end);
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
__device__ __forceinline__ void add_up_as(const Work& w, Way& way, uint32_t end) {
    if constexpr (Holds<F>::value) {
        if (w.parts == w.units) return add_up_one<F>(w, way, end);
    }
    add_up_run<F>(w, way, end);
}

// This warp's parts of the tiles up to `end`, of `format`. The usual formats first: a jump by table takes
// longer than a product.
__device__ __forceinline__ void add_up(const Work& w, Way& way, uint32_t format, uint32_t end) {
    if (way.n >= end) return;
    if (format == 12) return add_up_as<gemv::Q4K>(w, way, end);
    if (format == 14) return add_up_as<gemv::Q6K>(w, way, end);
    if (format == 30) return add_up_as<gemv::BF16>(w, way, end);
    switch (format) {
#define CASE(ID, F)                          \
    case ID:                                 \
        add_up_as<gemv::F>(w, way, end);     \
        break;
        OTHER_FORMATS(CASE)
#undef CASE
    }
}

// The sums of W x, of part after part.
__device__ __forceinline__ void product(const Instruction& step, const Work& w) {
    // Read before the input is there; what comes after it is on every step's critical path.
    uint32_t half = w.half, code = w.code, end = min(w.at_once, w.tiles), second = min(w.second, end);
    Way way;
    {
        const Memory memory;
        way = Way{w.n, w.chunk, w.known, reinterpret_cast<uint8_t*>(memory.half(half)) + w.sums, memory.records};
    }
    asm volatile("" : "+r"(code), "+r"(end), "+r"(second));
    note_waiting(true);
    stage_any(step, w, code, way.records);
    note_waiting(false);
    if ((code & CODE_BARRIER) != 0) sync_workers();
    else __syncwarp();
    if ((code & CODE_TRACE) != 0 && thread_index() == 0) note(w.index, STAGED, cycles());
    for (;;) {
        // Tiles of the first format, then those of the second.
#pragma unroll 1
        for (uint32_t format = code & CODE_FORMAT, to = second;; format = (w.code & CODE_SECOND) >> 8, to = end) {
            add_up(w, way, format >> 8, to);
            if (to == end) break;
        }
        sync_sums(half);
        if (end == w.tiles) break;
        const uint32_t base = end;
        end = min(base + w.at_once, w.tiles), second = min(w.second, end);
        half ^= 1;
        way.sums = reinterpret_cast<uint8_t*>(Memory().half(half)) + ((way.n - base) * w.parts + w.first) * PART_BYTES;
    }
}

}  // namespace persistent
