// What the warps of a block tell each other: barriers, the steps at hand, and the shared memory it lies in.
//
//   board    the first BOARD_BYTES
//   ring     CHUNKS places for chunks of the weight stream (stream.cuh)
//   records  staged activations of the step at hand; scratch of the attention
//   sums     [2][SLOTS][ROWS] f32, parts of tiles on their way from the products to the finish
#pragma once
#include "../gemv.cuh"
#include "program.cuh"

namespace persistent {

using gemv::ROWS;
using gemv::WARPS;

// The warps of a block by what they do. Those who multiply are the first; the others are two groups of
// four, which give up registers to them.
constexpr uint32_t THREADS = WARPS * 32;  // that multiply
constexpr uint32_t PLANNING = WARPS;      // finds each warp's work (work.cuh)
constexpr uint32_t FINISHING = WARPS + 1; // makes results of sums (finish.cuh), from this warp on
constexpr uint32_t FINISHERS = 64;        // threads of them
constexpr uint32_t ASKING = WARPS + 4;    // asks for weights (stream.cuh), from this warp on
constexpr uint32_t ASKERS = 4;            // warps, a thread each
constexpr uint32_t HELPERS = 8;           // warps that do not multiply; one has nothing to do

// Registers of a thread: the launch's are shared out anew. One too many, and the kernel waits for it without end.
constexpr uint32_t LAUNCHED_REGISTERS = 65536 / ((WARPS + HELPERS) * 32) / 8 * 8;
constexpr uint32_t MULTIPLYING_REGISTERS = 96, PLANNING_REGISTERS = 64, ASKING_REGISTERS = 32;
static_assert(WARPS * MULTIPLYING_REGISTERS + 4 * PLANNING_REGISTERS + 4 * ASKING_REGISTERS <= (WARPS + HELPERS) * LAUNCHED_REGISTERS,
              "no more than the launch has");

// Lanes that arrive at a barrier for their warp. racecheck follows an mbarrier by the threads that arrive at it, and no
// barrier by number at which warps of different code meet: for it every lane arrives, and sums are behind an
// mbarrier too (ptx/build.sh --every-lane). Nothing else differs; it takes 3% longer on a 1B.
#ifdef EVERY_LANE
constexpr uint32_t ARRIVING = 32;
#else
constexpr uint32_t ARRIVING = 1;
#endif

constexpr uint32_t UNITS = 8;    // of a chunk, at most
constexpr uint32_t CHUNKS = 16;  // in the ring: a power of two
constexpr uint32_t FLIGHT = 6;   // on their way, at most
constexpr uint32_t ENOUGH = 4;   // on their way while the block waits for mail
constexpr uint32_t ROWS_AHEAD = 8;
constexpr uint32_t SLOTS = 128;  // sums of parts that are held before they are added up
constexpr uint32_t PART_BYTES = ROWS * sizeof(float);
constexpr uint32_t BOARD_BYTES = 14592;

// What a launch is given.
struct Parameters {
    StepState* state;
    const Instruction* program;
    uint32_t first, last, steps;  // [first, last) of `steps` are done
    uint32_t chunk_bytes, record_bytes;
    uint32_t* trace;  // [steps][gridDim.x][8] readings of the clock, or null
};

// What a block has to do in a step.
struct Task {
    uint32_t chunk;       // the first
    uint32_t begin, end;  // groups of positions; tiles, counted in the block
    uint32_t head, split, splits;
};

// What a warp has to do in a step, worked out before its inputs are there: what is done again and again by
// sixteen warps between an arrival and a post would be most of a step's time.
struct alignas(16) Work {
    uint32_t code;     // Code
    uint32_t staged;   // units that it stages, 8 bits; how far apart, 8; tag of their words, 8; Shape::each, 8
    uint32_t columns;  // of the input
    uint32_t known;    // the block's first chunk: all before it have arrived

    uint32_t n, tiles;  // tiles n, n + sets, …, of all that the block has
    uint32_t second;    // from this tile on the weights are of the second format
    uint32_t at_once;   // Shape

    uint32_t chunk;   // of unit `first` of tile n
    uint32_t apart;   // chunks from one of its tiles to the next
    uint32_t inside;  // units of that chunk before it
    uint32_t sets;    // Shape

    uint32_t sums;        // bytes from tile 0 and part 0 to tile n and this part
    uint32_t sums_apart;  // from one of its tiles to the next
    uint32_t first, parts, units;  // of a tile it multiplies units first, first + parts, …
    uint32_t tail;                 // columns of a tile's last unit, 16 bits; Shape::inverse, 16
    uint32_t half;                 // of the sums that is free
    uint32_t index;                // of the step, from the launch's first
};
static_assert(sizeof(Work) == 80, "of 16 bytes each");

// Of Work::code: the step's kind, the formats of the weights, and flags.
enum Code : uint32_t {
    CODE_KIND = 0xff,        // Kind
    CODE_FORMAT = 0xff00,    // of the first matrix, GGML type id
    CODE_SECOND = 0xff0000,  // of the last
    CODE_BARRIER = 1u << 24, // what the warp multiplies others have staged
    CODE_WORK = 1u << 25,    // the block has a part of this step
    CODE_TRACE = 1u << 26,   // and the clock is noted
    CODE_LAST = 1u << 27,    // there is no step after it
    CODE_TAG_BITS = 28,      // from this bit on: how many of a word of its input are the tag
};

// At the start of the block's dynamic shared memory.
struct alignas(128) Board {
    Instruction rows[ROWS_AHEAD];
    Work work[ROWS_AHEAD][WARPS];
    uint64_t row_full[ROWS_AHEAD], row_empty[ROWS_AHEAD];
    uint64_t full[CHUNKS], empty[CHUNKS];
#ifdef EVERY_LANE
    uint64_t sums;
#endif
    Task tasks[ROWS_AHEAD];
    Parameters launch;
    uint32_t token, position, epoch;
    uint32_t asked[ASKERS];  // the next chunk of each thread that asks: all FLIGHT before the first of them have arrived
    uint32_t waits;  // whether the first warp waits for mail
    Candidate best[FINISHERS];  // of every finishing thread, at the end
};
static_assert(sizeof(Board) <= BOARD_BYTES, "the host twin has room for it");

__device__ __forceinline__ Board& board() {
    extern __shared__ __align__(128) uint8_t shared[];
    return *reinterpret_cast<Board*>(shared);
}
__device__ __forceinline__ uint8_t* ring() {
    extern __shared__ __align__(128) uint8_t shared[];
    return shared + BOARD_BYTES;
}
// Where the rest is, for a thread to keep.
struct Memory {
    uint8_t* records;
    uint8_t* sums;

    __device__ __forceinline__ Memory()
        : records(ring() + CHUNKS * board().launch.chunk_bytes), sums(records + board().launch.record_bytes) {}
    // Half `buffer` of the sums.
    __device__ __forceinline__ float* half(uint32_t buffer) const {
        return reinterpret_cast<float*>(sums) + buffer * SLOTS * ROWS;
    }
};

// The first warp begins or ends to wait for mail.
__device__ __forceinline__ void note_waiting(bool waits) {
    if (thread_index() == 0) *static_cast<volatile uint32_t*>(&board().waits) = waits;
}

// --- Barriers in shared memory, by shared address -------------------------------------------------

__device__ __forceinline__ void barrier_init(uint32_t at, uint32_t count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t at, uint32_t count) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ bool barrier_done(uint32_t at, uint32_t parity) {
    uint32_t done;
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(at), "r"(parity)
                 : "memory");
    return done != 0;
}
__device__ __forceinline__ void barrier_wait(uint32_t at, uint32_t parity) {
    while (!barrier_done(at, parity)) {}
}

__device__ __forceinline__ void open(Board& board) {
    if (threadIdx.x < ROWS_AHEAD) {
        // Every lane of the warp that plans arrives for what it wrote itself.
        barrier_init(gemv::shared_address(board.row_full + threadIdx.x), 32);
        // The warps that multiply and those that finish, and the threads that ask.
        barrier_init(gemv::shared_address(board.row_empty + threadIdx.x), (WARPS + FINISHERS / 32) * ARRIVING + ASKERS);
    }
#ifdef EVERY_LANE
    if (threadIdx.x == 0) barrier_init(gemv::shared_address(&board.sums), THREADS + FINISHERS);
#endif
    if (threadIdx.x < CHUNKS) {
        barrier_init(gemv::shared_address(board.full + threadIdx.x), 1);
        barrier_init(gemv::shared_address(board.empty + threadIdx.x), UNITS * ARRIVING);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
}

// The threads that multiply.
__device__ __forceinline__ void sync_workers() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
// And those that finish: the sums of a batch of tiles, in this half, are complete, and those of the batch before are
// used up.
// Not bar.sync, which is the aligned form: all who come to it would have to come by the same instruction.
__device__ __forceinline__ void sync_sums(uint32_t half) {
#ifdef EVERY_LANE
    const uint32_t at = gemv::shared_address(&board().sums);
    barrier_arrive(at, 1);
    barrier_wait(at, half);
#else
    asm volatile("barrier.sync 2, %0;" ::"n"(THREADS + FINISHERS) : "memory");
#endif
}

// --- The steps at hand ----------------------------------------------------------------------------

// The `i`th step of this launch, once its row and its work are there: which row.
__device__ __forceinline__ uint32_t wait_row(uint32_t i) {
    const uint32_t r = i % ROWS_AHEAD;
    barrier_wait(gemv::shared_address(board().row_full + r), i / ROWS_AHEAD & 1);
    return r;
}
// This warp is done with it.
__device__ __forceinline__ void release_row(uint32_t i) {
    __syncwarp();
    if (thread_index() % 32 < ARRIVING) barrier_arrive(gemv::shared_address(board().row_empty + i % ROWS_AHEAD), 1);
}

// --- Readings of the clock ------------------------------------------------------------------------

// Points of a step: it begins, its inputs are staged, its first sums are complete, it ends; then its
// times in nanoseconds, modulo 2^32.
enum Point { BEGIN = 0, STAGED = 1, FIRST = 2, END = 4, BEGIN_NS = 6, END_NS = 7 };

// Behind the barrier that it is written behind.
__device__ __forceinline__ uint32_t cycles() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(t)::"memory");
    return t;
}

// One thread of the block notes for step `i` of this launch.
__device__ __forceinline__ void note(uint32_t i, int point, uint32_t value) {
    board().launch.trace[((board().launch.first + i) * gridDim.x + blockIdx.x) * 8 + point] = value;
}
__device__ __forceinline__ void note_begin(uint32_t i) {
    const uint32_t now = cycles();
    note(i, BEGIN, now);
    note(i, STAGED, now);  // until there is work
    note(i, BEGIN_NS, static_cast<uint32_t>(global_nanoseconds()));
}
__device__ __forceinline__ void note_end(uint32_t i) {
    note(i, END, cycles());
    note(i, END_NS, static_cast<uint32_t>(global_nanoseconds()));
}

}  // namespace persistent
