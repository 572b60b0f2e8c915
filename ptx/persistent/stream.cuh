// The weight stream of a block: one thread asks for everything that the block will use, in the order
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

// It is one thread for all warps, so what it needs of a step is read once and kept in registers: a
// chunk must cost it less than the memory takes to bring one.
struct Producer {
    Board& board;
    uint32_t chunk_bytes, barriers;  // shared address of `full`; `empty` follows
    uint32_t next = 0;
    uint32_t place;                  // shared address of the next chunk
    uint64_t stream;
    uint32_t enough = FLIGHT;  // chunks of this step that are ENOUGH

    __device__ __forceinline__ Producer(Board& b, uint8_t* ring, uint32_t n)
        : board(b), chunk_bytes(n), barriers(gemv::shared_address(b.full)), place(gemv::shared_address(ring)) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(stream));
    }

    // Asks for a chunk of `n` bytes; `missing` of the UNITS that its place counts on will not come.
    __device__ __forceinline__ void put(const uint8_t* from, uint32_t n, uint32_t missing) {
        const uint32_t d = next % CHUNKS, full = barriers + 8 * d, empty = full + 8 * CHUNKS;
        if (next >= CHUNKS) barrier_wait(empty, (next / CHUNKS - 1) & 1);
        if (missing != 0) barrier_arrive(empty, missing);
        // What is on its way stands in front of the mail: no more of it than the memory needs to be busy, and
        // somewhat less while mail is waited for.
        if (next >= FLIGHT) {
            const uint32_t far = next - FLIGHT, near = next - enough;
            barrier_wait(barriers + 8 * (far % CHUNKS), far / CHUNKS & 1);
            while (!barrier_done(barriers + 8 * (near % CHUNKS), near / CHUNKS & 1) &&
                   *static_cast<volatile uint32_t*>(&board.waits) != 0) {}
        }
        copy_bulk(place, from, n, full, stream);
        next++;
        *static_cast<volatile uint32_t*>(&board.asked) = next;
        place += d + 1 == CHUNKS ? chunk_bytes - CHUNKS * chunk_bytes : chunk_bytes;
    }

    // Chunks of `n` bytes come now.
    __device__ __forceinline__ void wants(uint32_t n) { enough = min(FLIGHT, (ENOUGH + n - 1) / n); }

    __device__ __forceinline__ void ask_positions(const Instruction& step, const Task& task, uint32_t position) {
        const uint32_t positions = static_cast<uint32_t>(step.items);
        const uint32_t row = 2 * static_cast<uint32_t>(step.head_dim), end = task.end;
        const uint64_t base = static_cast<uint64_t>(task.head) * step.capacity * row;
        const uint8_t* const keys = static_cast<const uint8_t*>(step.keys) + base;
        const uint8_t* const values = static_cast<const uint8_t*>(step.values) + base;
        const uint32_t most = Shape(step.units).each;
        wants(most * positions * row);
        for (uint32_t g = task.begin; g < end; g += most) {
            const uint32_t units = min(most, end - g), missing = UNITS - units;
            const uint32_t n = min(units * positions, position - g * positions) * row, at = g * positions * row;
            put(keys + at, n, missing);
            put(values + at, n, missing);
        }
    }

    __device__ __forceinline__ void ask_tiles(const Instruction& step, uint32_t begin, uint32_t end) {
        const Shape shape(step.units);
        const uint32_t most = shape.each, pairs = step.kind == GATE_UP;
        const uint8_t* const weight[3] = {step.weight[0], step.weight[1], step.weight[2]};
        const uint32_t t0 = pairs ? 0 : static_cast<uint32_t>(step.tiles[0]);
        const uint32_t t1 = t0 + static_cast<uint32_t>(step.tiles[1]);
        const uint32_t unit_bytes[2] = {static_cast<uint32_t>(step.unit_bytes[0]), static_cast<uint32_t>(step.unit_bytes[1])};
        const uint32_t tile_bytes[2] = {static_cast<uint32_t>(step.tile_bytes[0]), static_cast<uint32_t>(step.tile_bytes[1])};
        wants(max(unit_bytes[0], unit_bytes[1]) * most);
        for (uint32_t v = begin; v < end; v++) {
            const uint8_t* from;
            uint32_t chunk = unit_bytes[0] * most, left = tile_bytes[0];
            const uint32_t item = item_of(pairs ? v / 2 : v);
            if (pairs) {
                from = ((v & 1) == 0 ? weight[0] : weight[1]) + static_cast<uint64_t>(item) * left;
            } else if (item < t0) {
                from = weight[0] + static_cast<uint64_t>(item) * left;
            } else if (item < t1) {
                from = weight[1] + static_cast<uint64_t>(item - t0) * left;
            } else {
                chunk = unit_bytes[1] * most, left = tile_bytes[1];
                from = weight[2] + static_cast<uint64_t>(item - t1) * left;
            }
            uint32_t k = shape.units;
            for (; k > most; k -= most) {
                put(from, chunk, UNITS - most);
                from += chunk;
                left -= chunk;
            }
            put(from, left, UNITS - k);
        }
    }

    // Asks for `steps` steps.
    __device__ __forceinline__ void run(uint32_t steps, uint32_t position) {
        for (uint32_t i = 0; i < steps; i++) {
            const uint32_t r = wait_row(i);
            const Instruction& step = board.rows[r];
            const Task task = board.tasks[r];
            if (step.kind == ATTENTION) ask_positions(step, task, position);
            else if (step.kind != EMBED) ask_tiles(step, task.begin, task.end);
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
        const volatile uint32_t& asked = board().asked;
        do known = asked - FLIGHT;
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
    if (lane == 0) barrier_arrive(gemv::shared_address(board().empty + c % CHUNKS), 1);
}
}  // namespace persistent
