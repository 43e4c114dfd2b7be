// The recurrences compiled for avx2. setup.py gives this file its flags; recurrence.cpp checks that the processor has avx2.
#if defined(__x86_64__)
#define FINEALIGN_ISA wide
#include "recurrence_kernels.h"
#endif
