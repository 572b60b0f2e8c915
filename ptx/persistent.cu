// A token in one kernel: every block walks the program, one block on every multiprocessor.
//
// The steps are those of the plan, fused as it is; what a step reads of another block's results
// arrives by mail (persistent/program.cuh), weights and cache rows through a stream that does not
// stop between steps (persistent/stream.cuh). Issued as a whole, or step by step for a look at what
// each wrote: the same code on the same data, the same bits.
//
// All blocks wait for each other: the launch is cooperative, so that they run at the same time.
#define GEMV_WARPS 16
#include "persistent/attention.cuh"
#include "persistent/finish.cuh"
#include "persistent/product.cuh"

using namespace persistent;

// Steps [first, last) of `program`, which has `steps` in all. `trace`, if there is one, gets readings of the
// clock for every step and block, [steps][gridDim.x][8] (persistent/board.cuh, Point).
extern "C" __global__ void __launch_bounds__((GEMV_WARPS + HELPERS) * 32, 1)
    decode_step(StepState* state, const Instruction* program, uint32_t first, uint32_t last, uint32_t steps,
                uint32_t chunk_bytes, uint32_t record_bytes, uint32_t* trace) {
#if __CUDA_ARCH__ >= 900
    open(board());
    const uint4 head = load_step(state);
    const bool active = step_active(head) && head.x < state->vocab;
    if (threadIdx.x < ASKERS) board().asked[threadIdx.x] = threadIdx.x;
    if (threadIdx.x < FINISHERS) board().best[threadIdx.x] = no_candidate();
    if (threadIdx.x == 0) {
        board().launch = Parameters{state, program, first, last, steps, chunk_bytes, record_bytes, trace};
        board().token = head.x, board().position = head.y, board().epoch = state->steps, board().waits = 0;
    }
    __syncthreads();

    if (thread_index() >= THREADS) {
        const uint32_t warp = thread_index() / 32;
        // They end here; joined with the other way's code theirs would be held to its registers.
        if (warp >= ASKING) {
            asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(ASKING_REGISTERS));
            if (active && thread_index() % 32 == 0) Producer(board(), ring(), chunk_bytes, warp - ASKING).run(last - first, head.y);
            asm volatile("exit;");
            __builtin_unreachable();
        }
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(PLANNING_REGISTERS));
        if (warp >= FINISHING && finisher() < FINISHERS) {
            if (active) finish_all(last - first);
            if (last == steps) asm volatile("bar.arrive 3, %0;" ::"n"(THREADS + FINISHERS) : "memory");
        } else if (active && warp == PLANNING) {
            plan(board(), program, first, last, head.y);
        }
        asm volatile("exit;");
        __builtin_unreachable();
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(MULTIPLYING_REGISTERS));
    if (active) {
        for (uint32_t i = 0;; i++) {
            const uint32_t r = wait_row(i);
            const Instruction& step = board().rows[r];
            const volatile Work& w = board().work[r][thread_index() / 32];
            const uint32_t code = w.code;
            if ((code & CODE_TRACE) != 0 && thread_index() == 0) note_begin(i);
            if ((code & CODE_WORK) != 0) {
                if ((code & CODE_KIND) != ATTENTION) product(step, const_cast<const Work&>(w));
                else if (step.head_dim == 64) attend<64>(step, board().tasks[r], w);
                else attend<128>(step, board().tasks[r], w);
            }
            // Read anew: nothing but its address is kept during a step.
            i = w.index;
            const uint32_t did = w.code;
            // A product's end is noted by those who finish it.
            if ((did & CODE_TRACE) != 0 && thread_index() == 0 && ((did & CODE_WORK) == 0 || (did & CODE_KIND) == ATTENTION)) note_end(i);
            release_row(i);
            if ((did & CODE_LAST) != 0) break;
        }
    }
    if (last == steps) {
        // What is chosen from, of those who finish.
        asm volatile("bar.sync 3, %0;" ::"n"(THREADS + FINISHERS) : "memory");
        const Instruction& step = program[last - 1];
        const Candidate best = thread_index() < FINISHERS ? board().best[thread_index()] : no_candidate();
        choose_and_advance(best, state, step.candidates, step.counters, step.forced, step.ring,
                           static_cast<uint32_t>(step.rows[0]), THREADS);
    }
#endif
}
