// The choice of a token by a draw: what src/ops/sample.rs says, in the same integers.
#include "common.cuh"

namespace {

constexpr uint32_t THREADS = 1024, WARPS = THREADS / 32;
// Copies of the histogram, one a lane of a half warp: lanes of one warp do not meet.
constexpr uint32_t COPIES = 16;

// What every pass looks at.
struct Logits {
    const float* logits;
    uint32_t vocab;
    float best, scale;
};

// Ordered as finite floats are; the zeros are one.
__device__ __forceinline__ uint32_t order_key(float logit) {
    const uint32_t bits = __float_as_uint(__fadd_rn(logit, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// 2^40 · 2^((logit − best) · scale): the operations, and their rounding, of the reference.
__device__ __forceinline__ uint64_t weight(const Logits& l, float logit) {
    const float y = __fmul_rn(__fsub_rn(logit, l.best), l.scale);
    if (y < -40.0f) return 0;
    const float n = rintf(y), f = __fsub_rn(y, n);
    constexpr float EXP2[7] = {0.0001540353f, 0.0013333558f, 0.009618129f, 0.05550411f,
                               0.2402265f,    0.6931472f,    1.0f};
    float power = EXP2[0];
#pragma unroll
    for (int k = 1; k < 7; ++k) power = __fadd_rn(__fmul_rn(power, f), EXP2[k]);
    const uint64_t mantissa = static_cast<uint32_t>(__fmul_rn(power, 8388608.0f));
    return (mantissa << 17) >> static_cast<uint32_t>(-n);
}

// ⌊mass · fraction / 2^31⌋; mass < 2^58.
__device__ __forceinline__ uint64_t part(uint64_t mass, uint32_t fraction) {
    return (mass >> 31) * fraction + (((mass & 0x7FFFFFFFu) * fraction) >> 31);
}

__device__ __forceinline__ uint64_t warp_sum(uint64_t v) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
    return v;
}

// What a token adds to a sum: 1, or its weight if it is kept.
struct Count {
    __device__ uint64_t operator()(const Logits&, float) const { return 1; }
};
struct Kept {
    uint32_t lowest;
    uint64_t least;
    __device__ uint64_t operator()(const Logits& l, float logit) const {
        if (order_key(logit) < lowest) return 0;
        const uint64_t w = weight(l, logit);
        return w >= least ? w : 0;
    }
};

// Memory of the block that `cut` needs.
struct Scratch {
    unsigned long long histogram[256][COPIES];
    uint64_t above;
    uint32_t digit;
};

// The largest key t with Σ of `value` over keys ≥ t at least `target`: eight bits a pass, from the
// highest down. The target is at most the sum over all tokens.
template <typename Value>
__device__ uint32_t cut(const Logits& l, Value value, uint64_t target, Scratch& s) {
    uint32_t prefix = 0;
    uint64_t above = 0;  // of keys beyond all that begin with the prefix
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (uint32_t i = threadIdx.x; i < 256 * COPIES; i += THREADS) (&s.histogram[0][0])[i] = 0;
        __syncthreads();
        for (uint32_t i = threadIdx.x; i < l.vocab; i += THREADS) {
            const float logit = l.logits[i];
            const uint32_t key = order_key(logit);
            if (shift == 24 || key >> (shift + 8) == prefix) {
                atomicAdd(&s.histogram[(key >> shift) & 255][threadIdx.x % COPIES],
                          static_cast<unsigned long long>(value(l, logit)));
            }
        }
        __syncthreads();
        if (threadIdx.x < 256) {
            uint64_t sum = 0;
            for (uint32_t c = 0; c < COPIES; ++c) sum += s.histogram[threadIdx.x][c];
            s.histogram[threadIdx.x][0] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            uint64_t reached = above;
            int digit = 255;
            while (digit > 0 && reached + s.histogram[digit][0] < target) {
                reached += s.histogram[digit--][0];
            }
            s.digit = digit;
            s.above = reached;
        }
        __syncthreads();
        prefix = prefix << 8 | s.digit;
        above = s.above;
    }
    return prefix;
}

// Σ of `value` over [begin, end) in 32 parts, a warp each, coalesced: sums[part]. All threads.
template <typename Value>
__device__ void sum_parts(const Logits& l, Value value, uint32_t begin, uint32_t end,
                          uint64_t* sums) {
    const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t length = (end - begin + WARPS - 1) / WARPS;
    const uint32_t from = begin + warp * length, to = min(end, from + length);
    uint64_t sum = 0;
    for (uint32_t i = from + lane; i < to; i += 32) sum += value(l, l.logits[i]);
    sum = warp_sum(sum);
    __syncthreads();
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
}

// Philox4x32-10 (Salmon et al., 2011): words 0 and 1 of counter {position, 0, 0, 0}.
__device__ uint64_t philox(uint32_t position, uint32_t key0, uint32_t key1) {
    uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint32_t high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const uint32_t high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return static_cast<uint64_t>(c1) << 32 | c0;
}

}  // namespace

// next ~ e^(logits / T) among the kept tokens, then token and position advance; logits [vocab];
// scale = log₂e / T, top_p and min_p in 2^-31, top_k 0 is all. One block of 1024 threads.
extern "C" __global__ void __launch_bounds__(THREADS)
sample(StepState* step, const float* logits, const uint32_t* forced, uint64_t* ring,
       uint32_t vocab, float scale, uint32_t top_k, uint32_t top_p, uint32_t min_p,
       uint32_t seed_low, uint32_t seed_high) {
    pdl_launch();
    const uint4 head = load_step(step);
    pdl_wait();
    __shared__ Candidate shared_best;
    __shared__ Scratch scratch;
    __shared__ uint64_t sums[WARPS];
    uint32_t chosen = 0;
    bool finite = false;
    if (step_active(head)) {
        Candidate mine = no_candidate();
        for (uint32_t i = threadIdx.x; i < vocab; i += THREADS) mine = consider(mine, logits[i], i);
        mine = block_best(mine);
        if (threadIdx.x == 0) shared_best = mine;
        __syncthreads();
        finite = shared_best.index < vocab;
    }
    if (finite) {
        const Logits l{logits, vocab, shared_best.value, scale};
        Kept kept{0, 0};
        if (top_k > 0 && top_k < vocab) kept.lowest = cut(l, Count{}, top_k, scratch);
        if (top_p < 1u << 31) {
            sum_parts(l, kept, 0, vocab, sums);
            uint64_t mass = 0;
            for (uint32_t w = 0; w < WARPS; ++w) mass += sums[w];
            const uint64_t target = part(mass, top_p);
            kept.lowest = max(kept.lowest, cut(l, Kept{0, 0}, max(target, uint64_t{1}), scratch));
        }
        kept.least = part(1ull << 40, min_p);
        // Narrows [begin, end) down to the token under which the draw falls.
        uint32_t begin = 0, end = vocab;
        uint64_t left = 0;
        for (bool first = true; end - begin > 1; first = false) {
            sum_parts(l, kept, begin, end, sums);
            if (first) {
                uint64_t mass = 0;
                for (uint32_t w = 0; w < WARPS; ++w) mass += sums[w];
                left = __umul64hi(mass, philox(head.y, seed_low, seed_high));
            }
            const uint32_t length = (end - begin + WARPS - 1) / WARPS;
            uint32_t w = 0;
            while (w + 1 < WARPS && left >= sums[w]) left -= sums[w++];
            begin += w * length;
            end = min(end, begin + length);
        }
        chosen = begin;
    }
    // Every thread has read the step state.
    __syncthreads();
    if (threadIdx.x == 0) advance(step, forced, ring, vocab, chosen, finite);
}
