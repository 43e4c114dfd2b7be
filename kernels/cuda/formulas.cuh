// The scalar mathematics of the fused losses, for host and device. The specification is finealign_kernels/formulas.
//
// The operations are the same everywhere: exp and log1p are built from fma, and a product that is added to something is
// written as an fma, so the compiler decides nothing. A loss therefore has the same bits on a GPU, on a CPU and in
// vectors of any width.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "launch.h"

#ifdef __CUDACC__
#define FINEALIGN_FORMULA __host__ __device__ __forceinline__
#else
#define FINEALIGN_FORMULA inline __attribute__((always_inline))  // compiled with its caller, for the caller's vectors
#endif

namespace finealign {

// a + b and a b, which the compiler must not combine with other operations to an fma.
FINEALIGN_FORMULA double sum_of(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

FINEALIGN_FORMULA double product_of(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// e^x = (1 + r tail) 2^k, for x in [-708, 709].
struct Exponential {
  double r, tail, power;  // |r| <= log(2) / 2
};

FINEALIGN_FORMULA Exponential exponential_of(double x) {
  constexpr double kPlaces = 0x1.8p52;  // a float64 of this size has no fractional bits
  const double shifted = fma(x, 0x1.71547652b82fep0, kPlaces), k = shifted - kPlaces;  // x = k log 2 + r
  const double r = fma(k, -0x1.abc9e3b39803fp-56, fma(k, -0x1.62e42fefa39efp-1, x));
  double sum = 1.0 / 6227020800;  // Σ rⁿ / (n + 1)! to n = 12
  sum = fma(sum, r, 1.0 / 479001600);
  sum = fma(sum, r, 1.0 / 39916800);
  sum = fma(sum, r, 1.0 / 3628800);
  sum = fma(sum, r, 1.0 / 362880);
  sum = fma(sum, r, 1.0 / 40320);
  sum = fma(sum, r, 1.0 / 5040);
  sum = fma(sum, r, 1.0 / 720);
  sum = fma(sum, r, 1.0 / 120);
  sum = fma(sum, r, 1.0 / 24);
  sum = fma(sum, r, 1.0 / 6);
  sum = fma(sum, r, 0.5);
  sum = fma(sum, r, 1.0);
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 52) + 0x3ff0000000000000u;  // of 2^k
  double power;
  memcpy(&power, &bits, sizeof power);
  return {r, sum, power};
}

// e^x within an ulp. Below -708 the result is 0 (float64 would have subnormals there), above 709 it is inf.
FINEALIGN_FORMULA double exp_of(double x) {
  const Exponential e = exponential_of(x < -708 ? -708 : x > 709 ? 709 : x);
  const double y = fma(e.tail, e.r, 1.0) * e.power;
  return x < -708 ? 0 : x > 709 ? static_cast<double>(INFINITY) : y;
}

// e^x - 1 within two ulps, for x in [-708, 709].
FINEALIGN_FORMULA double expm1_of(double x) {
  const Exponential e = exponential_of(x);
  return fma(e.power, e.tail * e.r, e.power - 1);
}

// log(1 + e) for e in [0, 1], as 2 atanh(f), f = e / (2 + e) <= 1/3: the series up to f^35.
FINEALIGN_FORMULA double log1p_of(double e) {
  const double f = e / (2 + e), s = f * f, twice = f + f;
  double sum = 1.0 / 35;
  sum = fma(sum, s, 1.0 / 33);
  sum = fma(sum, s, 1.0 / 31);
  sum = fma(sum, s, 1.0 / 29);
  sum = fma(sum, s, 1.0 / 27);
  sum = fma(sum, s, 1.0 / 25);
  sum = fma(sum, s, 1.0 / 23);
  sum = fma(sum, s, 1.0 / 21);
  sum = fma(sum, s, 1.0 / 19);
  sum = fma(sum, s, 1.0 / 17);
  sum = fma(sum, s, 1.0 / 15);
  sum = fma(sum, s, 1.0 / 13);
  sum = fma(sum, s, 1.0 / 11);
  sum = fma(sum, s, 1.0 / 9);
  sum = fma(sum, s, 1.0 / 7);
  sum = fma(sum, s, 1.0 / 5);
  sum = fma(sum, s, 1.0 / 3);
  return fma(twice, s * sum, twice);
}

// σ(m), σ(-m), -log σ(m), -log σ(-m). Computed from e = exp(-|m|), so nothing overflows, and the smaller of σ(m) and σ(-m)
// keeps its digits.
struct Logistic {
  double up, down, cost, other;
};

FINEALIGN_FORMULA Logistic logistic_of(double m) {
  const double e = exp_of(-fabs(m)), large = 1 / (1 + e), small = e * large, rest = log1p_of(e);
  return {m < 0 ? small : large, m < 0 ? large : small, (m < 0 ? -m : 0) + rest, (m > 0 ? m : 0) + rest};
}

struct Item {
  double value, slope;  // slope = d value / d margin
};

// The loss of one margin m; a is the constant of the row, if it has one (see launch.h). NaN gives NaN. For an infinite m,
// value and slope are the limits.
FINEALIGN_FORMULA Item margin_loss(Phi phi, double m, double a) {
  if (phi == Phi::squared) return {(m - a) * (m - a), 2 * (m - a)};
  if (phi == Phi::linear) return {-m, -1};
  if (phi == Phi::hinge) return {m < 1 ? 1 - m : m != m ? m : 0, m < 1 ? -1.0 : 0.0};
  const Logistic at = logistic_of(m);
  if (phi == Phi::bounded) return {at.down, -at.up * at.down};
  if (phi == Phi::rising) return {at.up, at.up * at.down};
  if (phi == Phi::logistic) return {at.cost, -at.down};
  if (phi == Phi::anchored) return {fma(2.0, at.cost, at.other), fma(-2.0, at.down, at.up)};
  if (phi == Phi::smoothed) {
    const double mixed = fma(a, at.other, (1 - a) * at.cost);  // NaN for 0 times inf
    return {a == 0 ? at.cost : a == 1 ? at.other : mixed, fma(a, at.up, (a - 1) * at.down)};
  }
  if (phi == Phi::robust) {
    if (a == 0) return {at.cost, -at.down};  // avoids 0 times inf
    const double ease = fma(-2.0, a, 1.0);
    return {fma(-a, at.other, (1 - a) * at.cost) / ease, fma(-a, at.up, (a - 1) * at.down) / ease};
  }
  if (phi == Phi::exo) {  // a = log((1-ε)/ε), so log(1-ε) = -rest and log ε = -rest - a
    const double rest = log1p_of(exp_of(-a));
    if (fabs(m) == INFINITY) return {m > 0 ? rest : rest + a, 0};
    return {fma(at.down, rest + a - at.other, at.up * (rest - at.cost)), at.up * at.down * (m - a)};
  }
  // discovered, a = τ: a product with e^-m is computed as one exponential
  if (m == -INFINITY) return {INFINITY, a > 1 ? -INFINITY : -1.0};
  const Logistic turned = logistic_of(m / a);
  const double steep = exp_of(-turned.cost - m), both = turned.cost + turned.other;
  const double turn = fma(-exp_of(-both), at.cost, exp_of(-both - m));
  const double slope = fma(-turned.down, at.down, turn / a) - steep;
  return {fma(turned.down, at.cost, steep), steep == INFINITY ? -INFINITY : slope};
}

// The two margins of an item: the one of phi, and the one of `first` if the form has it. `rejected` is unused without pairs.
struct Margins {
  double phi, first;
};

FINEALIGN_FORMULA Margins margins_of(Form form, bool paired, double beta, double shift, double sign, double chosen,
                                     double rejected) {
  const double up = fma(beta, chosen, -shift);
  if (form == Form::sides) return {-(paired ? fma(beta, rejected, -shift) : up), up};
  return {paired ? fma(beta, chosen - rejected, -shift) : product_of(sign, up), up};
}

struct Outcome {
  double loss, chosen, rejected;  // the loss, and its derivative with respect to the chosen and the rejected score
};

FINEALIGN_FORMULA Outcome outcome_of(Form form, bool paired, double beta, double scale, double sign, Item phi,
                                     Item first) {
  const double step = scale * beta;
  if (form == Form::beside)
    return {scale * sum_of(phi.value, first.value), step * sum_of(phi.slope, first.slope), -step * phi.slope};
  if (form == Form::margin)
    return {scale * phi.value, step * sign * phi.slope, -step * phi.slope};
  if (paired) return {scale / 2 * sum_of(phi.value, first.value), step / 2 * first.slope, -step / 2 * phi.slope};
  return sign > 0 ? Outcome{scale * first.value, step * first.slope, 0}
                  : Outcome{scale * phi.value, -step * phi.slope, 0};
}

// ---- policy losses -------------------------------------------------------------------------------------------------

constexpr double kLargestLogRatio = 20;

FINEALIGN_FORMULA bool is_beyond(double log_ratio) { return fabs(log_ratio) > kLargestLogRatio; }

// NaN gives NaN.
FINEALIGN_FORMULA double held(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

FINEALIGN_FORMULA double near_of(double log_ratio) { return held(log_ratio, -kLargestLogRatio, kLargestLogRatio); }

FINEALIGN_FORMULA double ratio_of(double log_ratio) {
  const Exponential e = exponential_of(near_of(log_ratio));
  return fma(e.tail, e.r, 1.0) * e.power;
}

// The log-ratio of a token that has no old log-prob.
FINEALIGN_FORMULA double no_log_ratio(double logp) { return logp == logp ? 0 : logp; }

// The functions of formulas/surrogate.py. ratio is ratio_of(log_ratio), a the advantage. The choices are written one after
// the other, so that the compiler vectorises a loop over tokens.
FINEALIGN_FORMULA Item surrogate_of(Psi psi, double log_ratio, double ratio, double a, double logp, double first,
                                    double second, double dual) {
  if (psi == Psi::score_function) return {-a * logp, -a};
  if (psi == Psi::capped) {
    const double push = -held(ratio, first, second) * a;
    return {push * logp, push};
  }
  const bool beyond = is_beyond(log_ratio);
  if (psi == Psi::soft_gate) {
    const double tau = a > 0 ? first : second;
    const Logistic at = logistic_of(tau * sum_of(ratio, -1));
    const double slope = -4 * a * ratio * at.up * at.down;
    return {-4 * a * at.up / tau, beyond ? 0 : slope};
  }
  const double free = -a * ratio, clipped = -a * held(ratio, first, second), most = -a * dual;
  const double larger = clipped > free ? clipped : free;  // a NaN is in both of them
  const double moving = clipped > free ? 0 : free, slope = beyond ? 0 : moving;
  const double least = most < larger ? most : larger, below = ratio > dual ? 0 : slope;
  return {a < 0 ? least : larger, a < 0 ? below : slope};
}

// The same; with A = 0 the result is exactly 0, unless the log-ratio is NaN.
FINEALIGN_FORMULA Item policy_loss_of(Psi psi, double log_ratio, double ratio, double a, double logp, double first,
                                      double second, double dual) {
  const Item item = surrogate_of(psi, log_ratio, ratio, a, logp, first, second, dual);
  const bool none = (a == 0) & (log_ratio == log_ratio);
  return {none ? 0 : item.value, none ? 0 : item.slope};
}

// The estimators of formulas/divergence.py, d = logp - ref_logp. log_ratio and ratio are those of the token, even if psi
// takes those of the row.
FINEALIGN_FORMULA Item divergence_of(Estimator estimator, double d, double log_ratio, double ratio) {
  if (estimator == Estimator::k1) return {d, 1};
  if (estimator == Estimator::k2) return {d * d / 2, d};
  const double near = near_of(d), less = expm1_of(-near), value = less + near, slope = is_beyond(d) ? 0 : -less;
  if (estimator == Estimator::k3) return {value, slope};
  if (estimator == Estimator::k3_k2grad) return {value, is_beyond(d) ? 0 : d};
  const bool flat = (is_beyond(d) | is_beyond(log_ratio)) & (d == d);  // a NaN stays NaN
  return {ratio * value, ratio * (flat ? 0 : d)};
}

// One over the share of a token, without the factor of its row's tokens that ShareOf::row adds.
struct Divisors {
  double policy, kl, entropy;
};

FINEALIGN_BOTH inline double one_for_none(double x) { return x == 0 ? 1 : x; }

FINEALIGN_BOTH inline Divisors divisors_of(const PolicyLossForward& op, const Totals& of) {
  if (of.bad != 0) return {NAN, NAN, NAN};
  Divisors by{one_for_none(of.weight), one_for_none(of.length), one_for_none(of.length)};
  if (op.share != ShareOf::batch)
    by.policy = by.kl = one_for_none(op.count_empty ? static_cast<double>(op.segments.count) : of.rows);
  if (op.denominator.given()) by.policy = by.kl = op.denominator();
  if (op.max_length.given()) by.policy *= op.max_length(), by.kl *= op.max_length();
  if (op.entropy_denominator.given()) by.entropy = op.entropy_denominator();
  return by;
}

// The shares of a token. With ShareOf::row they depend on the token's row.
struct Shares {
  double policy, kl, entropy;
};

FINEALIGN_BOTH inline Shares shares_of(const PolicyLossForward& op, const Divisors& by, const Row* row) {
  const bool divides = op.share == ShareOf::row;
  const double kl = 1 / (divides ? by.kl * one_for_none(row->length) : by.kl);
  const double policy = 1 / (divides ? by.policy * one_for_none(row->weight) : by.policy);
  return {policy, kl, op.entropy_by_token ? 1 / by.entropy : kl};
}

// The log-ratio that psi takes in a row, and its derivative with respect to the token's log-ratio, relative to the share.
FINEALIGN_BOTH inline double log_ratio_of(RatioOf ratio, const Row& row) {
  return ratio == RatioOf::row_mean ? row.log_ratio / one_for_none(row.length) : row.log_ratio;
}
FINEALIGN_BOTH inline double stretch_of(RatioOf ratio, const Row* row) {
  return ratio == RatioOf::row_sum ? row->length : 1;
}

// d loss / d logp; kl_step = kl_coef c'. A term with weight 0 may be NaN; it is left out.
FINEALIGN_FORMULA double policy_slope_of(double weight, double slope, double kl_step, double push) {
  return fma(kl_step, push, weight != 0 ? weight * slope : 0);
}

// The loss, from the sums over the batch.
FINEALIGN_BOTH inline double loss_of(const PolicyLossForward& op, const Terms& total) {
  double loss = total.of[kPolicyTerm];
  if (op.kl_coef != 0) loss = fma(op.kl_coef, total.of[kKlTerm], loss);
  if (op.entropy_coef != 0) loss = fma(-op.entropy_coef, total.of[kEntropyTerm], loss);
  return loss;
}

FINEALIGN_BOTH inline double number_of(const Terms& total, int term) {
  const double tokens = one_for_none(total.of[kTokens]);
  return term < kRatio ? total.of[term] : total.of[term] / tokens;
}

// ---- moments and KL rewards ----------------------------------------------------------------------------------------

// `moments` of finealign_kernels/formulas/returns.py, for n values: Σx, Σx², μ and Σ(x - μ)².
struct Moments {
  double n, sum, squares, mean, away;
};

// The moments of two parts of a batch together: deviations from each part's own mean, and the difference of the means.
FINEALIGN_BOTH inline Moments operator+(Moments x, Moments y) {
  if (x.n == 0) return y;
  if (y.n == 0) return x;
  const double n = x.n + y.n, apart = y.mean - x.mean, share = y.n / n;
  return {n, x.sum + y.sum, x.squares + y.squares, x.mean + apart * share, x.away + y.away + apart * apart * x.n * share};
}

// The moments of n >= 1 values, from the sums of x - first and of its square, where first is one of the values.
FINEALIGN_BOTH inline Moments moments_about(double first, double n, double d, double dd) {
  const double away = dd - d * (d / n);
  return {n, n * first + d, first * (n * first + 2 * d) + dd, first + d / n, away < 0 ? 0 : away};
}

struct Standard {
  double mean, scale;  // scale is 0 if the values do not differ
};

// `standard` of finealign_kernels/formulas/returns.py.
FINEALIGN_BOTH inline Standard standard(const double* known, Scale scale, bool unbiased, bool wide) {
  const Moments of{known[0], known[1], known[2], known[3], known[4]};
  const double n = of.n < 1 ? 1 : of.n, mean = of.mean, square = of.squares / n;
  double v = square == INFINITY ? NAN : of.away / n;  // the sum has overflowed
  if (of.n < 2 || v <= (wide ? 0x1p-104 : 0x1p-46) * square) return {mean, 0};
  if (unbiased) v *= n / (n - 1);
  const double spread = scale == Scale::std ? v + 1e-8 : scale == Scale::clamp ? (v < 1e-8 ? 1e-8 : v) : sqrt(v) + 1e-8;
  return {mean, 1 / sqrt(spread)};
}

// The estimate of KL from one token, d = old_logp - ref_logp, by one of the first three functions of formulas/divergence.py.
FINEALIGN_BOTH inline double divergence(Estimator estimator, double d) {
  if (estimator == Estimator::k1) return d;
  if (estimator == Estimator::k2) return d * d / 2;
  d = d < -20 ? -20 : d > 20 ? 20 : d;
  return expm1(-d) + d;
}

}  // namespace finealign
