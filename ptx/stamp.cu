// The kernel that stands between the steps of a profiled graph: no op of a plan.
#include "common.cuh"

// stamps[row, slot] = the device's clock, nanoseconds, once the kernel before has ended; stamps
// [rows, slots]. row = token modulo rows, where a token's number is what the step state counts,
// less `behind`: 1 after the kernel that advances it.
//
// It lets its successor start at once, and waits itself: what a chain of kernels gains by starting
// each before its predecessor has ended is kept. One block of one warp.
extern "C" __global__ void __launch_bounds__(32)
stamp(const StepState* step, uint64_t* stamps, uint32_t slot, uint32_t slots, uint32_t rows,
      uint32_t behind) {
    pdl_launch();
    pdl_wait();
    if (threadIdx.x != 0) return;
    // Volatile: read after the wait. The last kernel of a token writes it.
    const uint32_t token = *reinterpret_cast<const volatile uint32_t*>(&step->steps) - behind;
    stamps[static_cast<size_t>(token % rows) * slots + slot] = global_nanoseconds();
}
