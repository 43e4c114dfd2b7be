// The recurrences of advantages and scans over a few hundred adjacent tokens, in the widest vectors of this processor.
#pragma once

#include "launch.h"

namespace finealign {

// The state that a token receives from its right.
struct State {
  double y;      // the advantage
  double ahead;  // V_u for the next valid token to the left
  bool seen;     // whether there has been a valid token
};

// The factors of a sequence. If rewards are whitened, they become (r - mean) scale + mean.
struct Rates {
  double gamma, decay;
  bool whitens;
  double mean, scale;
};

// Computes n tokens, all valid. state is the one at their right before, and the one at their left after. values null:
// discounted returns. advantages null: nothing is stored.
template <typename T>
using ScanValid = void (*)(const T* rewards, const T* values, int64_t n, State& state, const Rates& rates, T* advantages,
                           T* returns);

// Overwrites d with y_i = d_i + a_i y_(i+1), starting with y at its right, or y_i = d_i + a_i y_(i-1), starting with y at its
// left. n is a multiple of kFour. Returns the last y.
using ScanArray = double (*)(double* d, const double* a, int n, double y);

struct Recurrences {
  ScanValid<float> valid_f32;
  ScanValid<double> valid_f64;
  ScanArray back, ahead;
};

const Recurrences& recurrences();

constexpr int kFour = 4;
inline int whole_fours(int n) { return (n + kFour - 1) / kFour * kFour; }

}  // namespace finealign
