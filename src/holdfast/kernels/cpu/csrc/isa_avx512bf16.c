// AVX-512 with bfloat16 dot products: Zen 4 and later, Cooper Lake, Sapphire Rapids and later.
#if defined(__x86_64__)
#include "target.h"
TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")
#include <immintrin.h>
#define VL 16
#define DOT_BF16
#define DOT_BYTES
#define ISA_NAME avx512bf16
#define ISA_SUPPORTED                                                                                     \
    (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&                             \
     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16") &&                       \
     __builtin_cpu_supports("avx512vnni"))
#include "isa.inc"
TARGET_END
#endif
