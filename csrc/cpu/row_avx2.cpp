// The row kernels compiled for avx2; setup.py gives this file its flags and row_logprobs.cpp asks the processor first.
#if defined(__x86_64__)
#define FINEALIGN_W 8
#define FINEALIGN_ISA avx2
#include "row_kernels.h"
#endif
