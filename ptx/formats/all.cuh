// Every weight format by the suffix that kernel names carry. A new format is one line here, and one in the list below.
#pragma once
#include "codebook.cuh"
#include "float.cuh"
#include "k_quants.cuh"
#include "legacy.cuh"
#include "low_k_quants.cuh"

namespace gemv {
using f32 = F32;
using f16 = F16;
using bf16 = BF16;
using q4_0 = Q4_0;
using q4_1 = Q4_1;
using q5_0 = Q5_0;
using q5_1 = Q5_1;
using q8_0 = Q8_0;
using q2_k = Q2K;
using q3_k = Q3K;
using q4_k = Q4K;
using q5_k = Q5K;
using q6_k = Q6K;
using iq4_nl = IQ4NL;
using iq4_xs = IQ4XS;
using mxfp4 = MXFP4;
}  // namespace gemv

// The same by their GGML type ids, the usual ones apart.
#define OTHER_FORMATS(X)                                                                           \
    X(0, f32) X(1, f16) X(2, q4_0) X(3, q4_1) X(6, q5_0) X(7, q5_1) X(8, q8_0) X(10, q2_k)         \
        X(11, q3_k) X(13, q5_k) X(20, iq4_nl) X(23, iq4_xs) X(39, mxfp4)
#define EVERY_FORMAT(X) X(12, q4_k) X(14, q6_k) X(30, bf16) OTHER_FORMATS(X)
