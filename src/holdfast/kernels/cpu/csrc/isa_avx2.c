// AVX2 with fused multiply-add: Haswell and later, every Zen.
#if defined(__x86_64__)
#include "target.h"
TARGET_BEGIN("avx2,fma,f16c")
#include <immintrin.h>
#define VL 8
#define ISA_NAME avx2
#define ISA_SUPPORTED (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#include "isa.inc"
TARGET_END
#endif
