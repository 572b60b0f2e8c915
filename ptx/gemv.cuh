// y = W x for one token: the body of every matrix-vector kernel.
//
//   W [rows, columns] in the tile layout of src/quant/tile.rs, x [columns] f32, y [rows] f32
//
// A block takes a contiguous run of tiles of 16 rows; its eight warps take the units (16 rows x up
// to 256 columns) of those tiles in turn. Lane 0 of a warp keeps a private ring of units in shared
// memory filled with bulk copies; below sm_90 the units are read from global memory directly.
// The partial sums of the eight warps are added in a fixed order, so results do not depend on
// timing. Nothing is rounded but the activations (16-bit fixed point per unit for integer formats)
// and f32 sums.
//
// Order of events, and why it is legal and fast:
//   1. weights are constant: the ring is filled before griddepcontrol.wait;
//   2. after the wait x is staged once per block, with the norm's gain folded in; the norm's
//      1/rms is a factor on the finished sums, so that the product need not wait for it;
//   3. dependents are launched at the top, so that their weights are on the way before this kernel
//      ends; but only `early` units a warp are asked for before x has been staged: a full burst
//      would queue in front of the activations that the kernel before is about to read.
#pragma once
#include "common.cuh"
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace gemv {

template <class T, class U>
struct Same {
    static constexpr bool value = false;
};
template <class T>
struct Same<T, T> {
    static constexpr bool value = true;
};

// These four mirror src/ops/gemv.rs, which computes the shared memory of a launch from them.
#ifndef GEMV_WARPS
#define GEMV_WARPS 8
#endif
constexpr int WARPS = GEMV_WARPS;
constexpr int MAX_SLOTS = 16;
constexpr int FLUSH = 8;
constexpr int ROWS = 16;
constexpr int THREADS = WARPS * 32;

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ float4 load_dependent(const float* p) {
    // Through the L2: the L1 of this multiprocessor may hold a line from before the wait.
    return __ldcg(reinterpret_cast<const float4*>(p));
}

// ---------------------------------------------------------------------------------------- ring

// A warp's private ring of units in shared memory; its lane 0 fills it. All threads of the block make theirs together.
struct Ring {
#if __CUDA_ARCH__ >= 900
    uint32_t barriers;  // shared address of this warp's mbarriers
    uint8_t* slots;
    uint32_t count, bytes;
    uint32_t slot = 0, phase = 0;
    uint64_t policy;

    __device__ __forceinline__ Ring(uint8_t* shared, uint32_t warp, uint32_t lane, uint32_t slots_each,
                                    uint32_t unit_bytes)
        : barriers(shared_address(shared) + warp * MAX_SLOTS * 8),
          slots(shared + WARPS * MAX_SLOTS * 8 + warp * slots_each * unit_bytes),
          count(slots_each),
          bytes(unit_bytes) {
        asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
        if (lane < count)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barriers + 8 * lane) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        // A warp uses its own barriers only, and __syncwarp would do. But racecheck takes the copies of a
        // warp that starts before the others have made theirs for a hazard of the loads that wait for them.
        __syncthreads();
    }
    // Lane 0 only.
    __device__ __forceinline__ void fill(uint32_t s, const uint8_t* unit, uint32_t n) const {
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barriers + 8 * s), "r"(n)
                     : "memory");
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(slots + s * bytes)),
            "l"(unit), "r"(n), "r"(barriers + 8 * s), "l"(policy)
            : "memory");
    }
    __device__ __forceinline__ const uint8_t* wait() const {
        uint32_t done;
        do {
            asm volatile(
                "{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                : "=r"(done)
                : "r"(barriers + 8 * slot), "r"(phase)
                : "memory");
        } while (!done);
        return slots + slot * bytes;
    }
    // Every lane has read the slot. What overwrites it is a bulk copy, of another proxy: without the
    // fence it may overtake loads that are still on their way.
    __device__ __forceinline__ void release() const {
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
    }
    __device__ __forceinline__ void advance() {
        if (++slot == count) {
            slot = 0;
            phase ^= 1;
        }
    }
#endif
};

// ------------------------------------------------------------------------------------- staging

// Where the pieces of a block's dynamic shared memory are; src/ops/gemv.rs has the picture.
struct Shared {
    uint8_t* base;
    uint8_t* activations;
    float* sums;     // [2][FLUSH][WARPS][ROWS]
    float* squares;  // [WARPS]

    __device__ __forceinline__ Shared(uint8_t* shared, uint32_t slots, uint32_t unit_bytes,
                                      uint32_t units, uint32_t stage_bytes)
        : base(shared),
          activations(shared + WARPS * MAX_SLOTS * 8 + WARPS * slots * unit_bytes),
          sums(reinterpret_cast<float*>(activations + units * stage_bytes)),
          squares(sums + 2 * FLUSH * WARPS * ROWS) {}
};

// Stages x, times the gain if there is one, for `Dot`, and the sum of x² per warp for the norm.
// HELD units a warp have their gain in registers before the wait: gains come from DRAM, and a
// miss would stand on the critical path.
//
// BATCH units of a warp are loaded before the first is worked on: enough for one round trip to the
// L2 at the usual widths, no more, since the code is executed cold. Gains beyond HELD units are
// only brought near before the wait, and loaded after it: eight registers a unit less.
template <class Dot, int BATCH, int HELD>
struct Stager {
    static constexpr int COLUMNS = Dot::UNIT_COLUMNS;
    static constexpr int EACH = COLUMNS / 32;  // columns of a lane

    float gain[HELD][EACH];

    __device__ __forceinline__ void prefetch(const float* g, uint32_t columns, int warp, int lane) {
        if (g == nullptr) return;
#pragma unroll
        for (int i = 0; i < HELD; i++) load_gain(gain[i], g, columns, warp + i * WARPS, lane);
#pragma unroll
        for (int i = HELD; i < BATCH; i++) {
            const uint32_t c = (warp + i * WARPS) * COLUMNS + lane * EACH;
            if (c < columns) asm volatile("prefetch.global.L1 [%0];" ::"l"(g + c));
        }
    }

    static __device__ __forceinline__ void load_gain(float (&v)[EACH], const float* g,
                                                     uint32_t columns, uint32_t unit, int lane) {
        const uint32_t c = unit * COLUMNS + lane * EACH;
#pragma unroll
        for (int j = 0; j < EACH; j++) v[j] = 0.f;
        if (c < columns) {
#pragma unroll
            for (int j = 0; j < EACH; j += (EACH >= 4 ? 4 : 2)) {
                if constexpr (EACH >= 4) {
                    const float4 q = __ldg(reinterpret_cast<const float4*>(g + c + j));
                    v[j] = q.x, v[j + 1] = q.y, v[j + 2] = q.z, v[j + 3] = q.w;
                } else {
                    const float2 q = __ldg(reinterpret_cast<const float2*>(g + c + j));
                    v[j] = q.x, v[j + 1] = q.y;
                }
            }
        }
    }

    // Returns this warp's sum of squares (on every lane).
    __device__ __forceinline__ float stage(uint8_t* records, const float* x, const float* g,
                                           uint32_t columns, uint32_t units, int warp, int lane) {
        float squares = 0.f;
        for (uint32_t first = warp, i = 0; first < units; first += BATCH * WARPS, i += BATCH) {
            float v[BATCH][EACH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const uint32_t c = (first + b * WARPS) * COLUMNS + lane * EACH;
#pragma unroll
                for (int j = 0; j < EACH; j++) v[b][j] = 0.f;
                if (c < columns) {
#pragma unroll
                    for (int j = 0; j < EACH; j += (EACH >= 4 ? 4 : 2)) {
                        if constexpr (EACH >= 4) {
                            const float4 q = load_dependent(x + c + j);
                            v[b][j] = q.x, v[b][j + 1] = q.y, v[b][j + 2] = q.z, v[b][j + 3] = q.w;
                        } else {
                            const float2 q = __ldcg(reinterpret_cast<const float2*>(x + c + j));
                            v[b][j] = q.x, v[b][j + 1] = q.y;
                        }
                    }
                }
            }
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                const uint32_t unit = first + b * WARPS;
                if (unit >= units) break;
                if (g != nullptr) {
#pragma unroll
                    for (int j = 0; j < EACH; j++) squares = fmaf(v[b][j], v[b][j], squares);
                    if (b < HELD && i == 0) {
#pragma unroll
                        for (int j = 0; j < EACH; j++) v[b][j] *= gain[b < HELD ? b : 0][j];
                    } else {
                        float late[EACH];
                        load_gain(late, g, columns, unit, lane);
#pragma unroll
                        for (int j = 0; j < EACH; j++) v[b][j] *= late[j];
                    }
                }
                Dot::stage(records + unit * Dot::STAGE_BYTES, v[b], lane);
            }
        }
        if (g != nullptr) {
#pragma unroll
            for (int o = 16; o > 0; o >>= 1) squares += __shfl_xor_sync(~0u, squares, o);
        }
        return squares;
    }
};

// ---------------------------------------------------------------------------------------- body

// One matrix, or the tiles of several as one run. `A` and `B` are formats of one dot kind; a
// source says which of the two a tile has and where it lies. THREAD_AGAIN: the thread's number is
// read again after the staging, where the product leaves no registers for what was made of it before.
template <class A, class B, int BATCH, int HELD = 2, bool THREAD_AGAIN = false, class Source, class Epilogue>
__device__ __forceinline__ void run(const StepState* step, const float* x, const float* gain,
                                    float eps, uint32_t columns, uint32_t items, uint32_t slots,
                                    uint32_t early, const Source& source, Epilogue& epilogue) {
    extern __shared__ __align__(128) uint8_t shared_memory[];
    constexpr bool MIXED = !Same<A, B>::value;
    constexpr uint32_t UNIT = A::UNIT_BYTES > B::UNIT_BYTES ? A::UNIT_BYTES : B::UNIT_BYTES;
    pdl_launch();
    int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    const uint32_t units = (columns + A::UNIT_COLUMNS - 1) / A::UNIT_COLUMNS;
    const uint32_t tail = min((columns - (units - 1) * A::UNIT_COLUMNS + 63) & ~63u,
                              static_cast<uint32_t>(A::UNIT_COLUMNS));
    const uint32_t t0 = static_cast<uint32_t>(static_cast<uint64_t>(items) * blockIdx.x / gridDim.x) *
                        Source::EACH;
    const uint32_t t1 = static_cast<uint32_t>(static_cast<uint64_t>(items) * (blockIdx.x + 1) / gridDim.x) *
                        Source::EACH;
    const Shared shared(shared_memory, slots, UNIT, units, A::STAGE_BYTES);
    const uint32_t tile_a = (units - 1) * A::UNIT_BYTES + A::bytes(tail);
    const uint32_t tile_b = (units - 1) * B::UNIT_BYTES + B::bytes(tail);

    // Address and size of unit k of tile v.
    auto locate = [&](uint32_t v, uint32_t k, uint32_t& n) -> const uint8_t* {
        if (MIXED && source.second(v)) {
            n = k + 1 == units ? B::bytes(tail) : B::UNIT_BYTES;
            return source.tile(v, tile_a, tile_b) + k * B::UNIT_BYTES;
        }
        n = k + 1 == units ? A::bytes(tail) : A::UNIT_BYTES;
        return source.tile(v, tile_a, tile_b) + k * A::UNIT_BYTES;
    };

    const bool active = step_active(*step);
#if __CUDA_ARCH__ >= 900
    Ring ring(shared.base, warp, lane, slots, UNIT);
    // The producer's place: tile and unit of the next copy of this warp. An inactive step copies
    // nothing.
    uint32_t put_tile = active ? t0 : t1, put_unit = warp;
    auto skip_tiles = [&] {
        while (put_unit >= units && put_tile < t1) {
            put_unit -= units;
            put_tile++;
        }
    };
    auto put = [&](uint32_t slot) {
        uint32_t n;
        const uint8_t* p = locate(put_tile, put_unit, n);
        ring.fill(slot, p, n);
        put_unit += WARPS;
        skip_tiles();
    };
    skip_tiles();
    if (lane == 0) {
#pragma unroll 1
        for (uint32_t s = 0; s < early && put_tile < t1; s++) put(s);
    }
#endif
    Stager<A, BATCH, HELD> stager;
    stager.prefetch(gain, columns, warp, lane);
    epilogue.prefetch(t0);

    pdl_wait();
    if (!active) {
        epilogue.finish();
        return;
    }
    epilogue.begin(t0);
    const float squares = stager.stage(shared.activations, x, gain, columns, units, warp, lane);
    if (gain != nullptr && lane == 0) shared.squares[warp] = squares;
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
#pragma unroll 1
        for (uint32_t s = early; s < slots && put_tile < t1; s++) put(s);
    }
#endif

    if constexpr (THREAD_AGAIN) {
        const uint32_t thread = thread_index();
        warp = thread >> 5, lane = thread & 31;
    }
    uint32_t k = warp;
    int buffer = 0;
    for (uint32_t base = t0; base < t1; base += FLUSH, buffer ^= 1) {
        float* sums = shared.sums + buffer * FLUSH * WARPS * ROWS;
        const uint32_t end = min(base + FLUSH, t1);
        for (uint32_t v = base; v < end; v++) {
            float low = 0.f, high = 0.f;  // rows g and g + 8, this lane's share
            for (; k < units; k += WARPS) {
                const uint8_t* record = shared.activations + k * A::STAGE_BYTES;
                const uint32_t n = k + 1 == units ? tail : A::UNIT_COLUMNS;
#if __CUDA_ARCH__ >= 900
                const uint8_t* unit = ring.wait();
#else
                uint32_t unused;
                const uint8_t* unit = locate(v, k, unused);
#endif
                if (MIXED && source.second(v)) {
                    B::dot(unit, record, lane, n, low, high);
                } else {
                    A::dot(unit, record, lane, n, low, high);
                }
#if __CUDA_ARCH__ >= 900
                ring.release();
                if (lane == 0 && put_tile < t1) put(ring.slot);
                ring.advance();
#endif
            }
            k -= units;
            low += __shfl_xor_sync(~0u, low, 1);
            high += __shfl_xor_sync(~0u, high, 1);
            low += __shfl_xor_sync(~0u, low, 2);
            high += __shfl_xor_sync(~0u, high, 2);
            const int g = lane >> 2, t = lane & 3;
            float* row = sums + ((v - base) * WARPS + warp) * ROWS;
            if (t == 0) row[g] = low;
            if (t == 1) row[g + 8] = high;
        }
        __syncthreads();
        float scale = 1.f;
        if (gain != nullptr) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared.squares[w];
            scale = 1.f / sqrtf(sum / static_cast<float>(columns) + eps);
        }
        epilogue.flush(base, end - base, sums, scale);
    }
    epilogue.finish();
}

// Sum of the eight partial sums of row `row` of tile `tile` of a flush, in fixed order.
__device__ __forceinline__ float total(const float* sums, uint32_t tile, uint32_t row) {
    const float* p = sums + tile * WARPS * ROWS + row;
    float s = p[0];
#pragma unroll
    for (int w = 1; w < WARPS; w++) s += p[w * ROWS];
    return s;
}

// The tiles of one matrix.
template <class F>
struct OneMatrix {
    static constexpr uint32_t EACH = 1;
    const uint8_t* weight;
    __device__ __forceinline__ bool second(uint32_t) const { return false; }
    __device__ __forceinline__ const uint8_t* tile(uint32_t v, uint32_t bytes, uint32_t) const {
        return weight + static_cast<uint64_t>(v) * bytes;
    }
};

}  // namespace gemv
