// The row kernels compiled for avx512. setup.py gives this file its flags; row_logprobs.cpp checks that the processor has it.
#if defined(__x86_64__)
#define FINEALIGN_W 16
#define FINEALIGN_ISA avx512
#include "row_kernels.h"
#endif
