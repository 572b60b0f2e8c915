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

using namespace persistent;

// Steps [first, last) of `program`, which has `steps` in all; of the last warp group one thread asks,
// the others compute. `trace`, if there is one, gets readings of the clock for every step and block,
// [steps][gridDim.x][8] (persistent/product.cuh, Point).
extern "C" __global__ void __launch_bounds__(GEMV_WARPS * 32 + 128, 1)
    decode_step(StepState* state, const Instruction* program, uint32_t first, uint32_t last, uint32_t steps,
                uint32_t chunk_bytes, uint32_t record_bytes, uint32_t* trace) {
#if __CUDA_ARCH__ >= 900
    open(board());
    const uint4 head = load_step(state);
    const bool active = step_active(head) && head.x < state->vocab;
    if (threadIdx.x < WARPS) board().buffer[threadIdx.x] = board().turn[threadIdx.x] = board().step[threadIdx.x] = 0;
    if (threadIdx.x < THREADS) board().best[threadIdx.x] = no_candidate();
    if (threadIdx.x == 0)
        board().launch = Parameters{state, program, first, last, steps, chunk_bytes, record_bytes, trace};
    if (threadIdx.x == 0) board().token = head.x, board().position = head.y, board().epoch = state->steps, board().asked = 0;
    __syncthreads();

    // Registers for those who compute. Who asks ends here: the barriers below count who is left.
    if (threadIdx.x >= THREADS) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (active && threadIdx.x == THREADS) Producer(board(), ring(), chunk_bytes).run(program, first, last, head.y);
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    if (active) {
        Block block;
        for (;;) {
            const uint32_t at = block.step();
            if (at >= last - first) break;
            const Instruction& step = wait_row(at);
            block.begin();
            if (step.kind == EMBED) embed(step, block);
            else if (step.kind != ATTENTION) product(step, block);
            else if (step.head_dim == 64) attend<64>(step, block);
            else attend<128>(step, block);
            block.end();
            release_row();
        }
    }
    if (last == steps) {
        __syncthreads();
        const Instruction& step = program[last - 1];
        choose_and_advance(board().best[thread_index()], state, step.candidates, step.counters, step.forced, step.ring,
                           static_cast<uint32_t>(step.rows[0]), THREADS);
    }
#endif
}
