// Who does what in a step: found by one warp ahead of all others, lane w for the warp that multiplies of
// that number, and left for them in shared memory.
#pragma once
#include "board.cuh"

namespace persistent {

// The part of an attention step that a block has: a key/value head and a range of groups of
// `items` positions before this one.
struct Share {
    uint32_t splits, head, split, begin, end;
};

// A block has at least so many bytes of keys, as far as blocks go: fewer would cost more in joining the
// splits than the rows of the cache take a block that has its share of the weights besides.
constexpr uint32_t LEAST_BYTES = 16384;

__device__ __forceinline__ Share share_of(const Instruction& step, uint32_t position) {
    const uint32_t positions = static_cast<uint32_t>(step.items), heads = static_cast<uint32_t>(step.kv_heads);
    const uint32_t groups = (position + positions - 1) / positions;
    Share s;
    s.splits = max(1u, min(gridDim.x / heads, groups * positions * 2 * static_cast<uint32_t>(step.head_dim) / LEAST_BYTES));
    s.split = blockIdx.x / heads;
    s.head = blockIdx.x % heads;
    s.begin = s.end = 0;
    if (s.split < s.splits) {
        s.begin = groups * s.split / s.splits;
        s.end = groups * (s.split + 1) / s.splits;
    }
    return s;
}

// The n-th item of this block, of a step's that are shared out like cards: all blocks do the first part of them
// at the same time, so that it is complete long before the last post, and whoever reads it need not wait. The last
// blocks come first: what is left over is not for those who attend.
__device__ __forceinline__ uint32_t item_of(uint32_t n) { return gridDim.x - 1 - blockIdx.x + n * gridDim.x; }
// How many of `items` it has.
__device__ __forceinline__ uint32_t count_of(uint32_t items) { return (items + blockIdx.x) / gridDim.x; }

__device__ __forceinline__ Task task_of(const Instruction& step, uint32_t position, uint32_t chunk) {
    if (step.kind == ATTENTION) {
        const Share s = share_of(step, position);
        return Task{chunk, s.begin, s.end, s.head, s.split, s.splits};
    }
    return Task{chunk, 0, count_of(static_cast<uint32_t>(step.items)) * (step.kind == GATE_UP ? 2 : 1), 0, 0, 0};
}

// Behind every tile: of a warp that has none.
constexpr uint32_t NO_TILE = 0x7fffffffu;

// The work of warp `warp` in a product.
//
// The warps are in sets of `parts`; each set has every `sets`-th of the block's tiles, and of them a
// warp always the same units. Where there is one set a warp stages what it multiplies and need not
// wait for the others.
__device__ __forceinline__ Work work_of(const Instruction& step, const Task& task, uint32_t epoch, uint32_t half, uint32_t warp) {
    const Shape shape(step.units);
    const uint32_t kind = static_cast<uint32_t>(step.kind);
    Work w;
    w.code = kind | static_cast<uint32_t>(step.format[0]) << 8 | static_cast<uint32_t>(step.format[1]) << 16;
    const bool works = kind == ATTENTION ? task.split < task.splits : kind != EMBED && task.begin < task.end;
    if (works) w.code |= CODE_WORK;
    const bool own = shape.sets == 1;
    if (!own) w.code |= CODE_BARRIER;
    // Neighbours have neighbouring units: they arrive together.
    uint32_t set = 0, first = warp;
    while (shape.parts != 0 && first >= shape.parts) first -= shape.parts, set++;
    const bool multiplies = set < shape.sets;
    const uint32_t apart = own ? shape.parts : WARPS;
    const uint32_t count = shape.units > warp && (multiplies || !own) && apart != 0 ? (shape.units - warp - 1) / apart + 1 : 0;
    const Tag tag = tag_of(step.x_tag, epoch);
    w.staged = count | apart << 8 | tag.value << 16 | shape.each << 24;
    w.code |= (32 - __clz(tag.mask)) << CODE_TAG_BITS;
    w.columns = static_cast<uint32_t>(step.columns), w.known = task.chunk;
    w.n = multiplies ? set : NO_TILE, w.tiles = w.second = task.end - task.begin;
    if (kind == QKV) {
        const uint32_t before = static_cast<uint32_t>(step.tiles[0]) + static_cast<uint32_t>(step.tiles[1]);
        w.second = count_of(before);
    }
    w.at_once = shape.at_once;
    const uint32_t chunks = shape.chunks(shape.units), place = Shape::divide(first, shape.inverse);
    const uint32_t tail = static_cast<uint32_t>(step.tail);
    w.chunk = task.chunk + set * chunks + place, w.apart = shape.sets * chunks;
    w.inside = first - place * shape.each, w.sets = shape.sets;
    w.sums = (set * shape.parts + first) * PART_BYTES, w.sums_apart = shape.sets * shape.parts * PART_BYTES;
    w.first = first, w.parts = shape.parts, w.units = shape.units, w.tail = tail | shape.inverse << 16;
    w.half = half;
    return w;
}

// Chunks that a block's part of a step comes in.
__device__ __forceinline__ uint32_t chunks_of(const Instruction& step, const Task& task) {
    if (step.kind == EMBED) return 0;
    const Shape shape(step.units);
    const uint32_t count = task.end - task.begin;
    return step.kind == ATTENTION ? 2 * shape.chunks(count) : count * shape.chunks(shape.units);
}

// How often the sums of a block's part of a step are complete: each time they go to the other half.
__device__ __forceinline__ uint32_t batches_of(const Instruction& step, const Task& task) {
    if (step.kind == EMBED || step.kind == ATTENTION) return 0;
    const uint32_t at_once = Shape(step.units).at_once;
    return (task.end - task.begin + at_once - 1) / at_once;
}

// Steps [first, last), one after the other; all lanes of the warp.
__device__ __forceinline__ void plan(Board& board, const Instruction* program, uint32_t first, uint32_t last,
                                     uint32_t position) {
    const uint32_t lane = thread_index() % 32;
    constexpr uint32_t WORDS = sizeof(Instruction) / 16;
    auto load = [&](uint32_t i) {
        const uint4* row = reinterpret_cast<const uint4*>(program + first + i);
        return lane < WORDS && first + i < last ? __ldg(row + lane) : make_uint4(0, 0, 0, 0);
    };
    uint4 next = load(0);
    uint32_t chunk = 0, half = 0;
    for (uint32_t i = 0; first + i < last; i++) {
        const uint32_t r = i % ROWS_AHEAD, lap = i / ROWS_AHEAD;
        if (lap > 0) barrier_wait(gemv::shared_address(board.row_empty + r), (lap - 1) & 1);
        const Instruction& step = board.rows[r];
        if (lane < WORDS) reinterpret_cast<uint4*>(board.rows + r)[lane] = next;
        next = load(i + 1);
        __syncwarp();
        const Task task = task_of(step, position, chunk);
        if (lane == 0) board.tasks[r] = task;
        if (lane < WARPS) {
            Work w = work_of(step, task, board.epoch, half, lane);
            if (board.launch.trace != nullptr) w.code |= CODE_TRACE;
            if (first + i + 1 == last) w.code |= CODE_LAST;
            w.index = i;
            board.work[r][lane] = w;
        }
        half = (half + batches_of(step, task)) & 1;
        chunk += chunks_of(step, task);
        barrier_arrive(gemv::shared_address(board.row_full + r), 1);
    }
}

// Which matrix tile v of a block's is of, and which tile of it.
__device__ __forceinline__ uint32_t matrix_of(const Instruction& step, uint32_t& v) {
    if (step.kind == GATE_UP) {
        const uint32_t m = v & 1;
        v = item_of(v >> 1);
        return m;
    }
    v = item_of(v);
    const uint32_t t0 = static_cast<uint32_t>(step.tiles[0]), t1 = static_cast<uint32_t>(step.tiles[1]);
    if (v < t0) return 0;
    v -= t0;
    if (v < t1) return 1;
    v -= t1;
    return 2;
}

}  // namespace persistent
