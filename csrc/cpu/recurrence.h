// The recurrences of advantages and scans over a few hundred tokens in a row, in the widest vectors of this processor.
#pragma once

#include "launch.h"

namespace finealign {

// What comes from the right of a token.
struct State {
  double y;      // the advantage
  double ahead;  // the value that the next valid token to the left takes for V_u
  bool seen;     // a valid token
};

// What a sequence multiplies by; its rewards become (r - mean) scale + mean where they are whitened.
struct Rates {
  double gamma, decay;
  bool whitens;
  double mean, scale;
};

// n tokens, all valid; state is the one at their right, then the one at their left. values null: discounted returns;
// advantages null: nothing is stored.
template <typename T>
using ScanValid = void (*)(const T* rewards, const T* values, int64_t n, State& state, const Rates& rates, T* advantages,
                           T* returns);

// y_i = d_i + a_i y_(i+1) over d, from y at its right on; y_i = d_i + a_i y_(i-1) from y at its left on. n is a multiple
// of kFour. Returns the last.
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
