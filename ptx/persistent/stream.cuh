// The weight stream of a block: one thread asks for everything that the block will use, in the order
// of use and over the boundaries of steps, by bulk copies into a ring in shared memory. Weights and
// earlier cache rows are constant during a token, so the stream runs ahead of all dependencies as
// far as the ring reaches.
//
//   chunk   up to a power of two of units of one tile, or of keys or of values
//   ring    CHUNKS places for chunks; one is overwritten when every unit in it has been released
//   rows    the instructions themselves, ROWS_AHEAD at most
#pragma once
#include "../gemv.cuh"
#include "program.cuh"

namespace persistent {

using gemv::ROWS;
using gemv::WARPS;

constexpr uint32_t THREADS = WARPS * 32;  // that compute; one warp more asks
constexpr uint32_t UNITS = 8;    // of a chunk, at most
constexpr uint32_t CHUNKS = 16;  // in the ring: a power of two
constexpr uint32_t FLIGHT = 6;   // on their way, at most
constexpr uint32_t ROWS_AHEAD = 16;
constexpr uint32_t BOARD_BYTES = 12288;  // at the start of shared memory; the ring follows

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

// The tiles of a block: an equal, contiguous run of a step's items.
struct Run {
    uint32_t begin, end;
};
__device__ __forceinline__ Run run_of(const Instruction& step) {
    const uint32_t items = static_cast<uint32_t>(step.items), each = step.kind == GATE_UP ? 2 : 1;
    return Run{items * blockIdx.x / gridDim.x * each, items * (blockIdx.x + 1) / gridDim.x * each};
}

// What a block has to do in a step: found once, by the thread that asks.
struct Task {
    uint32_t chunk;       // the first
    uint32_t begin, end;  // tiles, or groups of positions
    uint32_t head, split, splits;
};

__device__ __forceinline__ Task task_of(const Instruction& step, uint32_t position, uint32_t chunk) {
    if (step.kind == ATTENTION) {
        const Share s = share_of(step, position);
        return Task{chunk, s.begin, s.end, s.head, s.split, s.splits};
    }
    const Run run = run_of(step);
    return Task{chunk, run.begin, run.end, 0, 0, 0};
}

// What a launch is given.
struct Parameters {
    StepState* state;
    const Instruction* program;
    uint32_t first, last, steps;  // [first, last) of `steps` are done
    uint32_t chunk_bytes, record_bytes;
    uint32_t* trace;  // [steps][gridDim.x][8] readings of the clock, or null
};

// Which matrix tile v of a step is of, and which tile of it.
__device__ __forceinline__ uint32_t matrix_of(const Instruction& step, uint32_t& v) {
    if (step.kind == GATE_UP) {
        const uint32_t m = v & 1;
        v >>= 1;
        return m;
    }
    const uint32_t t0 = static_cast<uint32_t>(step.tiles[0]), t1 = static_cast<uint32_t>(step.tiles[1]);
    if (v < t0) return 0;
    v -= t0;
    if (v < t1) return 1;
    v -= t1;
    return 2;
}

// --- Barriers in shared memory, by shared address -------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t at, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at, uint32_t count) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (!done);
}
// Copies `bytes` and completes `barrier` with them.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
            to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
        : "memory");
}

// The threads that compute.
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

// --- Shared memory --------------------------------------------------------------------------------

// At the start of the block's dynamic shared memory; the ring follows.
struct alignas(128) Board {
    Instruction rows[ROWS_AHEAD];
    uint64_t row_loaded[ROWS_AHEAD], row_full[ROWS_AHEAD], row_empty[ROWS_AHEAD];
    uint64_t full[CHUNKS], empty[CHUNKS];
    Task tasks[ROWS_AHEAD];
    Parameters launch;
    uint32_t token, position, epoch;
    uint32_t asked;  // chunks asked for: all but the last FLIGHT of them have arrived
    // Of every warp: the step that it is at, which half of the sums, and of the squares, is free.
    uint32_t step[WARPS], buffer[WARPS], turn[WARPS];
    Candidate best[THREADS];  // of every thread, at the end
};
static_assert(sizeof(Board) <= BOARD_BYTES, "the host twin has room for it");

__device__ __forceinline__ void open(Board& board) {
    if (threadIdx.x < ROWS_AHEAD) {
        barrier_init(gemv::shared_address(board.row_loaded + threadIdx.x), 1);
        barrier_init(gemv::shared_address(board.row_full + threadIdx.x), 1);
        barrier_init(gemv::shared_address(board.row_empty + threadIdx.x), WARPS);
    }
    if (threadIdx.x < CHUNKS) {
        barrier_init(gemv::shared_address(board.full + threadIdx.x), 1);
        barrier_init(gemv::shared_address(board.empty + threadIdx.x), UNITS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
}

// --- The thread that asks -------------------------------------------------------------------------

// It is one thread for all warps, so what it needs of a step is read once and kept in registers: a
// chunk must cost it less than the memory takes to bring one.
struct Producer {
    Board& board;
    uint32_t chunk_bytes, barriers;  // shared address of `full`; `empty` follows
    uint32_t next = 0;
    uint32_t place;                  // shared address of the next chunk
    uint64_t stream, keep;

    __device__ __forceinline__ Producer(Board& b, uint8_t* ring, uint32_t n)
        : board(b), chunk_bytes(n), barriers(gemv::shared_address(b.full)), place(gemv::shared_address(ring)) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream));
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    }

    // Asks for a chunk of `n` bytes; `missing` of the releases that its place counts on will not come.
    __device__ __forceinline__ void put(const uint8_t* from, uint32_t n, uint32_t missing) {
        const uint32_t d = next % CHUNKS, full = barriers + 8 * d, empty = full + 8 * CHUNKS;
        if (next >= CHUNKS) barrier_wait(empty, (next / CHUNKS - 1) & 1);
        if (missing != 0) barrier_arrive(empty, missing);
        // More than the memory needs to be busy would only stand in front of the mail.
        if (next >= FLIGHT)
            barrier_wait(barriers + 8 * ((next - FLIGHT) % CHUNKS), (next - FLIGHT) / CHUNKS & 1);
        copy_bulk(place, from, n, full, stream);
        next++;
        *static_cast<volatile uint32_t*>(&board.asked) = next;
        place += d + 1 == CHUNKS ? chunk_bytes - CHUNKS * chunk_bytes : chunk_bytes;
    }

    __device__ __forceinline__ void ask_positions(const Instruction& step, const Task& task, uint32_t position) {
        const uint32_t positions = static_cast<uint32_t>(step.items);
        const uint32_t row = 2 * static_cast<uint32_t>(step.head_dim), end = task.end;
        const uint64_t base = static_cast<uint64_t>(task.head) * step.capacity * row;
        const uint8_t* const keys = static_cast<const uint8_t*>(step.keys) + base;
        const uint8_t* const values = static_cast<const uint8_t*>(step.values) + base;
        const uint32_t shift = Shape(step.units).shift, most = 1u << shift;
        for (uint32_t g = task.begin; g < end; g += most) {
            const uint32_t units = min(most, end - g), missing = UNITS - (units << (3 - shift));
            const uint32_t n = min(units * positions, position - g * positions) * row, at = g * positions * row;
            put(keys + at, n, missing);
            put(values + at, n, missing);
        }
    }

    __device__ __forceinline__ void ask_tiles(const Instruction& step, uint32_t begin, uint32_t end) {
        const Shape shape(step.units);
        const uint32_t most = 1u << shape.shift, pairs = step.kind == GATE_UP;
        const uint8_t* const weight[3] = {step.weight[0], step.weight[1], step.weight[2]};
        const uint32_t t0 = pairs ? 0 : static_cast<uint32_t>(step.tiles[0]);
        const uint32_t t1 = t0 + static_cast<uint32_t>(step.tiles[1]);
        const uint32_t unit_bytes[2] = {static_cast<uint32_t>(step.unit_bytes[0]), static_cast<uint32_t>(step.unit_bytes[1])};
        const uint32_t tile_bytes[2] = {static_cast<uint32_t>(step.tile_bytes[0]), static_cast<uint32_t>(step.tile_bytes[1])};
        for (uint32_t v = begin; v < end; v++) {
            const uint8_t* from;
            uint32_t chunk = unit_bytes[0] << shape.shift, left = tile_bytes[0];
            if (pairs) {
                from = ((v & 1) == 0 ? weight[0] : weight[1]) + static_cast<uint64_t>(v / 2) * left;
            } else if (v < t0) {
                from = weight[0] + static_cast<uint64_t>(v) * left;
            } else if (v < t1) {
                from = weight[1] + static_cast<uint64_t>(v - t0) * left;
            } else {
                chunk = unit_bytes[1] << shape.shift, left = tile_bytes[1];
                from = weight[2] + static_cast<uint64_t>(v - t1) * left;
            }
            uint32_t k = shape.units;
            for (; k > most; k -= most) {
                put(from, chunk, 0);
                from += chunk;
                left -= chunk;
            }
            put(from, left, UNITS - (k << (3 - shape.shift)));
        }
    }

    // Asks for steps [first, last).
    __device__ __forceinline__ void run(const Instruction* program, uint32_t begin, uint32_t end, uint32_t position) {
        for (uint32_t i = begin; i < end; i++) {
            const uint32_t r = (i - begin) % ROWS_AHEAD, lap = (i - begin) / ROWS_AHEAD;
            if (i == begin) request(program, begin, begin);
            barrier_wait(gemv::shared_address(board.row_loaded + r), lap & 1);
            // The next one comes while this one is asked for.
            if (i + 1 < end) request(program, begin, i + 1);
            const Instruction& step = board.rows[r];
            const Task task = board.tasks[r] = task_of(step, position, next);
            barrier_arrive(gemv::shared_address(board.row_full + r), 1);
            // One block brings the step's gain near for all.
            if (step.gain != nullptr && i % gridDim.x == blockIdx.x) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(step.gain),
                             "r"(static_cast<uint32_t>(step.columns) * 4)
                             : "memory");
            }
            if (step.kind == ATTENTION) ask_positions(step, task, position);
            else if (step.kind != EMBED) ask_tiles(step, task.begin, task.end);
        }
    }

    __device__ __forceinline__ void request(const Instruction* program, uint32_t begin, uint32_t i) {
        const uint32_t r = (i - begin) % ROWS_AHEAD, lap = (i - begin) / ROWS_AHEAD;
        if (lap > 0) barrier_wait(gemv::shared_address(board.row_empty + r), (lap - 1) & 1);
        copy_bulk(gemv::shared_address(board.rows + r), program + i, sizeof(Instruction),
                  gemv::shared_address(board.row_loaded + r), keep);
    }
};

// --- The warps that compute -----------------------------------------------------------------------

__device__ __forceinline__ Board& board() {
    extern __shared__ __align__(128) uint8_t shared[];
    return *reinterpret_cast<Board*>(shared);
}
__device__ __forceinline__ uint8_t* ring() {
    extern __shared__ __align__(128) uint8_t shared[];
    return shared + BOARD_BYTES;
}

// Chunk `c` of this launch, once it is there.
__device__ __forceinline__ const uint8_t* wait_chunk(uint32_t c) {
    const uint32_t d = c % CHUNKS;
    barrier_wait(gemv::shared_address(board().full + d), c / CHUNKS & 1);
    return ring() + d * board().launch.chunk_bytes;
}
// The same where the warp does not know that the chunk before in that place has arrived: copies arrive
// in any order, and a barrier tells only every other lap apart. All chunks before `known` have arrived.
__device__ __forceinline__ const uint8_t* wait_chunk(uint32_t c, uint32_t& known) {
    if (static_cast<int32_t>(c - known) >= static_cast<int32_t>(CHUNKS)) {
        const volatile uint32_t& asked = board().asked;
        do known = asked - FLIGHT;
        while (static_cast<int32_t>(c - known) >= static_cast<int32_t>(CHUNKS));
    }
    return wait_chunk(c);
}
// This warp has read its `units` of chunk `c`, which has places for 1 << shift. What overwrites them is
// a bulk copy, of another proxy: without the fence it was seen to overtake loads that were issued
// before the release (the barrier orders only what the generic proxy does).
__device__ __forceinline__ void release_chunk(uint32_t c, uint32_t units, uint32_t shift, uint32_t lane) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0) barrier_arrive(gemv::shared_address(board().empty + c % CHUNKS), units << (3 - shift));
}
// The `i`th instruction of this launch, once it is there.
__device__ __forceinline__ const Instruction& wait_row(uint32_t i) {
    const uint32_t r = i % ROWS_AHEAD;
    barrier_wait(gemv::shared_address(board().row_full + r), i / ROWS_AHEAD & 1);
    return board().rows[r];
}
// This warp is done with its instruction: it goes on to the next. A row is overwritten as a chunk is.
__device__ __forceinline__ void release_row() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (thread_index() % 32 == 0) {
        volatile uint32_t& at = board().step[thread_index() / 32];
        barrier_arrive(gemv::shared_address(board().row_empty + at % ROWS_AHEAD), 1);
        at = at + 1;
    }
    __syncwarp();
}

}  // namespace persistent
