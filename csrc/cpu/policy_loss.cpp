// Policy losses of tokens on a CPU: first the sums that shares and rows need, then each token once.

#include <vector>

#include "formulas.cuh"
#include "segments.h"

namespace finealign {
namespace {

template <typename T>
using WideOf = typename Wide<T>::type;

constexpr int kStep = 4 * kLanes;  // tokens that are computed together; all their numbers fit the first-level cache
static_assert(kChunk % kStep == 0, "a chunk is whole steps");

// The numbers of tokens; they are 0 at masked tokens and beyond the last token.
struct Step {
  double keep[kStep], logp[kStep], log_ratio[kStep], advantage[kStep];
  double weight[kStep], kl_share[kStep], entropy_share[kStep];
  double to_reference[kStep], entropy[kStep];
  double row_log_ratio[kStep], stretch[kStep];                      // of the token's row
  double ratio[kStep], own_ratio[kStep], value[kStep], slope[kStep];  // own_ratio: the token's, if psi takes that of the row
  double kappa[kStep], push[kStep], dlogp[kStep];
};

// Sums that are kept separately for each lane.
struct Lanes {
  double of[kTerms][kLanes];
};

// ---- reading -------------------------------------------------------------------------------------------------------

template <typename T>
FINEALIGN_INLINE void select(const T* __restrict x, const double* __restrict keep, int n, double* __restrict out) {
  for (int i = 0; i < n; ++i) {
    const double value = load(x[i]);
    out[i] = keep[i] != 0 ? value : 0;
  }
}

// The sum of the log-ratios of at most kChunk tokens, in the order of launch.h.
template <typename T>
FINEALIGN_INLINE double log_ratios_of(const T* logp, const T* old_logp, const uint8_t* mask, int64_t n) {
  return sum_terms<double>(n, [&](int64_t i, int count, double* group) __attribute__((always_inline)) {
    for (int j = 0; j < count; ++j) {
      const double x = load(logp[i + j]), old = old_logp != nullptr ? load(old_logp[i + j]) : 0;
      const double moved = old_logp != nullptr ? x - old : no_log_ratio(x);
      group[j] = mask == nullptr || mask[i + j] != 0 ? moved : 0;
    }
  });
}

template <typename A>
FINEALIGN_INLINE double weights_of(const A* weight, const uint8_t* mask, int64_t n) {
  return sum_terms<double>(n, [&](int64_t i, int count, double* group) __attribute__((always_inline)) {
    for (int j = 0; j < count; ++j) group[j] = mask == nullptr || mask[i + j] != 0 ? weight[i + j] : 0;
  });
}

// target_clones cannot be used with templates, so there is one wide function for each type.
namespace wide {
#define FINEALIGN_OF_NUMBERS(T)                                                                                    \
  FINEALIGN_WIDE void select(const T* x, const double* keep, int n, double* out) {                                 \
    finealign::select(x, keep, n, out);                                                                            \
  }                                                                                                                \
  FINEALIGN_WIDE double log_ratios_of(const T* logp, const T* old_logp, const uint8_t* mask, int64_t n) {          \
    return finealign::log_ratios_of(logp, old_logp, mask, n);                                                      \
  }
FINEALIGN_OF_NUMBERS(float)
FINEALIGN_OF_NUMBERS(double)
FINEALIGN_OF_NUMBERS(bf16)
FINEALIGN_OF_NUMBERS(f16)
#define FINEALIGN_OF_RESULTS(A)                                                                                    \
  FINEALIGN_WIDE double weights_of(const A* weight, const uint8_t* mask, int64_t n) {                              \
    return finealign::weights_of(weight, mask, n);                                                                 \
  }                                                                                                                \
  FINEALIGN_WIDE void store(const double* __restrict x, int n, A* __restrict out) {                                \
    for (int i = 0; i < n; ++i) out[i] = static_cast<A>(x[i]);                                                     \
  }                                                                                                                \
  FINEALIGN_WIDE void store_scaled(const double* __restrict x, double by, int n, A* __restrict out) {              \
    for (int i = 0; i < n; ++i) out[i] = static_cast<A>(by * x[i]);                                                \
  }
FINEALIGN_OF_RESULTS(float)
FINEALIGN_OF_RESULTS(double)
}  // namespace wide

// ---- the arithmetic of a step, n a multiple of kLanes --------------------------------------------------------------

FINEALIGN_WIDE void keep_of(const uint8_t* __restrict mask, int n, double* __restrict keep) {
  for (int i = 0; i < n; ++i) keep[i] = mask[i] != 0 ? 1 : 0;
}

// y becomes x - y.
FINEALIGN_WIDE void subtract_from(const double* __restrict x, double* __restrict y, int n) {
  for (int i = 0; i < n; ++i) y[i] = x[i] - y[i];
}

FINEALIGN_WIDE void no_log_ratios(const double* __restrict x, int n, double* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = no_log_ratio(x[i]);
}

FINEALIGN_WIDE void multiply(double* __restrict x, const double* __restrict by, int n) {
  for (int i = 0; i < n; ++i) x[i] *= by[i];
}

// By selection, so that a share of NaN does not reach masked tokens.
FINEALIGN_WIDE void left_out(double* __restrict x, const double* __restrict keep, int n) {
  for (int i = 0; i < n; ++i) x[i] = keep[i] != 0 ? x[i] : 0;
}

FINEALIGN_WIDE void same_of(double each, const double* __restrict keep, int n, double* __restrict out) {
  for (int i = 0; i < n; ++i) out[i] = keep[i] != 0 ? each : 0;
}

FINEALIGN_WIDE void ratios(const double* __restrict log_ratio, int n, double* __restrict ratio) {
  for (int i = 0; i < n; ++i) ratio[i] = ratio_of(log_ratio[i]);
}

template <Psi psi>
FINEALIGN_INLINE void losses(const PolicyLossForward& op, const double* __restrict log_ratio, int n, Step& at) {
  const double first = op.first, second = op.second, dual = op.dual;
  for (int i = 0; i < n; ++i) {
    const Item item = policy_loss_of(psi, log_ratio[i], at.ratio[i], at.advantage[i], at.logp[i], first, second, dual);
    at.value[i] = item.value, at.slope[i] = item.slope;
  }
}

FINEALIGN_WIDE void losses(const PolicyLossForward& op, const double* log_ratio, int n, Step& at) {
  switch (op.psi) {
    case Psi::clipped: return losses<Psi::clipped>(op, log_ratio, n, at);
    case Psi::capped: return losses<Psi::capped>(op, log_ratio, n, at);
    case Psi::score_function: return losses<Psi::score_function>(op, log_ratio, n, at);
    case Psi::soft_gate: return losses<Psi::soft_gate>(op, log_ratio, n, at);
  }
}

template <Estimator estimator>
FINEALIGN_INLINE void divergences(const double* __restrict ratio, int n, Step& at) {
  for (int i = 0; i < n; ++i) {
    const Item item = divergence_of(estimator, at.to_reference[i], at.log_ratio[i], ratio[i]);
    at.kappa[i] = item.value, at.push[i] = item.slope;
  }
}

FINEALIGN_WIDE void divergences(Estimator estimator, const double* ratio, int n, Step& at) {
  switch (estimator) {
    case Estimator::k1: return divergences<Estimator::k1>(ratio, n, at);
    case Estimator::k2: return divergences<Estimator::k2>(ratio, n, at);
    case Estimator::k3: return divergences<Estimator::k3>(ratio, n, at);
    case Estimator::k3_k2grad: return divergences<Estimator::k3_k2grad>(ratio, n, at);
    case Estimator::k3_is: return divergences<Estimator::k3_is>(ratio, n, at);
  }
}

// With kl_coef = 0 the KL has no gradient, even if it is NaN.
FINEALIGN_WIDE void slopes(double kl_coef, int n, Step& at) {
  if (kl_coef == 0)
    for (int i = 0; i < n; ++i) at.dlogp[i] = policy_slope_of(at.weight[i], at.slope[i], 0, 0);
  else
    for (int i = 0; i < n; ++i)
      at.dlogp[i] = policy_slope_of(at.weight[i], at.slope[i], kl_coef * at.kl_share[i], at.push[i]);
}

// lane + Σ weight x; terms with weight 0 are left out.
FINEALIGN_INLINE void add_products(const double* __restrict weight, const double* __restrict x, int n,
                                   double* __restrict lane) {
  for (int i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) {
      const double counted = weight[i + j] != 0 ? x[i + j] : 0;
      lane[j] = fma(weight[i + j], counted, lane[j]);
    }
}

template <typename F>
FINEALIGN_INLINE void add_each(int n, double* __restrict lane, F term) {
  for (int i = 0; i < n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += term(i + j);
}

#define FINEALIGN_TERM [&](int i) __attribute__((always_inline)) -> double
FINEALIGN_WIDE void add_terms(const PolicyLossForward& op, int n, const Step& at, Lanes& sum) {
  const double below = op.below, above = op.above, dual = op.dual;
  add_products(at.weight, at.value, n, sum.of[kPolicyTerm]);
  if (op.ref_logp != nullptr) add_products(at.kl_share, at.kappa, n, sum.of[kKlTerm]);
  if (op.entropy != nullptr) add_products(at.entropy_share, at.entropy, n, sum.of[kEntropyTerm]);
  add_each(n, sum.of[kRatio], FINEALIGN_TERM { return at.keep[i] != 0 ? at.ratio[i] : 0; });
  add_each(n, sum.of[kOldKl], FINEALIGN_TERM { return -at.log_ratio[i]; });
  if (below > 0)
    add_each(n, sum.of[kLow], FINEALIGN_TERM { return (at.advantage[i] < 0) & (at.ratio[i] < below) ? 1 : 0; });
  if (above < INFINITY)
    add_each(n, sum.of[kHigh], FINEALIGN_TERM { return (at.advantage[i] > 0) & (at.ratio[i] > above) ? 1 : 0; });
  if (dual < INFINITY)
    add_each(n, sum.of[kDual], FINEALIGN_TERM { return (at.advantage[i] < 0) & (at.ratio[i] > dual) ? 1 : 0; });
  add_each(n, sum.of[kTokens], FINEALIGN_TERM { return at.keep[i]; });
}

// ---- one chunk -----------------------------------------------------------------------------------------------------

// What the tokens of a chunk receive from their rows and from the batch.
struct Given {
  Divisors by;
  const Row* rows;    // null if no rows are summed
  bool walks, shares;  // whether numbers differ between rows; whether shares do
};

double halves(double* lane) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Loads the numbers of tokens [token, token + n), which belong to row s and the rows after it.
template <typename A>
void fill_by_rows(const PolicyLossForward& op, const Given& given, int64_t token, int n, int64_t& s, Step& at) {
  const A *advantage = static_cast<const A*>(op.advantage), *sampler = static_cast<const A*>(op.sampler);
  for (int i = 0; i < n;) {
    while (op.segments.start(s + 1) <= token + i) ++s;
    const int64_t end = std::min<int64_t>(n, op.segments.start(s + 1) - token);
    const Row* row = given.rows != nullptr ? given.rows + s : nullptr;
    const auto fill = [&](double* numbers, double x) { std::fill(numbers + i, numbers + end, x); };
    if (given.shares) {
      const Shares share = shares_of(op, given.by, row);
      fill(at.weight, op.sampler_by_row ? share.policy * sampler[s] : share.policy);
      fill(at.kl_share, share.kl), fill(at.entropy_share, share.entropy);
    }
    if (op.advantage_by_row) fill(at.advantage, advantage[s]);
    if (op.ratio != RatioOf::token) fill(at.row_log_ratio, log_ratio_of(op.ratio, *row));
    if (op.ratio == RatioOf::row_sum) fill(at.stretch, row->length);
    i = static_cast<int>(end);
  }
}

template <typename T>
Terms chunk_terms(const PolicyLossForward& op, const Given& given, int64_t first, int64_t stop) {
  using A = WideOf<T>;
  const auto tokens = [](const void* x, int64_t token) { return static_cast<const T*>(x) + token; };
  const auto numbers = [](const void* x, int64_t token) { return static_cast<const A*>(x) + token; };
  const auto results = [](void* x, int64_t token) { return static_cast<A*>(x) + token; };
  Step at;
  Lanes sum{};
  const Shares batch = given.shares ? Shares{} : shares_of(op, given.by, nullptr);
  int64_t s = given.walks ? segment_of(op.segments, first) : 0;
  for (int64_t token = first; token < stop; token += kStep) {
    const int n = static_cast<int>(std::min<int64_t>(kStep, stop - token));
    const int whole = (n + kLanes - 1) / kLanes * kLanes;
    const auto clear = [&](double* x) { std::fill(x + n, x + whole, 0.0); };
    if (op.segments.mask != nullptr) keep_of(op.segments.mask + token, n, at.keep);
    else std::fill_n(at.keep, n, 1.0);
    clear(at.keep);
    const auto read = [&](const auto* x, double* out) { wide::select(x, at.keep, n, out), clear(out); };

    read(tokens(op.logp, token), at.logp);
    if (op.old_logp != nullptr) {
      read(tokens(op.old_logp, token), at.log_ratio);
      subtract_from(at.logp, at.log_ratio, whole);
    } else
      no_log_ratios(at.logp, whole, at.log_ratio);
    const auto select = [&](double* x) { clear(x), left_out(x, at.keep, whole); };
    if (given.walks) fill_by_rows<A>(op, given, token, n, s, at);
    if (given.shares) {
      select(at.weight), select(at.kl_share), select(at.entropy_share);
    } else {
      same_of(batch.policy, at.keep, whole, at.weight);
      if (op.ref_logp != nullptr) same_of(batch.kl, at.keep, whole, at.kl_share);
      if (op.entropy != nullptr) same_of(batch.entropy, at.keep, whole, at.entropy_share);
    }
    const auto weigh = [&](const A* by) { read(by, at.value), multiply(at.weight, at.value, n); };
    if (op.weight != nullptr) weigh(numbers(op.weight, token));
    if (op.sampler != nullptr && !op.sampler_by_row) weigh(numbers(op.sampler, token));
    if (op.advantage_by_row) select(at.advantage);
    else read(numbers(op.advantage, token), at.advantage);

    const double* log_ratio = at.log_ratio;
    const double* own_ratio = at.ratio;
    if (op.ratio != RatioOf::token) {
      select(at.row_log_ratio);
      log_ratio = at.row_log_ratio, own_ratio = at.own_ratio;
      if (op.ref_logp != nullptr) ratios(at.log_ratio, whole, at.own_ratio);
    }
    ratios(log_ratio, whole, at.ratio);
    losses(op, log_ratio, whole, at);
    wide::store(at.value, n, results(op.losses, token));
    if (op.ratio == RatioOf::row_sum) multiply(at.slope, at.stretch, n);
    if (op.ref_logp != nullptr) {
      read(tokens(op.ref_logp, token), at.to_reference);
      subtract_from(at.logp, at.to_reference, whole);
      divergences(op.estimator, own_ratio, whole, at);
    }
    slopes(op.ref_logp != nullptr ? op.kl_coef : 0, whole, at);
    wide::store(at.dlogp, n, results(op.dlogp, token));
    if (op.entropy != nullptr) read(tokens(op.entropy, token), at.entropy);
    if (op.dentropy != nullptr) wide::store_scaled(at.entropy_share, -op.entropy_coef, n, results(op.dentropy, token));
    add_terms(op, whole, at, sum);
  }
  Terms total;
  for (int term = 0; term < kTerms; ++term) total.of[term] = halves(sum.of[term]);
  return total;
}

// ---- the batch -----------------------------------------------------------------------------------------------------

// The sum of n numbers in the order of sums over the batch.
template <typename Get>
double sum_by_lanes(int64_t n, Get get) {
  double lane[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lane[i % kLanes] += get(i);
  return halves(lane);
}

// The sums over tokens [first, first + n), n <= kChunk.
template <typename T>
Row row_part(const PolicyLossForward& op, bool log_ratios, int64_t first, int64_t n) {
  using A = WideOf<T>;
  const uint8_t* mask = op.segments.mask == nullptr ? nullptr : op.segments.mask + first;
  Row part{};
  part.length = static_cast<double>(kept(op.segments, first, first + n));
  part.weight = op.kept ? wide::weights_of(static_cast<const A*>(op.weight) + first, mask, n) : part.length;
  if (!log_ratios) return part;
  const T *logp = static_cast<const T*>(op.logp), *old_logp = static_cast<const T*>(op.old_logp);
  part.log_ratio = wide::log_ratios_of(logp + first, old_logp == nullptr ? nullptr : old_logp + first, mask, n);
  return part;
}

template <typename T>
std::vector<Row> rows_of(const PolicyLossForward& op, Parallel parallel) {
  const bool log_ratios = op.ratio != RatioOf::token;
  const Segments& segments = op.segments;
  std::vector<Row> rows(segments.count), parts(segments.total / kChunk);
  for_whole_chunks(segments, parallel,
                   [&](int64_t k, int64_t first) { parts[k] = row_part<T>(op, log_ratios, first, kChunk); });
  for_segments(segments, parallel, [&](int64_t s, int64_t token, int64_t stop) {
    Row& row = rows[s];
    const auto add = [&](const Row& part) {
      row.weight += part.weight, row.length += part.length, row.log_ratio += part.log_ratio;
    };
    for (; token + kChunk <= stop; token += kChunk) add(parts[token / kChunk]);
    if (token < stop) add(row_part<T>(op, log_ratios, token, stop - token));
  });
  return rows;
}

template <typename T>
Totals totals_of(const PolicyLossForward& op, const std::vector<Row>& rows, Parallel parallel) {
  const double tokens = static_cast<double>(op.segments.total);
  Totals total{tokens, tokens, static_cast<double>(op.segments.count), 0};
  if (op.counts_rows()) total.rows = sum_by_lanes(rows.size(), [&](int64_t s) { return rows[s].length > 0 ? 1 : 0; });
  if (!op.sums_tokens()) return total;
  std::vector<Row> parts(op.chunks());
  parallel(op.chunks(), kBlock / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      parts[k] = row_part<T>(op, false, k * kChunk, std::min<int64_t>(kChunk, op.segments.total - k * kChunk));
  });
  total.weight = sum_by_lanes(parts.size(), [&](int64_t k) { return parts[k].weight; });
  total.length = sum_by_lanes(parts.size(), [&](int64_t k) { return parts[k].length; });
  return total;
}

template <typename T>
void forward(const PolicyLossForward& op, Parallel parallel) {
  using A = WideOf<T>;
  const std::vector<Row> rows = op.sums_rows() ? rows_of<T>(op, parallel) : std::vector<Row>();
  const Divisors by = divisors_of(op, totals_of<T>(op, rows, parallel));
  const bool shares = op.share == ShareOf::row || op.sampler_by_row;
  const bool walks = shares || op.advantage_by_row || op.ratio != RatioOf::token;
  const Given given{by, rows.empty() ? nullptr : rows.data(), walks, shares};
  std::vector<Terms> parts(op.chunks());
  parallel(op.chunks(), 4, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k)
      parts[k] = chunk_terms<T>(op, given, k * kChunk, std::min<int64_t>((k + 1) * kChunk, op.segments.total));
  });
  Terms total;
  for (int term = 0; term < kTerms; ++term)
    total.of[term] = sum_by_lanes(parts.size(), [&](int64_t k) { return parts[k].of[term]; });
  *static_cast<A*>(op.loss) = static_cast<A>(loss_of(op, total));
  for (int term = 0; term < kTokens; ++term) static_cast<A*>(op.numbers)[term] = static_cast<A>(number_of(total, term));
}

template <typename T>
void backward(const PolicyLossBackward& op, Parallel parallel) {
  using A = WideOf<T>;
  const A upstream = *static_cast<const A*>(op.upstream), *d = static_cast<const A*>(op.d);
  T* out = static_cast<T*>(op.out);
  parallel(op.total, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) out[i] = store<T>(d[i] != 0 ? d[i] * upstream : A(0));
  });
}

}  // namespace

void policy_loss_forward_cpu(const PolicyLossForward& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { forward<decltype(type)>(op, parallel); });
}

void policy_loss_backward_cpu(const PolicyLossBackward& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { backward<decltype(type)>(op, parallel); });
}

}  // namespace finealign
