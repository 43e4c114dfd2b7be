// Losses of whole sequences on a CPU, for one dtype: tokens to scores, scores to losses and slopes, and gradients to tokens.
// The including file defines FINEALIGN_DTYPE, the C++ type of logp.

#include <type_traits>
#include <vector>

#include "formulas.cuh"
#include "sequence_loss.h"

namespace finealign {
namespace {

template <typename T>
using WideOf = typename Wide<T>::type;

constexpr int64_t kShort = 16;   // in sequences of at most so many tokens, the slope is copied to each token

// The inputs of tokens; all but logp may be null.
template <typename T>
struct Sources {
  const T *logp, *ref;
  const WideOf<T>* weight;
  const uint8_t* mask;
};

template <typename T>
Sources<T> sources_of(const SequenceLossForward& op, int64_t first = 0) {
  const auto from = [first](const auto* p) { return p == nullptr ? p : p + first; };
  return {static_cast<const T*>(op.logp) + first, from(static_cast<const T*>(op.ref_logp)),
          from(static_cast<const WideOf<T>*>(op.tokens.weight)), from(op.tokens.segments.mask)};
}

// Which of the inputs are given, as constants for the compiler.
template <bool kRef, bool kMask, bool kWeight>
struct Has {
  static constexpr bool ref = kRef, mask = kMask, weight = kWeight;
};

template <typename T, typename F>
FINEALIGN_INLINE void by_inputs(const Sources<T>& at, F f) {
  const int which = (at.ref != nullptr) * 4 + (at.mask != nullptr) * 2 + (at.weight != nullptr);
  if (which == 0) f(Has<false, false, false>());
  if (which == 1) f(Has<false, false, true>());
  if (which == 2) f(Has<false, true, false>());
  if (which == 3) f(Has<false, true, true>());
  if (which == 4) f(Has<true, false, false>());
  if (which == 5) f(Has<true, false, true>());
  if (which == 6) f(Has<true, true, false>());
  if (which == 7) f(Has<true, true, true>());
}

// sum + w (logp - ref) of token i. A token that is masked or has weight 0 may hold NaN, and so may the weight of a masked
// token. They are therefore selected, not multiplied by 0.
template <typename H, typename T>
FINEALIGN_INLINE double add_score(H, const Sources<T>& at, int64_t i, double sum) {
  using A = WideOf<T>;
  A x = load(at.logp[i]);
  if (H::ref) x -= load(at.ref[i]);
  A weight = H::weight ? at.weight[i] : 1;
  if (H::mask) weight = at.mask[i] ? weight : 0;
  if (H::mask || H::weight) x = weight != 0 ? x : 0;
  return H::weight ? fma(static_cast<double>(weight), static_cast<double>(x), sum) : sum + x;
}

// sum + w of token i, or sum + 1 if tokens are counted; a masked token adds 0.
template <typename H, typename T>
FINEALIGN_INLINE double add_weight(H, const Sources<T>& at, int64_t i, double sum, bool counts) {
  using A = WideOf<T>;
  A weight = H::weight && !counts ? at.weight[i] : 1;
  if (H::mask) weight = at.mask[i] ? weight : 0;
  return sum + weight;
}

// add_score of kLanes tokens from i on, with one loop for each step. A loop has numbers of one width, so its vectors are full.
template <typename H, typename T>
FINEALIGN_INLINE void add_scores(H, const Sources<T>& at, int64_t i, double* __restrict sum) {
  using A = WideOf<T>;
  using Word = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  A x[kLanes], weight[kLanes];
  Word keep[kLanes];
  for (int j = 0; j < kLanes; ++j) x[j] = load(at.logp[i + j]);
  if (H::ref)
    for (int j = 0; j < kLanes; ++j) x[j] -= load(at.ref[i + j]);
  if (H::mask)
    for (int j = 0; j < kLanes; ++j) keep[j] = at.mask[i + j];
  if (H::weight)
    for (int j = 0; j < kLanes; ++j) weight[j] = at.weight[i + j];
  if (H::mask && H::weight)
    for (int j = 0; j < kLanes; ++j) weight[j] = keep[j] ? weight[j] : 0;
  if (H::weight)
    for (int j = 0; j < kLanes; ++j) x[j] = weight[j] != 0 ? x[j] : 0;
  else if (H::mask)
    for (int j = 0; j < kLanes; ++j) x[j] = keep[j] ? x[j] : 0;
  for (int j = 0; j < kLanes; ++j)
    sum[j] = H::weight ? fma(static_cast<double>(weight[j]), static_cast<double>(x[j]), sum[j]) : sum[j] + x[j];
}

template <typename H, typename T>
FINEALIGN_INLINE void add_weights(H has, const Sources<T>& at, int64_t i, double* __restrict sum) {
  for (int j = 0; j < kLanes; ++j) sum[j] = add_weight(has, at, i + j, sum[j], false);
}

// A lane for each of n <= kWidth tokens; lanes from n on are 0.
template <int kWidth, typename Add>
FINEALIGN_INLINE double sum_of_few(int64_t n, Add add) {
  double lane[kWidth] = {};
  for (int64_t j = 0; j < n; ++j) lane[j] = add(j, 0.0);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// The sum over at most kChunk tokens in the order of launch.h. add_all(i, sums) adds kLanes tokens, add(i, sum) adds one.
template <typename AddAll, typename Add>
FINEALIGN_INLINE double sum_by_lanes(int64_t n, AddAll add_all, Add add) {
  if (n == 1) return add(0, 0.0);
  if (n <= 4) return sum_of_few<4>(n, add);
  if (n <= 16) return sum_of_few<16>(n, add);
  double lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add_all(i, lane);
  for (int j = 0; i + j < n; ++j) lane[j] = add(i + j, lane[j]);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

template <typename H, typename T>
FINEALIGN_INLINE double score_by_lanes(H has, const Sources<T>& at, int64_t first, int64_t n) {
  return sum_by_lanes(
      n,
      [&](int64_t i, double* sums) __attribute__((always_inline)) { add_scores(has, at, first + i, sums); },
      [&](int64_t i, double sum) __attribute__((always_inline)) { return add_score(has, at, first + i, sum); });
}

// Σ w of n tokens, or the number of those that the mask keeps, which is exact in any order.
template <typename T>
FINEALIGN_INLINE double weight_of(const Sources<T>& at, int64_t first, int64_t n, bool counts) {
  if (counts && at.mask == nullptr) return n;
  if (counts) {
    int32_t count = 0;
    for (int64_t i = first; i < first + n; ++i) count += at.mask[i] != 0;
    return count;
  }
  const auto sum = [&](auto has) __attribute__((always_inline)) {
    return sum_by_lanes(
        n,
        [&](int64_t i, double* sums) __attribute__((always_inline)) { add_weights(has, at, first + i, sums); },
        [&](int64_t i, double one) __attribute__((always_inline)) { return add_weight(has, at, first + i, one, false); });
  };
  return at.mask == nullptr ? sum(Has<false, false, true>()) : sum(Has<false, true, true>());
}

// The sums of a chunk: Σ w (logp - ref), and the divisor of an average.
struct Part {
  double score = 0, weight = 0;
};

// The sums of sequences [s, s + n). If there are parts, they hold the sums of whole chunks. weight may be null.
template <typename T>
FINEALIGN_INLINE void sums_of(const Sources<T>& at, const Segments& segments, const Part* parts, int64_t s, int64_t n,
                              bool counts, double* __restrict score, double* __restrict weight) {
  by_inputs(at, [&](auto has) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) {
      int64_t token = segments.start(s + i);
      const int64_t stop = segments.start(s + i + 1);
      double sum = 0;
      if (parts != nullptr)
        for (; token + kChunk <= stop; token += kChunk) sum += parts[token / kChunk].score;
      score[i] = token < stop ? sum + score_by_lanes(has, at, token, stop - token) : sum;
    }
  });
  if (weight == nullptr) return;
  for (int64_t i = 0; i < n; ++i) {
    int64_t token = segments.start(s + i);
    const int64_t stop = segments.start(s + i + 1);
    double sum = 0;
    if (parts != nullptr)
      for (; token + kChunk <= stop; token += kChunk) sum += parts[token / kChunk].weight;
    weight[i] = token < stop ? sum + weight_of(at, token, stop - token, counts) : sum;
  }
}

// The same for sequences of one token each, the first of them token s.
template <typename T>
FINEALIGN_INLINE void ones(const Sources<T>& at, int64_t s, int64_t n, bool counts, double* __restrict score,
                           double* __restrict weight) {
  by_inputs(at, [&](auto has) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; ++i) score[i] = add_score(has, at, s + i, 0);
    if (weight != nullptr)
      for (int64_t i = 0; i < n; ++i) weight[i] = add_weight(has, at, s + i, 0, counts);
  });
}

// Scores from sums: the reference's sum is subtracted, and the result is divided by the divisor of the average, which is 1 if
// there is no token.
template <typename A>
FINEALIGN_INLINE void finish(int64_t n, const A* __restrict ref_sum, double* __restrict score,
                             double* __restrict weight, A* __restrict out, A* __restrict denominator) {
  if (ref_sum != nullptr)
    for (int64_t i = 0; i < n; ++i) score[i] -= ref_sum[i];
  if (weight != nullptr)
    for (int64_t i = 0; i < n; ++i) {
      weight[i] = weight[i] == 0 ? 1 : weight[i];
      denominator[i] = static_cast<A>(weight[i]);
      score[i] /= weight[i];
    }
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<A>(score[i]);
}

// out[i] = value · weight[i], or 0 where the mask is false or the weight is 0; weight and mask may be null.
template <typename T, typename A>
FINEALIGN_INLINE void spread(A value, const A* __restrict weight, const uint8_t* __restrict mask, int64_t n,
                             T* __restrict out) {
  const T stored = store<T>(value), zero = store<T>(A(0));
  if (weight == nullptr && mask == nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = stored;
  else if (weight == nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = mask[i] ? stored : zero;
  else {
    for (int64_t i = 0; i < n; ++i) {
      const A each = weight[i] != 0 ? value : 0;
      out[i] = store<T>(each * weight[i]);
    }
    if (mask != nullptr)
      for (int64_t i = 0; i < n; ++i) out[i] = mask[i] ? out[i] : zero;
  }
}

// The same with one value for each token.
template <typename T, typename A>
FINEALIGN_INLINE void spread_each(const A* __restrict value, const A* __restrict weight,
                                  const uint8_t* __restrict mask, int64_t n, T* __restrict out) {
  const T zero = store<T>(A(0));
  if (weight == nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = store<T>(value[i]);
  else
    for (int64_t i = 0; i < n; ++i) {
      const A each = weight[i] != 0 ? value[i] : 0;
      out[i] = store<T>(each * weight[i]);
    }
  if (mask != nullptr)
    for (int64_t i = 0; i < n; ++i) out[i] = mask[i] ? out[i] : zero;
}

// Upstream gradient times slope divided by denominator. An item that is not counted has upstream 0 and gives 0, even if its
// slope is NaN.
template <typename A>
FINEALIGN_INLINE void scale_slopes(const double* __restrict upstream, const A* __restrict slope,
                                   const A* __restrict denominator, int64_t n, A* __restrict each) {
  if (denominator == nullptr)
    for (int64_t i = 0; i < n; ++i) each[i] = static_cast<A>(upstream[i] == 0 ? 0 : upstream[i] * slope[i]);
  else
    for (int64_t i = 0; i < n; ++i)
      each[i] = static_cast<A>(upstream[i] == 0 ? 0 : upstream[i] * slope[i] / denominator[i]);
}

// target_clones cannot be used with templates: these are functions of one type, FINEALIGN_DTYPE.
namespace wide {
#define FINEALIGN_OF_TOKENS(T, A)                                                                                      \
  FINEALIGN_WIDE void of_sequences(const Sources<T>& at, const Segments& segments, const Part* parts, int64_t s,       \
                                   int64_t n, bool counts, double* score, double* weight) {                            \
    sums_of(at, segments, parts, s, n, counts, score, weight);                                                         \
  }                                                                                                                    \
  FINEALIGN_WIDE void of_ones(const Sources<T>& at, int64_t s, int64_t n, bool counts, double* score,                  \
                              double* weight) {                                                                        \
    ones(at, s, n, counts, score, weight);                                                                             \
  }                                                                                                                    \
  FINEALIGN_WIDE void to_tokens(A value, const A* weight, const uint8_t* mask, int64_t n, T* out) {                    \
    spread(value, weight, mask, n, out);                                                                               \
  }                                                                                                                    \
  FINEALIGN_WIDE void to_each(const A* value, const A* weight, const uint8_t* mask, int64_t n, T* out) {               \
    spread_each(value, weight, mask, n, out);                                                                          \
  }
FINEALIGN_OF_TOKENS(FINEALIGN_DTYPE, WideOf<FINEALIGN_DTYPE>)
#define FINEALIGN_OF_SEQUENCES(A)                                                                                      \
  FINEALIGN_WIDE void finish(int64_t n, const A* ref_sum, double* score, double* weight, A* out, A* denominator) {     \
    finealign::finish(n, ref_sum, score, weight, out, denominator);                                                    \
  }                                                                                                                    \
  FINEALIGN_WIDE void slopes(const double* upstream, const A* slope, const A* denominator, int64_t n, A* each) {       \
    scale_slopes(upstream, slope, denominator, n, each);                                                               \
  }
FINEALIGN_OF_SEQUENCES(WideOf<FINEALIGN_DTYPE>)
}  // namespace wide

// Writes the scores of sequences [s, s + n) into h, not rounded, and into the results, rounded.
template <typename T>
void scores_of(const SequenceLossForward& op, const Part* parts, int64_t s, int64_t n, double* h) {
  using A = WideOf<T>;
  const Segments& segments = op.tokens.segments;
  double sums[2 * kItems], *weight = op.denominator != nullptr ? sums : nullptr;
  if (segments.cu_seqlens == nullptr && segments.width == 1)
    wide::of_ones(sources_of<T>(op), s, n, op.tokens.counts(), h, weight);
  else
    wide::of_sequences(sources_of<T>(op), segments, parts, s, n, op.tokens.counts(), h, weight);
  wide::finish(n, op.ref_sum ? static_cast<const A*>(op.ref_sum) + s : nullptr, h, weight,
               static_cast<A*>(op.score) + s, weight ? static_cast<A*>(op.denominator) + s : nullptr);
}

template <typename T>
void forward(const SequenceLossForward& op, Parallel parallel) {
  using A = WideOf<T>;
  const Segments& segments = op.tokens.segments;
  A *slope = static_cast<A*>(op.slope), *losses = static_cast<A*>(op.losses);
  const bool long_ones = segments.cu_seqlens != nullptr || segments.width >= kChunk;
  std::vector<Part> parts(long_ones ? segments.total / kChunk : 0);
  if (long_ones)
    for_whole_chunks(segments, parallel, [&](int64_t k, int64_t first) {
      const Segments chunk{nullptr, false, 1, kChunk, nullptr, kChunk};
      Part& part = parts[k];
      wide::of_sequences(sources_of<T>(op, first), chunk, nullptr, 0, 1, op.tokens.counts(), &part.score,
                         op.denominator ? &part.weight : nullptr);
    });
  const Part* sums = parts.empty() ? nullptr : parts.data();
  const int64_t items = op.items(), each = std::max<int64_t>(1, segments.total / std::max<int64_t>(1, items));
  parallel(items, std::max<int64_t>(1, kBlock / std::min<int64_t>(each, 2 * kChunk)), [&](int64_t begin, int64_t end) {
    Items at;
    double h[2 * kItems];
    for (int64_t from = begin; from < end; from += kItems) {
      const int64_t n = std::min(kItems, end - from);
      if (op.pairs == Pairs::interleaved) {
        scores_of<T>(op, sums, 2 * from, 2 * n, h);
        for (int64_t i = 0; i < n; ++i) at.chosen[i] = h[2 * i], at.rejected[i] = h[2 * i + 1];
      } else {
        scores_of<T>(op, sums, from, n, at.chosen);
        if (op.pairs == Pairs::halves) scores_of<T>(op, sums, items + from, n, at.rejected);
      }
      for (int64_t i = 0; i < n; ++i) {
        at.shift[i] = op.shifts ? op.shifts[from + i] : op.shift, at.hyper[i] = op.hypers ? op.hypers[from + i] : op.hyper;
        at.sign[i] = op.sign ? op.sign[from + i] : 1;
      }
      losses_of_items(op, n, at);
      for (int64_t i = 0; i < n; ++i) {
        losses[from + i] = static_cast<A>(at.value[i]);
        slope[chosen_of(op.pairs, from + i)] = static_cast<A>(at.chosen[i]);
        if (op.pairs != Pairs::none) slope[rejected_of(op.pairs, from + i, items)] = static_cast<A>(at.rejected[i]);
      }
    }
  });
}

// value[i] for the tokens from first to stop, which belong to the sequences from s on.
template <typename A>
void repeat(const Segments& segments, int64_t s, int64_t first, int64_t stop, const A* each, A* value) {
  for (int64_t token = first; token < stop; ++s, ++each)
    for (const int64_t end = std::min(segments.start(s + 1), stop); token < end; ++token) value[token - first] = *each;
}

template <typename T>
void backward(const SequenceLossBackward& op, Parallel parallel) {
  using A = WideOf<T>;
  const Segments& segments = op.tokens.segments;
  const A *upstream = static_cast<const A*>(op.upstream), *slope = static_cast<const A*>(op.slope);
  const A *denominator = static_cast<const A*>(op.denominator), *weight = static_cast<const A*>(op.tokens.weight);
  const uint8_t* mask = segments.mask;
  T* dlogp = static_cast<T*>(op.dlogp);
  const int64_t items = op.pairs == Pairs::none ? segments.count : segments.count / 2;
  parallel(segments.total, kBlock, [&](int64_t begin, int64_t end) {
    double up[kItems];
    A each[kItems], value[kShort * kItems];
    int64_t s = begin < end ? segment_of(segments, begin) : segments.count;
    for (int64_t token = begin; token < end;) {
      const int64_t n = std::min(kItems, segments.count - s), stop = std::min(segments.start(s + n), end);
      for (int64_t i = 0; i < n; ++i) up[i] = upstream[item_of(op.pairs, s + i, items) * op.upstream_stride];
      wide::slopes(up, slope + s, denominator ? denominator + s : nullptr, n, each);
      if (stop - token <= kShort * n) {
        const bool ones = segments.cu_seqlens == nullptr && segments.width == 1;
        if (!ones) repeat(segments, s, token, stop, each, value);
        wide::to_each(ones ? each : value, weight ? weight + token : nullptr, mask ? mask + token : nullptr,
                      stop - token, dlogp + token);
        token = stop;
      } else
        for (int64_t i = 0; i < n && token < end; ++i) {
          const int64_t last = std::min(segments.start(s + i + 1), end);
          wide::to_tokens(each[i], weight ? weight + token : nullptr, mask ? mask + token : nullptr, last - token,
                          dlogp + token);
          token = last;
        }
      s += n;
    }
  });
}

}  // namespace
}  // namespace finealign
