// Every weight format by the suffix that kernel names carry. A new format is one line here.
#pragma once
#include "float.cuh"
#include "k_quants.cuh"
#include "legacy.cuh"

namespace gemv {
using f32 = F32;
using f16 = F16;
using bf16 = BF16;
using q4_0 = Q4_0;
using q4_1 = Q4_1;
using q5_0 = Q5_0;
using q5_1 = Q5_1;
using q8_0 = Q8_0;
using q4_k = Q4K;
using q5_k = Q5K;
using q6_k = Q6K;
}  // namespace gemv
