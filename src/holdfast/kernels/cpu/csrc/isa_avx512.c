// AVX-512 without bfloat16 arithmetic: Skylake-SP, Ice Lake.
#if defined(__x86_64__)
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include <immintrin.h>
#define VL 16
#define ISA_NAME avx512
#define ISA_SUPPORTED                                                           \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#include "isa.inc"
TARGET_END
#endif
