// The weight stream of a block: one warp asks for everything that the block will use, in the order
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

// A warp asks for the chunks of all others, a lane for each place of the ring: one thread alone takes longer for a
// chunk than the memory, and a place that is not free yet would keep the others waiting. A lane looks at one
// barrier after the other: its step's row, its place, its chunk.
class Producer {
    enum State : uint32_t { ROW, PLACE, WAY, END };

    Board& board;
    uint32_t lane, full, empty, place;  // the last three: shared addresses
    uint64_t policy;
    // The next chunk of this place that has not arrived: its number in the launch, its step, where it is, its size,
    // and how many of the UNITS that its place counts on will not come.
    uint32_t c, i = 0;
    const uint8_t* from = nullptr;
    uint32_t bytes = 0, missing = 0;

    // Chunk k of an attention step: keys, then values of a run of groups.
    __device__ __forceinline__ void find_positions(const Instruction& step, const Task& task, uint32_t k, uint32_t position) {
        const uint32_t positions = static_cast<uint32_t>(step.items), row = 2 * static_cast<uint32_t>(step.head_dim);
        const uint32_t most = Shape(step.units).each, g = task.begin + k / 2 * most, units = min(most, task.end - g);
        const uint64_t at = static_cast<uint64_t>(task.head) * static_cast<uint32_t>(step.capacity) + g * positions;
        from = static_cast<const uint8_t*>((k & 1) == 0 ? step.keys : step.values) + at * row;
        bytes = min(units * positions, position - g * positions) * row;
        missing = UNITS - units;
    }
    // Chunk k of a product.
    __device__ __forceinline__ void find_tile(const Instruction& step, const Task& task, uint32_t k) {
        const Shape shape(step.units);
        const uint32_t nth = __umulhi(2 * k, task.inverse), part = k - nth * task.per_tile;
        uint32_t tile = task.begin + nth;
        const uint32_t m = matrix_of(step, tile), last = m == 2, before = part * shape.each;
        const uint32_t units = min(shape.each, shape.units - before), unit_bytes = static_cast<uint32_t>(step.unit_bytes[last]);
        const uint32_t tile_bytes = static_cast<uint32_t>(step.tile_bytes[last]);
        from = step.weight[m] + static_cast<uint64_t>(tile) * tile_bytes + before * unit_bytes;
        // The last unit may be smaller.
        bytes = min(units * unit_bytes, tile_bytes - before * unit_bytes);
        missing = UNITS - units;
    }
    // Looks for chunk c in step i, whose row is there.
    __device__ __forceinline__ State find(uint32_t steps, uint32_t position) {
        const uint32_t r = i % ROWS_AHEAD;
        const Task& task = board.tasks[r];
        const uint32_t k = c - task.chunk;
        if (k < task.chunks) {
            if (board.rows[r].kind == ATTENTION) find_positions(board.rows[r], task, k, position);
            else find_tile(board.rows[r], task, k);
            return PLACE;
        }
        barrier_arrive(gemv::shared_address(board.row_empty + r), 1);
        return ++i == steps ? END : ROW;
    }
    // Whether it has what it waits for. The phase before a barrier's first is taken as complete.
    __device__ __forceinline__ bool done(State state) const {
        const uint32_t lap = c / CHUNKS, row = gemv::shared_address(board.row_full + i % ROWS_AHEAD);
        const uint32_t at = state == ROW ? row : state == PLACE ? empty : full;
        const uint32_t phase = state == ROW ? i / ROWS_AHEAD : state == PLACE ? lap + 1 : lap;
        return state != END && barrier_done_now(at, phase & 1);
    }

  public:
    __device__ __forceinline__ Producer(Board& b, uint8_t* ring, uint32_t chunk_bytes)
        : board(b), lane(thread_index() % 32), full(gemv::shared_address(b.full + lane % CHUNKS)),
          empty(gemv::shared_address(b.empty + lane % CHUNKS)), place(gemv::shared_address(ring) + lane % CHUNKS * chunk_bytes),
          c(lane < CHUNKS ? lane : 0x7fffffffu) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    }

    // Asks for `steps` steps.
    __device__ __forceinline__ void run(uint32_t steps, uint32_t position) {
        State state = lane < CHUNKS ? ROW : END;
        while (__any_sync(~0u, state != END)) {
            bool ready = false;
            if (done(state)) {
                if (state == WAY) c += CHUNKS, state = ROW;
                else if (state == ROW) state = find(steps, position);
                else ready = true;
            }
            const uint32_t first = __reduce_min_sync(~0u, c);
            if (lane == 0) *static_cast<volatile uint32_t*>(&board.arrived) = first;
            // What is on its way stands in front of the mail: no more of it than the memory needs to be busy, and
            // somewhat less while mail is waited for. What is used first goes first.
            const uint32_t limit = *static_cast<volatile uint32_t*>(&board.waits) != 0 ? ENOUGH : FLIGHT;
            const uint32_t flying = __popc(__ballot_sync(~0u, state == WAY)), open = __ballot_sync(~0u, ready);
            const uint32_t turned = (open | open << CHUNKS) >> first % CHUNKS, turn = (lane - first) % CHUNKS;
            if (ready && flying + __popc(turned & ((1u << turn) - 1)) < limit) {
                if (missing != 0) barrier_arrive(empty, missing);
                copy_bulk(place, from, bytes, full, policy);
                state = WAY;
            }
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
        const volatile uint32_t& arrived = board().arrived;
        do known = arrived;
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
