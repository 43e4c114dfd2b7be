// The recurrences for any processor.
#define FINEALIGN_ISA baseline
#include "recurrence_kernels.h"
