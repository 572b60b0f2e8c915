// The weight stream of a block: four threads ask for everything that the block will use, in the order
// of use and over the boundaries of steps, by bulk copies into a ring in shared memory. Weights and
// earlier cache rows are constant during a token, so the stream runs ahead of all dependencies as
// far as the ring reaches.
//
//   chunk   up to UNITS units of one tile, or of keys or of values
//   ring    CHUNKS places for chunks; one is overwritten when every unit in it has been released
#pragma once
#include "work.cuh"

namespace persistent {

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

// One of ASKERS threads, each of a warp of its own, which has every ASKERS-th chunk: one alone takes as long for
// a chunk as the memory does to bring it.
//
// A barrier tells every other lap apart. Before chunk n a thread waits for n - FLIGHT, whose place is asked for again
// with n + CHUNKS - FLIGHT: by this thread, after n, or by one that first waits for a chunk that this thread asks
// for after n. So the next lap cannot end meanwhile.
static_assert(FLIGHT % 2 == 0 && FLIGHT <= CHUNKS / 2 && ENOUGH == ASKERS, "no barrier is waited for a lap late");
struct Producer {
    Board& board;
    uint32_t chunk_bytes, barriers;  // shared address of `full`; `empty` follows
    uint32_t ring;                   // shared address
    uint32_t next;                   // chunk
    uint64_t stream;

    __device__ __forceinline__ Producer(Board& b, uint8_t* r, uint32_t n, uint32_t which)
        : board(b), chunk_bytes(n), barriers(gemv::shared_address(b.full)), ring(gemv::shared_address(r)), next(which) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream));
    }

    // Asks for a chunk of `n` bytes; `missing` of the UNITS that its place counts on will not come.
    __device__ __forceinline__ void put(const uint8_t* from, uint32_t n, uint32_t missing) {
        const uint32_t d = next % CHUNKS, full = barriers + 8 * d, empty = full + 8 * CHUNKS;
        if (next >= CHUNKS) barrier_wait(empty, (next / CHUNKS - 1) & 1);
        if (missing != 0) barrier_arrive(empty, missing * ARRIVING);
        // What is on its way stands in front of the mail: no more of it than the memory needs to be busy, and
        // somewhat less while mail is waited for.
        if (next >= FLIGHT) {
            const uint32_t far = next - FLIGHT, near = next - ENOUGH;
            barrier_wait(barriers + 8 * (far % CHUNKS), far / CHUNKS & 1);
            while (!barrier_done(barriers + 8 * (near % CHUNKS), near / CHUNKS & 1) &&
                   *static_cast<volatile uint32_t*>(&board.waits) != 0) {}
        }
        copy_bulk(ring + d * chunk_bytes, from, n, full, stream);
        next += ASKERS;
        *static_cast<volatile uint32_t*>(board.asked + next % ASKERS) = next;
    }

    __device__ __forceinline__ void ask_positions(const Instruction& step, const Task& task, uint32_t position) {
        const uint32_t positions = static_cast<uint32_t>(step.items);
        const uint32_t row = 2 * static_cast<uint32_t>(step.head_dim), end = task.end;
        const uint64_t base = static_cast<uint64_t>(task.head) * step.capacity * row;
        const uint32_t most = Shape(step.units).each;
        for (;;) {
            // Keys and values in turn.
            const uint32_t k = next - task.chunk, g = task.begin + k / 2 * most;
            if (g >= end) break;
            const uint8_t* const rows = static_cast<const uint8_t*>(k % 2 == 0 ? step.keys : step.values) + base;
            const uint32_t units = min(most, end - g);
            put(rows + g * positions * row, min(units * positions, position - g * positions) * row, UNITS - units);
        }
    }

    __device__ __forceinline__ void ask_tiles(const Instruction& step, const Task& task) {
        const Shape shape(step.units);
        const uint32_t per = shape.chunks(shape.units), pairs = step.kind == GATE_UP;
        const uint32_t last = shape.units - (per - 1) * shape.each;  // units of a tile's last chunk
        const uint32_t t0 = pairs ? 0 : static_cast<uint32_t>(step.tiles[0]);
        const uint32_t t1 = t0 + static_cast<uint32_t>(step.tiles[1]);
        uint32_t v = task.begin, j = next - task.chunk;
        for (;;) {
            while (j >= per) j -= per, v++;
            if (v >= task.end) break;
            const uint32_t item = item_of(pairs ? v / 2 : v);
            const uint32_t m = pairs ? v & 1 : item < t0 ? 0 : item < t1 ? 1 : 2;
            const uint32_t tile = pairs ? item : item - (m == 0 ? 0 : m == 1 ? t0 : t1), other = m == 2;
            const uint32_t bytes = static_cast<uint32_t>(step.tile_bytes[other]);
            const uint32_t at = j * shape.each * static_cast<uint32_t>(step.unit_bytes[other]);
            const bool ends = j + 1 == per;
            put(step.weight[m] + static_cast<uint64_t>(tile) * bytes + at,
                ends ? bytes - at : shape.each * static_cast<uint32_t>(step.unit_bytes[other]), UNITS - (ends ? last : shape.each));
            j += ASKERS;
        }
    }

    // Asks for its part of `steps` steps.
    __device__ __forceinline__ void run(uint32_t steps, uint32_t position) {
        for (uint32_t i = 0; i < steps; i++) {
            const uint32_t r = wait_row(i);
            const Instruction& step = board.rows[r];
            const Task task = board.tasks[r];
            if (step.kind == ATTENTION) ask_positions(step, task, position);
            else if (step.kind != EMBED) ask_tiles(step, task);
            barrier_arrive(gemv::shared_address(board.row_empty + r), 1);
        }
    }
};

// --- The warps that multiply ----------------------------------------------------------------------

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
        static_assert(ASKERS == 4, "each is looked at");
        const volatile uint32_t& first = board().asked[0];
        const volatile uint32_t& second = board().asked[1];
        const volatile uint32_t& third = board().asked[2];
        const volatile uint32_t& fourth = board().asked[3];
        do known = min(min(uint32_t(first), uint32_t(second)), min(uint32_t(third), uint32_t(fourth))) - FLIGHT;
        while (static_cast<int32_t>(c - known) >= static_cast<int32_t>(CHUNKS));
    }
    return wait_chunk(c);
}
// This warp has read one of the units of chunk `c`. What overwrites it is
// a bulk copy, of another proxy: without the fence it was seen to overtake loads that were issued
// before the release (the barrier orders only what the generic proxy does).
__device__ __forceinline__ void release_chunk(uint32_t c, uint32_t lane) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane < ARRIVING) barrier_arrive(gemv::shared_address(board().empty + c % CHUNKS), 1);
}
}  // namespace persistent
