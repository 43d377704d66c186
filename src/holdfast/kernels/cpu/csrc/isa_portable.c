// Plain C with the compiler's vector types: any processor.
#define VL 4
#define ISA_NAME portable
#define ISA_SUPPORTED 1
#include "isa.inc"
