// The row kernels compiled for avx2. setup.py gives this file its flags; row_logprobs.cpp checks that the processor has avx2.
#if defined(__x86_64__)
#define FINEALIGN_W 8
#define FINEALIGN_ISA avx2
#include "row_kernels.h"
#endif
