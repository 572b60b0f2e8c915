// What every kernel shares: the thread's number, the step state, programmatic dependent launch,
// reductions of fixed order, the choice of the next token and the advance of the step.
#pragma once
#include <cstdint>

// What changes from token to token; its host twin has the same layout. 32 bytes, 16-byte aligned.
struct alignas(16) StepState {
    uint32_t token;     // that is being computed
    uint32_t position;  // of that token
    uint32_t status;    // bits below; not 0: every kernel leaves everything as it is
    uint32_t capacity;  // positions of the cache
    uint32_t steps;     // completed since the host reset it
    uint32_t vocab;     // token ids are below it
    uint32_t pad0, pad1;
};
static_assert(sizeof(StepState) == 32, "the host twin has 32 bytes");

enum : uint32_t {
    STATUS_CAPACITY = 1,   // position is at the capacity
    STATUS_TOKEN = 2,      // token is outside the vocabulary
    STATUS_NONFINITE = 4,  // a logit was NaN or infinite
};

// Entries of the ring: {u32 token or status, u32 sequence, u64 nanoseconds}.
constexpr uint32_t RING_SLOTS = 1024;
// Forced token that stands for "take the chosen one".
constexpr uint32_t NOT_FORCED = 0xFFFFFFFFu;
// In a ring entry: the low bits are a status, not a token.
constexpr uint32_t RING_STATUS = 0x80000000u;

// --- Threads ------------------------------------------------------------------------------------

// threadIdx.x, read anew: what is made of it need not stay in registers from one use to the next.
__device__ __forceinline__ uint32_t thread_index() {
    uint32_t t;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(t));
    return t;
}

// --- Step state ---------------------------------------------------------------------------------

// {token, position, status, capacity} in one 16-byte load.
// Legal before pdl_wait(): only the host and the last kernel of a graph write the step state. The
// host writes between graph launches. The last kernel writes after its own wait, when every
// earlier kernel of the graph has completed; the first kernel of the next launch has an ordinary,
// full dependency on it.
__device__ __forceinline__ uint4 load_step(const StepState* step) {
    return *reinterpret_cast<const uint4*>(step);
}

__device__ __forceinline__ bool step_active(const uint4& head) {
    return head.z == 0 && head.y < head.w;
}

// Whether this step computes a token: status == 0 and position < capacity.
// Legal before pdl_wait(), as load_step().
__device__ __forceinline__ bool step_active(const StepState& step) {
    return step_active(load_step(&step));
}

// --- Programmatic dependent launch --------------------------------------------------------------
// Compiled out below sm_90; the launch attribute is decided from the loaded code, so the two agree.

// Lets the next kernel be scheduled; publishes no memory. At the top of every kernel.
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernel before has completed and its writes are visible. Every thread calls it,
// also of a kernel with nothing to do: were it skipped everywhere, this kernel could complete
// before its predecessor, and its successor's wait would say nothing about that predecessor.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- Memory -------------------------------------------------------------------------------------

// Orders this thread's (and, after a barrier, its block's) accesses against other blocks of the
// device. Lighter than __threadfence(), which is sequentially consistent.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ uint64_t global_nanoseconds() {
    uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
    return t;
}

// Counts a block's arrival; true in every thread of the block that arrives last of `blocks`.
// Everything that the blocks wrote before is then visible to it. The counter is 0 again after the
// last arrival. All threads of the block call it.
__device__ __forceinline__ bool arrives_last(uint32_t* counter, uint32_t blocks) {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        fence_device();
        last = atomicInc(counter, blocks - 1) == blocks - 1;
        fence_device();
    }
    return __syncthreads_or(last);
}

// The same, told by a word in shared memory: for a kernel that has no register left for the other.
__device__ __forceinline__ bool last_to_arrive(uint32_t* counter, uint32_t blocks) {
    __shared__ uint32_t arrived;
    __syncthreads();
    if (threadIdx.x == 0) {
        fence_device();
        arrived = atomicInc(counter, blocks - 1);
        fence_device();
    }
    __syncthreads();
    return arrived == blocks - 1;
}

// --- Reductions, the same order of operations in every run ---------------------------------------

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, o));
    return v;
}

// Sum over the block (a multiple of 32 threads, at most 1024), in every thread: warps by
// butterfly, then the warps' sums likewise. Two barriers; may be called again at once.
__device__ __forceinline__ float block_sum(float v) {
    __shared__ float sums[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_sum(v);
    __syncthreads();
    if (lane == 0) sums[warp] = v;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? sums[lane] : 0.0f);
}

// --- Activations of a gate ----------------------------------------------------------------------

__device__ __forceinline__ float silu(float z) { return z / (1.0f + expf(-z)); }

// z/2 · (1 + tanh(√(2/π) · (z + 0.044715 z³)))
__device__ __forceinline__ float gelu(float z) {
    return 0.5f * z * (1.0f + tanhf(0.79788456f * (z + 0.044715f * z * z * z)));
}

// --- Angles ---------------------------------------------------------------------------------------

// Sine and cosine, both within 2^-23 of the true value; |angle| below 2^30. Unlike sincosf() it keeps no
// array for large angles, for which a driver would set memory aside for every thread that a device holds.
__device__ __forceinline__ void sin_cos(float angle, float& sin, float& cos) {
    // π/2 in two doubles: exact to the last bit of a float over the range.
    const double turns = rint(static_cast<double>(angle) * 0.63661977236758134);
    const float r = static_cast<float>(fma(-turns, 6.123233995736766e-17, fma(-turns, 1.5707963267948966, static_cast<double>(angle))));
    const float z = r * r;
    const float s = fmaf(r * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), r);
    const float c = fmaf(z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f),
                         fmaf(z, -0.5f, 1.f));
    const int quarter = static_cast<int>(turns) & 3;
    sin = quarter & 1 ? c : s, cos = quarter & 1 ? s : c;
    if ((quarter & 2) != 0) sin = -sin;
    if (((quarter + 1) & 2) != 0) cos = -cos;
}

// --- Choice of the next token -------------------------------------------------------------------

// A candidate of argmax: the best value so far and where it is.
struct Candidate {
    float value;
    uint32_t index;
};
constexpr uint32_t INDEX_NONE = 0xFFFFFFFEu;       // nothing seen
constexpr uint32_t INDEX_NONFINITE = 0xFFFFFFFFu;  // a NaN or an infinity was seen: absorbs all

__device__ __forceinline__ Candidate no_candidate() {
    return Candidate{__int_as_float(0xFF800000), INDEX_NONE};
}

__device__ __forceinline__ bool is_finite(float v) {
    return (__float_as_uint(v) & 0x7F800000u) != 0x7F800000u;
}

// The greater value, of equals the lower index.
__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
    if (a.index == INDEX_NONFINITE) return a;
    if (b.index == INDEX_NONFINITE) return b;
    return b.value > a.value || (b.value == a.value && b.index < a.index) ? b : a;
}

// Takes logit `index` into account.
__device__ __forceinline__ Candidate consider(Candidate best, float value, uint32_t index) {
    return better(best, Candidate{value, is_finite(value) ? index : INDEX_NONFINITE});
}

// The best of the block, in thread 0 (a multiple of 32 threads, at most 1024).
__device__ __forceinline__ Candidate block_best(Candidate c, uint32_t threads = blockDim.x) {
    __shared__ Candidate warps[32];
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto warp_best = [](Candidate v) {
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) {
            v = better(v, Candidate{__shfl_xor_sync(~0u, v.value, o),
                                    __shfl_xor_sync(~0u, v.index, o)});
        }
        return v;
    };
    c = warp_best(c);
    __syncthreads();
    if (lane == 0) warps[warp] = c;
    __syncthreads();
    if (warp == 0) c = warp_best(lane < threads / 32 ? warps[lane] : no_candidate());
    return c;
}

// Ends the step: one thread of the last kernel of a graph, after every other block has read the
// step state. Writes the ring entry of this step (index: completed steps modulo RING_SLOTS) with
// sequence steps + 1, so that the host sees a chosen token or the reason why there is none.
// `best` is what the host reads; `forced`, [capacity], may replace it as the next input.
__device__ __forceinline__ void advance(StepState* step, const uint32_t* forced, uint64_t* ring,
                                        uint32_t vocab, uint32_t best, bool finite) {
    const uint4 head = load_step(step);
    const uint32_t token = head.x, position = head.y, capacity = head.w, steps = step->steps;
    uint32_t status = head.z, entry = best;
    if (status == 0) {
        if (position >= capacity) {
            status = STATUS_CAPACITY;
        } else if (token >= vocab) {
            status = STATUS_TOKEN;
        } else if (!finite) {
            status = STATUS_NONFINITE;
        } else {
            uint32_t next = best;
            if (position + 1 < capacity) {
                const uint32_t f = forced[position + 1];
                if (f != NOT_FORCED) next = f;
            }
            // A forced token outside the vocabulary: this step is good, the next one computes
            // nothing and reports it.
            const uint32_t after = next < vocab ? 0 : STATUS_TOKEN;
            *reinterpret_cast<uint4*>(step) = make_uint4(next, position + 1, after, capacity);
            step->steps = steps + 1;
        }
    } else if (position >= capacity) {
        status |= STATUS_CAPACITY;
    }
    if (status != 0) {
        step->status = status;
        entry = RING_STATUS | status;
    }
    // The host polls the word with the sequence: time first, then the fence, then that word.
    volatile uint64_t* slot = ring + 2 * (steps % RING_SLOTS);
    slot[1] = global_nanoseconds();
    __threadfence_system();
    slot[0] = static_cast<uint64_t>(steps + 1) << 32 | entry;
}

// Chooses among the candidates of all threads of all blocks and ends the step. `candidates` is
// [gridDim.x, 2]; counters[0] is zero before and after. All threads of all blocks call it, after
// pdl_wait() and after their last read of the step state; of an inactive step with any candidate.
__device__ __forceinline__ void choose_and_advance(Candidate mine, StepState* step,
                                                   float* candidates, uint32_t* counters,
                                                   const uint32_t* forced, uint64_t* ring,
                                                   uint32_t vocab, uint32_t threads = blockDim.x) {
    Candidate best = block_best(mine, threads);
    if (threadIdx.x == 0) {
        *reinterpret_cast<float2*>(candidates + 2 * blockIdx.x) =
            make_float2(best.value, __uint_as_float(best.index));
    }
    if (!arrives_last(counters, gridDim.x)) return;
    best = no_candidate();
    for (uint32_t b = threadIdx.x; b < gridDim.x; b += threads) {
        // From L2: other blocks wrote it during this kernel.
        const float2 c = __ldcg(reinterpret_cast<const float2*>(candidates) + b);
        best = better(best, Candidate{c.x, __float_as_uint(c.y)});
    }
    best = block_best(best, threads);
    if (threadIdx.x == 0) {
        advance(step, forced, ring, vocab, best.index, best.index < vocab);
    }
}
