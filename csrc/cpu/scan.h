// What the CPU kernels with a recurrence share: the scan of a group, and how long sequences are cut.
#pragma once

#include <vector>

#include "segments.h"

// As FINEALIGN_WIDE, but without a fused multiply-add: both versions round alike, whatever they compute.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FINEALIGN_WIDE_UNFUSED __attribute__((target_clones("default", "avx2")))
#else
#define FINEALIGN_WIDE_UNFUSED
#endif

namespace finealign {
namespace {

inline int whole_groups(int n) { return (n + kGroup - 1) / kGroup * kGroup; }

// y_i = d_i + a_i y_(i+1), y_n = y, over d; n a multiple of kGroup. In a group the sums without y come first, so that
// one product and one addition a group wait for the group before; the decays' products are q. Returns y_0.
FINEALIGN_INLINE double scan_back(double* __restrict d, const double* __restrict a, int n, double y) {
  for (int g = n - kGroup; g >= 0; g -= kGroup) {
    double p[kGroup], q[kGroup];
    p[kGroup - 1] = d[g + kGroup - 1], q[kGroup - 1] = a[g + kGroup - 1];
    for (int k = kGroup - 2; k >= 0; --k) p[k] = d[g + k] + a[g + k] * p[k + 1], q[k] = a[g + k] * q[k + 1];
    for (int k = 0; k < kGroup; ++k) d[g + k] = p[k] + q[k] * y;
    y = d[g];
  }
  return y;
}

// The same, bit for bit, where every a_i is a.
FINEALIGN_INLINE double scan_back(double* __restrict d, double a, int n, double y) {
  double q[kGroup];
  q[kGroup - 1] = a;
  for (int k = kGroup - 2; k >= 0; --k) q[k] = a * q[k + 1];
  for (int g = n - kGroup; g >= 0; g -= kGroup) {
    double p[kGroup];
    p[kGroup - 1] = d[g + kGroup - 1];
    for (int k = kGroup - 2; k >= 0; --k) p[k] = d[g + k] + a * p[k + 1];
    for (int k = 0; k < kGroup; ++k) d[g + k] = p[k] + q[k] * y;
    y = d[g];
  }
  return y;
}

// y_i = d_i + a_i y_(i-1), y_(-1) = y: the mirror image.
FINEALIGN_INLINE double scan_ahead(double* __restrict d, const double* __restrict a, int n, double y) {
  for (int g = 0; g < n; g += kGroup) {
    double p[kGroup], q[kGroup];
    p[0] = d[g], q[0] = a[g];
    for (int k = 1; k < kGroup; ++k) p[k] = d[g + k] + a[g + k] * p[k - 1], q[k] = a[g + k] * q[k - 1];
    for (int k = 0; k < kGroup; ++k) d[g + k] = p[k] + q[k] * y;
    y = d[g + kGroup - 1];
  }
  return y;
}

// Asks for bytes that will be needed soon, so that they come while something else is computed.
template <typename T>
FINEALIGN_INLINE void prefetch(const T* first, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(first + i);
}

// Product of n decays, a multiple of kGroup of them.
FINEALIGN_INLINE double product(const double* a, int n) {
  double q[kGroup];
  std::fill(q, q + kGroup, 1.0);
  for (int i = 0; i < n; i += kGroup)
    for (int k = 0; k < kGroup; ++k) q[k] *= a[i + k];
  for (int half = kGroup / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) q[k] *= q[k + half];
  return q[0];
}

// The map y -> b + a y of a piece.
struct Affine {
  double a, b;

  // Decays above 1 may overflow in a product; what meets 0 stays 0 all the same.
  double operator()(double y) const { return y == 0 && a == a ? b : b + a * y; }
};

// Tokens [first, stop) of sequence s, at most kCut of them; first is start(s) + a multiple of kCut.
struct Piece {
  int64_t s, first, stop;
};

// The pieces of all sequences longer than kCut, in order.
inline std::vector<Piece> cut(const Segments& segments, int64_t longest) {
  std::vector<Piece> pieces;
  for (int64_t s = 0; longest > kCut && s < segments.count; ++s) {
    const int64_t start = segments.start(s), stop = segments.start(s + 1);
    for (int64_t first = start; stop - start > kCut && first < stop; first += kCut)
      pieces.push_back({s, first, std::min(first + kCut, stop)});
  }
  return pieces;
}

// each(window, first, last) for all runs of neighbours among the sequences of at most kCut tokens, sequences first to
// last - 1, which have no more than that together. Those that start in tokens [window kBlock, (window + 1) kBlock) come
// in order, on one thread.
template <typename Each>
void for_short(const Segments& segments, Parallel parallel, Each each) {
  parallel(segments.total / kBlock + 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
      const int64_t stop = first_from(segments, (window + 1) * kBlock);
      for (int64_t first = first_from(segments, window * kBlock), last; first < stop; first = last) {
        const int64_t limit = segments.start(first) + kCut;
        for (last = first; last < stop && segments.start(last + 1) <= limit;) ++last;
        if (last == first) ++last;  // a long one
        else each(window, first, last);
      }
    }
  });
}

template <typename Each>
void for_pieces(const std::vector<Piece>& pieces, Parallel parallel, Each each) {
  if (pieces.empty()) return;
  parallel(static_cast<int64_t>(pieces.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) each(i, pieces[i]);
  });
}

}  // namespace
}  // namespace finealign
