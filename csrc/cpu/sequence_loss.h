// Shared by the files sequence_loss*.cpp. Each of them compiles the loops over tokens for one dtype, so that they can be
// compiled in parallel.
#pragma once

#include "segments.h"

namespace finealign {

constexpr int64_t kItems = 256;  // items that are computed together: scores first, then losses

// The numbers of at most kItems items.
struct Items {
  double chosen[kItems], rejected[kItems], shift[kItems], hyper[kItems], sign[kItems];
  double margin[kItems], other_margin[kItems], value[kItems], slope[kItems], first_value[kItems], first_slope[kItems];
};

// Computes losses (value) from scores (chosen, rejected), and overwrites the scores with the slopes.
void losses_of_items(const SequenceLossForward& op, int64_t n, Items& at);

#define FINEALIGN_SEQUENCE_LOSS(NAME)                                                  \
  void sequence_loss_forward_##NAME(const SequenceLossForward& op, Parallel parallel); \
  void sequence_loss_backward_##NAME(const SequenceLossBackward& op, Parallel parallel);
FINEALIGN_SEQUENCE_LOSS(f32)
FINEALIGN_SEQUENCE_LOSS(f64)
FINEALIGN_SEQUENCE_LOSS(bf16)
FINEALIGN_SEQUENCE_LOSS(f16)
#undef FINEALIGN_SEQUENCE_LOSS

}  // namespace finealign
