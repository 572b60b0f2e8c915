// The weight stream of a block: one thread asks for everything that the block will use, in the order
// of use and over the boundaries of steps, by bulk copies into a ring in shared memory. Weights and
// earlier cache rows are constant during a token, so the stream runs ahead of all dependencies as
// far as the ring reaches.
//
//   chunk   up to UNITS units of one tile, or of keys or of values; of its own length
//   ring    chunks one after the other, each whole; a chunk is overwritten when every unit of it has
//           been released
//   rows    the instructions themselves, ROWS_AHEAD at most
#pragma once
#include "../gemv.cuh"
#include "program.cuh"

namespace persistent {

using gemv::ROWS;
using gemv::WARPS;

constexpr uint32_t THREADS = WARPS * 32;  // that compute; one warp more asks
constexpr uint32_t UNITS = 8;
constexpr uint32_t CHUNKS = 32;  // in the ring, at most
constexpr uint32_t ROWS_AHEAD = 16;
constexpr uint32_t BOARD_BYTES = 12288;  // at the start of shared memory; the ring follows

// The part of an attention step that a block has: a key/value head and a range of groups of
// `items` positions before this one.
struct Share {
    uint32_t splits, head, split, begin, end;
};

// Splits are made so that every warp of a block has at least GROUPS_EACH groups.
constexpr uint32_t GROUPS_EACH = 2;

__device__ __forceinline__ Share share_of(const Instruction& step, uint32_t position) {
    const uint32_t positions = static_cast<uint32_t>(step.items), heads = static_cast<uint32_t>(step.kv_heads);
    const uint32_t groups = (position + positions - 1) / positions;
    Share s;
    s.splits = max(1u, min(gridDim.x / heads, groups / (WARPS * GROUPS_EACH)));
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
    uint32_t ring_bytes, record_bytes;
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
    uint32_t at[CHUNKS];  // where a chunk lies in the ring
    Task tasks[ROWS_AHEAD];
    Parameters launch;
    uint32_t token, position, epoch;
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

struct Producer {
    Board& board;
    uint8_t* ring;
    uint32_t bytes;  // of the ring
    uint32_t next = 0, oldest = 0, head = 0;
    uint64_t stream, keep;

    __device__ __forceinline__ Producer(Board& b, uint8_t* r, uint32_t n) : board(b), ring(r), bytes(n) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream));
        asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
    }

    __device__ __forceinline__ void put(const uint8_t* from, uint32_t n, uint32_t units) {
        const uint32_t room = (n + 127) & ~127u;
        for (;;) {
            if (next == oldest) head = 0;
            if (next - oldest < CHUNKS) {
                const uint32_t first = next == oldest ? bytes : board.at[oldest % CHUNKS];
                if (next == oldest || head > first) {
                    if (head + room <= bytes) break;
                    if (room < first && next != oldest) {
                        head = 0;
                        break;
                    }
                } else if (head + room < first) {
                    break;
                }
            }
            barrier_wait(gemv::shared_address(board.empty + oldest % CHUNKS), oldest / CHUNKS & 1);
            oldest++;
        }
        const uint32_t d = next % CHUNKS;
        board.at[d] = head;
        if (units < UNITS) barrier_arrive(gemv::shared_address(board.empty + d), UNITS - units);
        copy_bulk(gemv::shared_address(ring + head), from, n, gemv::shared_address(board.full + d), stream);
        head += room;
        next++;
    }

    __device__ __forceinline__ void ask(const Instruction& step, const Task& task, uint32_t position) {
        if (step.kind == EMBED) return;
        if (step.kind == ATTENTION) {
            const uint32_t positions = static_cast<uint32_t>(step.items);
            const uint32_t row = 2 * static_cast<uint32_t>(step.head_dim);
            const uint64_t base = static_cast<uint64_t>(task.head) * step.capacity;
            for (uint32_t g = task.begin; g < task.end; g += UNITS) {
                const uint32_t units = min(UNITS, task.end - g);
                const uint32_t n = min(units * positions, position - g * positions) * row;
                const uint64_t at = (base + g * positions) * row;
                put(static_cast<const uint8_t*>(step.keys) + at, n, units);
                put(static_cast<const uint8_t*>(step.values) + at, n, units);
            }
            return;
        }
        const uint32_t units = static_cast<uint32_t>(step.units);
        for (uint32_t v = task.begin; v < task.end; v++) {
            uint32_t tile = v;
            const uint32_t m = matrix_of(step, tile), f = m == 2;
            const uint32_t unit_bytes = static_cast<uint32_t>(step.unit_bytes[f]);
            const uint32_t tile_bytes = static_cast<uint32_t>(step.tile_bytes[f]);
            const uint8_t* from = step.weight[m] + static_cast<uint64_t>(tile) * tile_bytes;
            for (uint32_t k = 0; k < units; k += UNITS) {
                const bool last = k + UNITS >= units;
                put(from + k * unit_bytes, last ? tile_bytes - k * unit_bytes : UNITS * unit_bytes,
                    last ? units - k : UNITS);
            }
        }
    }

    // Asks for steps [first, last).
    __device__ __forceinline__ void run(const Instruction* program, uint32_t first, uint32_t last, uint32_t position) {
        for (uint32_t i = first; i < last; i++) {
            const uint32_t r = (i - first) % ROWS_AHEAD, lap = (i - first) / ROWS_AHEAD;
            if (lap > 0) barrier_wait(gemv::shared_address(board.row_empty + r), (lap - 1) & 1);
            const uint32_t full = gemv::shared_address(board.row_full + r);
            const uint32_t loaded = gemv::shared_address(board.row_loaded + r);
            copy_bulk(gemv::shared_address(board.rows + r), program + i, sizeof(Instruction), loaded, keep);
            barrier_wait(loaded, lap & 1);
            const Instruction& step = board.rows[r];
            const Task task = board.tasks[r] = task_of(step, position, next);
            barrier_arrive(full, 1);
            // One block brings the step's gain near for all.
            if (step.gain != nullptr && i % gridDim.x == blockIdx.x) {
                asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(step.gain),
                             "r"(static_cast<uint32_t>(step.columns) * 4)
                             : "memory");
            }
            ask(step, task, position);
        }
    }
};

// --- The warps that compute -----------------------------------------------------------------------

// threadIdx.x, read anew: what is made of it is not kept in registers from step to step.
__device__ __forceinline__ uint32_t thread_index() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

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
    return ring() + board().at[d];
}
// This warp has read its unit of chunk `c`.
__device__ __forceinline__ void release_chunk(uint32_t c, uint32_t lane) {
    __syncwarp();
    if (lane == 0) barrier_arrive(gemv::shared_address(board().empty + c % CHUNKS), 1);
}
// The `i`th instruction of this launch, once it is there.
__device__ __forceinline__ const Instruction& wait_row(uint32_t i) {
    const uint32_t r = i % ROWS_AHEAD;
    barrier_wait(gemv::shared_address(board().row_full + r), i / ROWS_AHEAD & 1);
    return board().rows[r];
}
// This warp is done with its instruction: it goes on to the next.
__device__ __forceinline__ void release_row() {
    __syncwarp();
    if (thread_index() % 32 == 0) {
        volatile uint32_t& at = board().step[thread_index() / 32];
        barrier_arrive(gemv::shared_address(board().row_empty + at % ROWS_AHEAD), 1);
        at = at + 1;
    }
    __syncwarp();
}

}  // namespace persistent
