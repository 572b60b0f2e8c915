// The kernels of elementwise.cu as functions of a library: grid, block, then the kernel's parameters.
#include "shim.h"

#include "elementwise.cu"

#define RUN(name, parameters, ...)                                                 \
    extern "C" int run_##name(uint32_t grid, uint32_t block, void** p) {           \
        return shim::launch(grid, block, [=] { name parameters; });                \
    }

template <typename T> T* at(void* p) { return static_cast<T*>(p); }
template <typename T> T value(void* p) { return *static_cast<T*>(p); }

RUN(rms_norm, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), value<uint32_t>(p[4]), value<float>(p[5])))
RUN(add, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), value<uint32_t>(p[3])))
RUN(swiglu, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), value<uint32_t>(p[4])))
RUN(rope, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), value<uint32_t>(p[3]), value<uint32_t>(p[4]), value<uint32_t>(p[5]), value<float>(p[6])))
RUN(kv_append_f16, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), at<Half>(p[3]), at<Half>(p[4]), value<uint32_t>(p[5]), value<uint32_t>(p[6])))
RUN(kv_append_f32, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<float>(p[4]), value<uint32_t>(p[5]), value<uint32_t>(p[6])))
RUN(argmax, (at<StepState>(p[0]), at<float>(p[1]), at<float>(p[2]), at<uint32_t>(p[3]), at<uint32_t>(p[4]), at<uint64_t>(p[5]), value<uint32_t>(p[6])))
