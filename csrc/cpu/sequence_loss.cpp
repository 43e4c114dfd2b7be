// Losses of whole sequences on a CPU: tokens to scores to losses with their slopes, and back to tokens.

#include <vector>

#include "formulas.cuh"
#include "segments.h"

namespace finealign {
namespace {

template <typename T>
using WideOf = typename Wide<T>::type;

// A stretch of tokens: Σ w (logp - ref_logp), and what an average divides by.
struct Part {
  double score = 0, weight = 0;
};

// What part_of reads, from its first token on; all but logp may be null.
template <typename T>
struct Stretch {
  const T *logp, *ref;
  const WideOf<T>* weight;
  const uint8_t* mask;
};

// Σ w (logp - ref_logp) of at most kChunk tokens. One that the mask leaves out or that weighs 0 may hold NaN: select,
// do not multiply.
template <typename T>
FINEALIGN_INLINE double weighted_sum(Stretch<T> at, int64_t n) {
  using A = WideOf<T>;
  return sum_terms<A>(n, [=](int64_t i, int count, A* __restrict group) __attribute__((always_inline)) {
    if (at.ref == nullptr)
      for (int j = 0; j < count; ++j) group[j] = load(at.logp[i + j]);
    else
      for (int j = 0; j < count; ++j) group[j] = load(at.logp[i + j]) - load(at.ref[i + j]);
    if (at.mask != nullptr)
      for (int j = 0; j < count; ++j) group[j] = at.mask[i + j] ? group[j] : 0;
    if (at.weight == nullptr) return;
    const A* weight = at.weight + i;
    for (int j = 0; j < count; ++j) group[j] = weight[j] != 0 ? group[j] : 0;
    A factor[kLanes];  // what is left out may weigh NaN
    for (int j = 0; j < count; ++j) factor[j] = weight[j];
    if (at.mask != nullptr)
      for (int j = 0; j < count; ++j) factor[j] = at.mask[i + j] ? factor[j] : 0;
    for (int j = 0; j < count; ++j) group[j] *= factor[j];
  });
}

template <typename A>
FINEALIGN_INLINE double sum_of_weights(const A* weight, const uint8_t* mask, int64_t n) {
  return sum_terms<A>(n, [=](int64_t i, int count, A* __restrict group) __attribute__((always_inline)) {
    for (int j = 0; j < count; ++j) group[j] = weight[i + j];
    if (mask != nullptr)
      for (int j = 0; j < count; ++j) group[j] = mask[i + j] ? group[j] : 0;
  });
}

// target_clones takes no templates: one wide function a type.
FINEALIGN_WIDE double weighted(Stretch<float> at, int64_t n) { return weighted_sum(at, n); }
FINEALIGN_WIDE double weighted(Stretch<double> at, int64_t n) { return weighted_sum(at, n); }
FINEALIGN_WIDE double weighted(Stretch<bf16> at, int64_t n) { return weighted_sum(at, n); }
FINEALIGN_WIDE double weighted(Stretch<f16> at, int64_t n) { return weighted_sum(at, n); }
FINEALIGN_WIDE double weights(const float* w, const uint8_t* mask, int64_t n) { return sum_of_weights(w, mask, n); }
FINEALIGN_WIDE double weights(const double* w, const uint8_t* mask, int64_t n) { return sum_of_weights(w, mask, n); }

// At most kChunk tokens.
template <typename T>
Part part_of(const SequenceLossForward& op, int64_t first, int64_t n) {
  using A = WideOf<T>;
  const auto from = [first](const auto* p) { return p == nullptr ? p : p + first; };
  const auto* weight = from(static_cast<const A*>(op.tokens.weight));
  const uint8_t* mask = from(op.tokens.segments.mask);
  const T *logp = static_cast<const T*>(op.logp) + first, *ref = from(static_cast<const T*>(op.ref_logp));
  Part part;
  if (n == 0 || (n == 1 && mask && !*mask)) return part;
  if (n == 1) {  // the same without the lanes, which take ten times as long
    const A difference = ref ? load(*logp) - load(*ref) : load(*logp), factor = weight ? *weight : 1;
    if (factor != 0) part.score = static_cast<A>(factor * difference);
    if (op.tokens.average != Average::none) part.weight = op.tokens.counts() ? 1 : factor;
    return part;
  }
  part.score = weighted(Stretch<T>{logp, ref, weight, mask}, n);
  if (op.tokens.counts()) part.weight = static_cast<double>(kept(op.tokens.segments, first, first + n));
  else if (op.tokens.average == Average::kept) part.weight = weights(weight, mask, n);
  return part;
}

template <typename T>
void forward(const SequenceLossForward& op, Parallel parallel) {
  using A = WideOf<T>;
  const Segments& segments = op.tokens.segments;
  A *score = static_cast<A*>(op.score), *slope = static_cast<A*>(op.slope), *losses = static_cast<A*>(op.losses);
  A* denominator = static_cast<A*>(op.denominator);
  std::vector<Part> parts(segments.total / kChunk);
  std::vector<double> scores(segments.count);  // not rounded yet
  for_whole_chunks(segments, parallel, [&](int64_t k, int64_t first) { parts[k] = part_of<T>(op, first, kChunk); });
  for_segments(segments, parallel, [&](int64_t s, int64_t start, int64_t stop) {
    Part total;
    const auto add = [&](const Part& part) { total.score += part.score, total.weight += part.weight; };
    int64_t token = start;
    for (; token + kChunk <= stop; token += kChunk) add(parts[token / kChunk]);
    add(part_of<T>(op, token, stop - token));
    if (op.ref_sum) total.score -= static_cast<const A*>(op.ref_sum)[s];
    if (total.weight == 0) total.weight = 1;  // no token, or no average
    scores[s] = total.score / total.weight;
    score[s] = static_cast<A>(scores[s]);
    denominator[s] = static_cast<A>(total.weight);
  });
  const int64_t items = op.items();
  parallel(items, kBlock / 32, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const double shift = op.shift[i * op.shift_stride], hyper = op.hyper[i * op.hyper_stride];
      const double sign = op.sign ? op.sign[i] : 1;
      const int64_t chosen = chosen_of(op.pairs, i), rejected = rejected_of(op.pairs, i, items);
      const double gap = op.pairs == Pairs::none ? scores[i] : scores[chosen] - scores[rejected];
      const Item item = margin_loss(op.phi, sign * (op.beta * gap - shift), hyper);
      losses[i] = static_cast<A>(op.scale * item.value);
      slope[chosen] = static_cast<A>(op.scale * sign * op.beta * item.slope);
      if (op.pairs != Pairs::none) slope[rejected] = -slope[chosen];
    }
  });
}

// out[i] = value · weight[i], 0 where the mask is false or the weight 0; weight and mask may be null.
template <typename T, typename A>
FINEALIGN_INLINE void spread_one(A value, const A* __restrict weight, const uint8_t* __restrict mask, int64_t n,
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
#define FINEALIGN_SPREAD(T, A)                                                                             \
  FINEALIGN_WIDE void spread(A value, const A* weight, const uint8_t* mask, int64_t n, T* __restrict out) { \
    spread_one(value, weight, mask, n, out);                                                               \
  }
FINEALIGN_SPREAD(float, float)
FINEALIGN_SPREAD(double, double)
FINEALIGN_SPREAD(bf16, float)
FINEALIGN_SPREAD(f16, float)

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
    int64_t s = begin < end ? first_from(segments, begin + 1) - 1 : segments.count;
    for (int64_t token = begin; token < end; ++s) {
      const int64_t stop = std::min(segments.start(s + 1), end);
      if (token == stop) continue;
      const double up = upstream[item_of(op.pairs, s, items) * op.upstream_stride];
      // an item that is not counted has upstream 0, whatever its slope
      const A each = static_cast<A>(up == 0 ? 0 : up * slope[s] / denominator[s]);
      if (stop - token == 1 && weight == nullptr) dlogp[token] = store<T>(segments.keeps(token) ? each : A(0));
      else spread(each, weight ? weight + token : nullptr, mask ? mask + token : nullptr, stop - token, dlogp + token);
      token = stop;
    }
  });
}

}  // namespace

void sequence_loss_forward_cpu(const SequenceLossForward& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { forward<decltype(type)>(op, parallel); });
}

void sequence_loss_backward_cpu(const SequenceLossBackward& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { backward<decltype(type)>(op, parallel); });
}

}  // namespace finealign
