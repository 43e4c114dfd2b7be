// The row kernels for any processor: vectors of four floats, which every 64-bit target has.

#define FINEALIGN_W 4
#define FINEALIGN_ISA baseline
#include "row_kernels.h"

