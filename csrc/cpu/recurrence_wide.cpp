// The recurrences compiled for avx2; setup.py gives this file its flags and recurrence.cpp asks the processor first.
#if defined(__x86_64__)
#define FINEALIGN_ISA wide
#include "recurrence_kernels.h"
#endif
