// qkv for a value projection of another format than query and key (-DFORMAT_A, -DFORMAT_B).
#define TWO_FORMATS 1
#include "formats/all.cuh"
#include "qkv.cuh"

#define JOIN_(a, b) qkv_##a##_##b
#define JOIN(a, b) JOIN_(a, b)
QKV_KERNEL(JOIN(FORMAT_A, FORMAT_B), gemv::FORMAT_A, gemv::FORMAT_B)
