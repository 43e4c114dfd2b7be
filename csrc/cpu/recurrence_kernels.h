// The recurrences, written once with the compiler's vectors of four and compiled for each instruction set: the including
// file defines FINEALIGN_ISA and gets its flags from setup.py. No inline function of the standard library may be called: the
// linker might give the copy compiled for a wide processor to a narrow one.
#include <cstring>
#ifdef __AVX__
#include <immintrin.h>
#endif

#include "recurrence.h"

#define FINEALIGN_INLINE inline __attribute__((always_inline))

namespace finealign {
namespace FINEALIGN_ISA {
namespace {

typedef double Four __attribute__((vector_size(kFour * sizeof(double))));
typedef float Narrow __attribute__((vector_size(kFour * sizeof(float))));

FINEALIGN_INLINE Four all_of(double x) { return Four{x, x, x, x}; }

FINEALIGN_INLINE Four four(const double* x) {
  Four out;
  std::memcpy(&out, x, sizeof out);
  return out;
}
FINEALIGN_INLINE Four four(const float* x) {
#ifdef __AVX__
  return _mm256_cvtps_pd(_mm_loadu_ps(x));  // one instruction; gcc would use two
#else
  Narrow out;
  std::memcpy(&out, x, sizeof out);
  return __builtin_convertvector(out, Four);
#endif
}

FINEALIGN_INLINE void put(Four x, double* out) { std::memcpy(out, &x, sizeof x); }
FINEALIGN_INLINE void put(Four x, float* out) {
  const Narrow narrow = __builtin_convertvector(x, Narrow);
  std::memcpy(out, &narrow, sizeof narrow);
}

// Loads count < kFour tokens as the last of four, and stores them.
template <typename T>
FINEALIGN_INLINE Four last_of(const T* x, int64_t count) {
  if (count == 1) return Four{0, 0, 0, x[0]};
  if (count == 2) return Four{0, 0, x[0], x[1]};
  return Four{0, x[0], x[1], x[2]};
}
template <typename T>
FINEALIGN_INLINE void put_last(Four y, T* out, int64_t count) {
  out[count - 1] = static_cast<T>(y[3]);
  if (count > 1) out[count - 2] = static_cast<T>(y[2]);
  if (count > 2) out[count - 3] = static_cast<T>(y[1]);
}

// The values one token, or two, to the right of each of four tokens (to the left with kForward). `beside` holds the next four.
template <bool kForward>
FINEALIGN_INLINE Four one_on(Four x, Four beside) {
  return kForward ? Four{beside[3], x[0], x[1], x[2]} : Four{x[1], x[2], x[3], beside[0]};
}
template <bool kForward>
FINEALIGN_INLINE Four two_on(Four x, Four beside) {
  return kForward ? Four{beside[2], beside[3], x[0], x[1]} : Four{x[2], x[3], beside[0], beside[1]};
}

// y_i = d_i + a_i y_(i+1), four tokens a step from right to left; with kForward y_i = d_i + a_i y_(i-1) from left to right.
// Sums over 2, 4 and 8 tokens are made first, by doubling, so that for eight tokens only one product and one addition
// depend on the tokens before. The y that enters is treated as one more token before the first. The bits of a token do not
// depend on its place among the four.
template <bool kForward>
class Recurrence {
 public:
  explicit Recurrence(double y) : d_(kForward ? Four{0, 0, 0, y} : Four{y, 0, 0, 0}), sum2_(d_), sum4_(d_), near_(d_) {}

  FINEALIGN_INLINE Four step(Four d, Four a) {
    const Four sum2 = d + a * one_on<kForward>(d, d_), a2 = a * one_on<kForward>(a, a_);
    const Four sum4 = sum2 + a2 * two_on<kForward>(sum2, sum2_), a4 = a2 * two_on<kForward>(a2, a2_);
    const Four y = (sum4 + a4 * sum4_) + (a4 * a4_) * far_;
    a_ = a, a2_ = a2, a4_ = a4;
    return shift(d, sum2, sum4, y);
  }

  // The same bits if all decays are a; a2, a4 and a8 are its powers.
  FINEALIGN_INLINE Four step(Four d, Four a, Four a2, Four a4, Four a8) {
    const Four sum2 = d + a * one_on<kForward>(d, d_);
    const Four sum4 = sum2 + a2 * two_on<kForward>(sum2, sum2_);
    return shift(d, sum2, sum4, (sum4 + a4 * sum4_) + a8 * far_);
  }

 private:
  FINEALIGN_INLINE Four shift(Four d, Four sum2, Four sum4, Four y) {
    d_ = d, sum2_ = sum2, sum4_ = sum4, far_ = near_, near_ = y;
    return y;
  }

  Four d_, sum2_, sum4_, near_, far_{};  // of the four tokens before; far: y of the four before them
  Four a_ = all_of(1), a2_ = all_of(1), a4_ = all_of(1);
};

template <bool kForward>
double scan_array(double* __restrict d, const double* __restrict a, int n, double y) {
  if (n == 0) return y;
  Recurrence<kForward> recurrence(y);
  for (int i = 0; i < n; i += kFour) {
    const int at = kForward ? i : n - kFour - i;
    put(recurrence.step(four(d + at), four(a + at)), d + at);
  }
  return d[kForward ? n - 1 : 0];
}

template <bool kCritic, bool kStores, typename T>
FINEALIGN_INLINE void scan(const T* __restrict rewards, const T* __restrict values, int64_t n, State& state,
                           const Rates& rates, T* __restrict advantages, T* __restrict returns) {
  if (n == 0) return;
  const double decay2 = rates.decay * rates.decay, decay4 = decay2 * decay2;
  const Four a = all_of(rates.decay), a2 = all_of(decay2), a4 = all_of(decay4), a8 = all_of(decay4 * decay4);
  const Four gamma = all_of(rates.gamma), mean = all_of(rates.mean), scale = all_of(rates.scale);
  Recurrence<false> recurrence(state.y);
  Four beside = all_of(state.ahead), v{}, y{};
  const auto step = [&](Four r) __attribute__((always_inline)) {
    if (rates.whitens) r = rates.scale == 0 ? mean : (r - mean) * scale + mean;
    const Four delta = (r - v) + gamma * one_on<false>(v, beside);
    y = recurrence.step(delta, a, a2, a4, a8), beside = v;
  };
  int64_t left = n;
  for (; left >= kFour; left -= kFour) {
    const int64_t at = left - kFour;
    if (kCritic) v = four(values + at);
    step(four(rewards + at));
    if (kStores) put(y, advantages + at), put(y + v, returns + at);
  }
  state.seen = true, state.y = y[0], state.ahead = v[0];
  if (left == 0) return;
  if (kCritic) v = last_of(values, left);
  step(last_of(rewards, left));
  if (kStores) put_last(y, advantages, left), put_last(y + v, returns, left);
  state.y = left == 1 ? y[3] : left == 2 ? y[2] : y[1];
  state.ahead = left == 1 ? v[3] : left == 2 ? v[2] : v[1];
}

template <typename T>
void scan_valid(const T* rewards, const T* values, int64_t n, State& state, const Rates& rates, T* advantages,
                T* returns) {
  if (values && advantages) return scan<true, true>(rewards, values, n, state, rates, advantages, returns);
  if (values) return scan<true, false>(rewards, values, n, state, rates, advantages, returns);
  if (advantages) return scan<false, true>(rewards, values, n, state, rates, advantages, returns);
  scan<false, false>(rewards, values, n, state, rates, advantages, returns);
}

}  // namespace

extern const Recurrences kRecurrences;
const Recurrences kRecurrences{scan_valid<float>, scan_valid<double>, scan_array<false>, scan_array<true>};

}  // namespace FINEALIGN_ISA
}  // namespace finealign
