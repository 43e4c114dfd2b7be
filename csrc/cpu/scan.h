// Shared by the CPU kernels with a recurrence: the scan of a group of tokens, and how long sequences are cut.
#pragma once

#include <vector>

#include "recurrence.h"
#include "segments.h"

// As FINEALIGN_WIDE, but without fused multiply-add, so that both versions always round the same.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FINEALIGN_WIDE_UNFUSED __attribute__((target_clones("default", "avx2")))
#else
#define FINEALIGN_WIDE_UNFUSED
#endif

namespace finealign {
namespace {

// Prefetches bytes that will be needed soon.
template <typename T>
FINEALIGN_INLINE void prefetch(const T* first, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(first + i);
}

// The product of n decays.
FINEALIGN_INLINE double product(const double* a, int n) {
  constexpr int kWays = 8;
  double q[kWays];
  std::fill(q, q + kWays, 1.0);
  for (int i = 0; i < n; ++i) q[i % kWays] *= a[i];
  for (int half = kWays / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) q[k] *= q[k + half];
  return q[0];
}

// a to the power n.
inline double power(double a, int64_t n) {
  double all = 1;
  for (; n > 0; n /= 2, a *= a)
    if (n % 2) all *= a;
  return all;
}

// The map y -> b + a y of a piece.
struct Affine {
  double a, b;

  // A product of decays above 1 may overflow to inf; multiplied by 0 it still gives 0.
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

constexpr int64_t kRun = 8 * kTile;  // so many tokens stay in the cache between the steps
inline int64_t windows_of(const Segments& segments) { return segments.total / kRun + 1; }

// Calls each(window, first, last) for all sequences of at most kCut tokens, in runs of adjacent ones, first to last - 1. A run
// has at most kRun tokens, or is one sequence. Sequences that start in tokens [window kRun, (window + 1) kRun) are computed in
// order by one thread; a thread takes at least kBlock tokens.
template <typename Each>
void for_short(const Segments& segments, Parallel parallel, Each each) {
  parallel(windows_of(segments), kBlock / kRun, [&](int64_t begin, int64_t end) {
    for (int64_t window = begin; window < end; ++window) {
      const int64_t stop = first_from(segments, (window + 1) * kRun);
      for (int64_t first = first_from(segments, window * kRun), last; first < stop; first = last) {
        const int64_t start = segments.start(first), limit = start + kRun;
        last = std::min(first_from(segments, limit + 1), stop);
        if (segments.start(last) > limit) --last;
        last = std::max(last, first + 1);
        if (segments.start(last) - start <= kCut) each(window, first, last);
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
