// The scalar mathematics of fused losses, for host and device alike: finealign_kernels/formulas says what is right.
#pragma once
#include <math.h>

#include "launch.h"

namespace finealign {

struct Item {
  double value, slope;  // slope = d value / d margin
};

// Loss of one margin m; a is the row's constant (center, label noise), where it has one. A NaN reaches the value.
FINEALIGN_BOTH inline Item margin_loss(Phi phi, double m, double a) {
  if (phi == Phi::squared) return {(m - a) * (m - a), 2 * (m - a)};
  if (phi == Phi::linear) return {-m, -1};
  if (phi == Phi::hinge) return {m < 1 ? 1 - m : m != m ? m : 0, m < 1 ? -1.0 : 0.0};
  // The rest is logistic. With e = exp(-|m|) nothing overflows, and the smaller of σ(m), σ(-m) keeps its digits.
  const double e = exp(-fabs(m)), large = 1 / (1 + e), small = e / (1 + e);
  const double up = m < 0 ? small : large, down = m < 0 ? large : small;  // σ(m), σ(-m)
  if (phi == Phi::bounded) return {down, -up * down};
  const double rest = log1p(e), cost = (m < 0 ? -m : 0) + rest;  // -log σ(m)
  if (phi == Phi::logistic) return {cost, -down};
  const double other = (m > 0 ? m : 0) + rest;  // -log σ(-m)
  if (phi == Phi::smoothed) return {(1 - a) * cost + a * other, a * up - (1 - a) * down};
  return {((1 - a) * cost - a * other) / (1 - 2 * a), -((1 - a) * down + a * up) / (1 - 2 * a)};  // robust
}

// Σx, Σx² and the count of n values, which add up over parts of a batch.
struct Moments {
  double n, sum, squares;
};

struct Standard {
  double mean, scale;  // scale 0: nothing to scale by
};

// finealign_kernels/formulas/returns.py `standard`.
FINEALIGN_BOTH inline Standard standard(Moments of, Scale scale, bool unbiased) {
  const double n = of.n < 1 ? 1 : of.n, mean = of.sum / n, square = of.squares / n;
  double v = square - mean * mean;
  v = v < 0 ? 0 : v;  // a NaN stays
  if (of.n < 2 || v <= 0x1p-46 * square) return {mean, 0};
  if (unbiased) v *= n / (n - 1);
  const double spread = scale == Scale::std ? v + 1e-8 : scale == Scale::clamp ? (v < 1e-8 ? 1e-8 : v) : sqrt(v) + 1e-8;
  return {mean, 1 / sqrt(spread)};
}

// Estimate of KL from one token, d = old_logp - ref_logp: formulas/divergence.py.
FINEALIGN_BOTH inline double divergence(Estimator estimator, double d) {
  if (estimator == Estimator::k1) return d;
  if (estimator == Estimator::k2) return d * d / 2;
  d = d < -20 ? -20 : d > 20 ? 20 : d;
  return expm1(-d) + d;
}

}  // namespace finealign
