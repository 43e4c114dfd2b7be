// From rewards to advantages on a CPU, as formulas/returns.py and formulas/rewards.py (placement "end"). It takes one pass over
// the tokens, or two or three if moments of the whole batch are needed in between.

#include <utility>

#include "formulas.cuh"
#include "scan.h"

namespace finealign {
namespace {

// ---- moments -------------------------------------------------------------------------------------------------------

// By halves, so that rounding errors grow with the logarithm of their number.
Moments total(const Moments* parts, int64_t count) {
  if (count == 0) return {};
  if (count == 1) return parts[0];
  return total(parts, count / 2) + total(parts + count / 2, count - count / 2);
}

// How many of at most kTile tokens are kept. They are counted in bytes, which hold at most 255.
template <typename Keep>
FINEALIGN_INLINE int count_kept(const Keep* __restrict keep, int n) {
  constexpr int kBytes = 64;
  static_assert(kTile / kBytes <= 255, "a byte counts one token in kBytes");
  uint8_t lane[kBytes] = {};
  int i = 0, count = 0;
  for (; i + kBytes <= n; i += kBytes)
    for (int k = 0; k < kBytes; ++k) lane[k] += keep[i + k] != 0;
  for (int k = 0; k < kBytes; ++k) count += lane[k];
  for (; i < n; ++i) count += keep[i] != 0;
  return count;
}

// Sets x_i to 0 where it is not kept, by selection, because 0 · NaN is NaN. Returns how many are kept.
template <typename Keep>
FINEALIGN_INLINE int select_kept(double* __restrict x, const Keep* __restrict keep, int n) {
  if (keep == nullptr) return n;
  const int count = count_kept(keep, n);
  if (count == 0) std::fill_n(x, n, 0.0);
  else if (count < n)
    for (int i = 0; i < n; ++i) x[i] = keep[i] != 0 ? x[i] : 0;
  return count;
}

using Half = double __attribute__((vector_size(kFour * sizeof(double))));  // an array would stay in memory, not in registers

FINEALIGN_INLINE double added_up(Half lanes) { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }

// The moments of at most kTile values; keep, if not null, says which of them count.
template <typename T, typename Keep>
FINEALIGN_INLINE Moments tile_moments(const T* __restrict x, const Keep* __restrict keep, int n) {
  const int count = keep == nullptr ? n : count_kept(keep, n);
  if (count == 0) return {};
  int at = 0;
  while (count < n && keep[at] == 0) ++at;
  const double first = x[at];
  double away[kTile + 2 * kFour];
  if (count == n)
    for (int i = 0; i < n; ++i) away[i] = x[i] - first;
  else
    for (int i = 0; i < n; ++i) away[i] = keep[i] != 0 ? x[i] - first : 0;
  for (int i = n; i < n + 2 * kFour; ++i) away[i] = 0;
  Half sum[2] = {}, squares[2] = {};
  for (int i = 0; i < n; i += 2 * kFour) {
    Half left, right;
    std::memcpy(&left, away + i, sizeof left);
    std::memcpy(&right, away + i + kFour, sizeof right);
    sum[0] += left, sum[1] += right;
    squares[0] += left * left, squares[1] += right * right;
  }
  return moments_about(first, count, added_up(sum[0] + sum[1]), added_up(squares[0] + squares[1]));
}

template <typename T, typename Keep>
FINEALIGN_INLINE Moments moments_of(const T* x, const Keep* keep, int64_t n) {
  Moments sum{};
  for (int64_t i = 0; i < n; i += kTile)
    sum = sum + tile_moments(x + i, keep ? keep + i : keep, static_cast<int>(std::min<int64_t>(kTile, n - i)));
  return sum;
}

// ---- rewards -------------------------------------------------------------------------------------------------------

struct Placed {
  int64_t token;
  double reward;
};

// Appends the rewards of model k in sequence s, by token, as `places` and `_put` of formulas/rewards.py.
void place(const Advantages& op, int64_t k, int64_t s, std::vector<Placed>& placed) {
  const SegmentRewards& given = op.segment_rewards;
  const int64_t* bounds = given.bounds + k * (op.segments.count + 1) + s;
  const int64_t start = op.segments.start(s), limit = op.segments.start(s + 1);
  int64_t covered = start, receiver = -1;  // so that each token is checked once
  const size_t mine = placed.size();
  for (int64_t j = bounds[0]; j < bounds[1]; ++j) {
    const int64_t stop = std::max(covered, start + std::min(given.end[j], limit - start - 1) + 1);
    const int64_t first = given.start ? std::max(covered, start + std::min(given.start[j], limit - start)) : covered;
    int64_t last = stop - 1;
    while (last >= first && !op.segments.keeps(last)) --last;
    covered = stop;
    if (last >= first) receiver = last;
    else if (given.drop) continue;
    int64_t to = receiver;
    if (to < 0) {  // no token of the response so far: take its first one
      for (to = start; to < limit && !op.segments.keeps(to); ++to) {}
      if (to == limit) return;
    }
    if (placed.size() == mine || placed.back().token != to) placed.push_back({to, given.reward[j]});
    else placed.back().reward = given.reward[j] + (given.overwrite ? 0 : placed.back().reward);
  }
}

// Adds the rewards of all models to the tokens of sequence s, which must be 0 before.
template <typename T>
void place_all(const Advantages& op, int64_t s, std::vector<Placed>& placed) {
  T* shaped = static_cast<T*>(op.shaped);
  placed.clear();
  for (int64_t k = 0; k < op.segment_rewards.models; ++k) {
    const auto middle = static_cast<std::ptrdiff_t>(placed.size());
    place(op, k, s, placed);
    std::inplace_merge(placed.begin(), placed.begin() + middle, placed.end(),
                       [](const Placed& x, const Placed& y) { return x.token < y.token; });
  }
  for (size_t i = 0; i < placed.size();) {
    const int64_t token = placed[i].token;
    double sum = 0;
    for (; i < placed.size() && placed[i].token == token; ++i) sum += placed[i].reward;
    shaped[token] = static_cast<T>(sum);
  }
}

// shaped = rewards - β kl over tokens [first, stop). Rewards of segments are already in shaped.
template <typename T>
FINEALIGN_INLINE void shape(const Advantages& op, int64_t first, int64_t stop) {
  const uint8_t* mask = op.segments.mask ? op.segments.mask + first : nullptr;
  T* shaped = static_cast<T*>(op.shaped) + first;
  const T* rewards = op.rewards ? static_cast<const T*>(op.rewards) + first : shaped;
  for (int64_t base = 0; base < stop - first; base += kTile) {
    const int n = static_cast<int>(std::min<int64_t>(kTile, stop - first - base));
    double r[kTile], kl[kTile];
    const uint8_t* keep = mask ? mask + base : nullptr;
    for (int i = 0; i < n; ++i) r[i] = rewards[base + i];
    select_kept(r, keep, n);
    if (op.old_logp != nullptr) {
      const T* old_logp = static_cast<const T*>(op.old_logp) + first + base;
      const T* ref_logp = static_cast<const T*>(op.ref_logp) + first + base;
      T* out = static_cast<T*>(op.kl) + first + base;
      for (int i = 0; i < n; ++i) kl[i] = static_cast<double>(old_logp[i]) - static_cast<double>(ref_logp[i]);
      select_kept(kl, keep, n);
      if (op.estimator != Estimator::k1)
        for (int i = 0; i < n; ++i) kl[i] = divergence(op.estimator, kl[i]);
      for (int i = 0; i < n; ++i) out[i] = static_cast<T>(kl[i]);
      if (op.kl_coef != 0)
        for (int i = 0; i < n; ++i) r[i] -= op.kl_coef * kl[i];
    }
    for (int i = 0; i < n; ++i) shaped[base + i] = static_cast<T>(r[i]);
  }
}

// ---- advantages and returns ----------------------------------------------------------------------------------------

template <typename T>
State at_end(const Advantages& op, int64_t s) {
  return {0, op.bootstrap ? op.bootstrap[s] : 0, false};
}

FINEALIGN_INLINE void whiten(double* x, int n, Standard by, bool shift) {
  for (int i = 0; i < n; ++i) x[i] = by.scale == 0 ? 0 : (x[i] - by.mean) * by.scale;
  if (!shift)
    for (int i = 0; i < n; ++i) x[i] += by.mean;
}

// wide: of float64 values.
Standard standard_of(const Whitening& by, bool wide) {
  if (by.moments == nullptr) return {0, 1};
  return standard(by.moments, by.scale, by.unbiased, wide);
}

Rates rates_of(const Advantages& op, int64_t s, Standard by) {
  const double gamma = op.gamma[s * op.gamma_stride];
  return {gamma, gamma * op.lam[s * op.lam_stride], op.whiten_rewards.moments != nullptr, by.mean, by.scale};
}

inline ScanValid<float> scan_valid(float) { return recurrences().valid_f32; }
inline ScanValid<double> scan_valid(double) { return recurrences().valid_f64; }

// Computes at most kTile tokens, some of them masked; the pointers are at the first of them. Returns the state at their left.
// `all` is multiplied by the product of their decays.
template <typename T>
FINEALIGN_INLINE State scan_masked(const uint8_t* mask, const T* rewards, const T* values, int n, State state, bool zero,
                                   const Rates& rates, T* advantages, T* returns, bool stores, double& all) {
  double d[kTile], a[kTile], v[kTile];
  for (int i = 0; i < n; ++i) d[i] = rewards[i];
  if (rates.whitens) whiten(d, n, {rates.mean, rates.scale}, false);
  for (int i = 0; i < n; ++i) v[i] = 0;
  if (values != nullptr)
    for (int i = 0; i < n; ++i) v[i] = values[i];
  for (int i = n - 1; i >= 0; --i) {
    const bool valid = mask[i] != 0;
    const double ahead = rates.gamma * state.ahead, delta = (d[i] - v[i]) + ahead;
    const double step = zero && state.seen ? ahead : 0;
    d[i] = valid ? delta : step;
    a[i] = valid || zero ? rates.decay : 1;
    state.ahead = valid ? v[i] : zero && state.seen ? 0 : state.ahead;
    state.seen = state.seen || valid;
  }
  const int whole = whole_fours(n);
  for (int i = n; i < whole; ++i) d[i] = 0, a[i] = 1;  // beyond the end of the sequence, where y is 0
  if (!stores) all *= product(a, whole);
  state.y = recurrences().back(d, a, whole, state.y);
  if (!stores) return state;
  select_kept(d, mask, n), select_kept(v, mask, n);
  for (int i = 0; i < n; ++i) advantages[i] = static_cast<T>(d[i]);
  for (int i = 0; i < n; ++i) returns[i] = static_cast<T>(d[i] + v[i]);
  return state;
}

// Computes the tokens of a piece from the state at its right. Returns the advantage at its left and the product of its decays;
// results are stored if `stores`.
template <typename T>
FINEALIGN_INLINE Affine scan_tokens(const Advantages& op, const Piece& piece, State state, Standard by, bool stores) {
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards);
  const T* values = static_cast<const T*>(op.values);
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  const uint8_t* mask = op.segments.mask;
  const Rates rates = rates_of(op, piece.s, by);
  double all = 1;
  const int64_t tiles = (piece.stop - piece.first + kTile - 1) / kTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = piece.first + tile * kTile;
    const int n = static_cast<int>(std::min<int64_t>(kTile, piece.stop - first));
    if (tile > 0) {  // prefetch the next tile, which is whole
      prefetch(rewards + first - kTile, kTile);
      if (values != nullptr) prefetch(values + first - kTile, kTile);
      if (mask != nullptr) prefetch(mask + first - kTile, kTile);
      if (stores) prefetch(advantages + first - kTile, kTile), prefetch(returns + first - kTile, kTile);
    }
    const int kept = mask ? count_kept(mask + first, n) : n;
    int64_t start = first, stop = kept == 0 ? first : first + n;  // the range in which valid tokens may be
    while (start < stop && kept < n && !mask[stop - 1]) --stop;
    while (start < stop && kept < n && !mask[start]) ++start;
    if (stop - start == kept && (!op.zero || (start == first && !state.seen))) {
      for (T* out : {advantages, returns}) {
        if (!stores || kept == n) break;
        std::fill(out + first, out + start, T(0)), std::fill(out + stop, out + first + n, T(0));
      }
      if (kept == 0) continue;
      if (!stores) all *= power(rates.decay, kept);
      scan_valid(T())(rewards + start, values ? values + start : nullptr, kept, state, rates,
                      stores ? advantages + start : nullptr, returns + start);
    } else {
      state = scan_masked(mask + first, rewards + first, values ? values + first : nullptr, n, state, op.zero, rates,
                          advantages + first, returns + first, stores, all);
    }
  }
  return {all, state.y};
}

constexpr int64_t kShort = 8;

// The same, with the same bits, for unmasked sequences first to last - 1 with one gamma and lam, at most kTile tokens in all. It
// is one recurrence, in which decays of 0 separate the sequences. Returns whether everything is finite; otherwise a value other
// than 0 may have crossed from one sequence to the next.
template <typename T>
FINEALIGN_INLINE bool scan_packed(const Advantages& op, int64_t first, int64_t last, int64_t longest, Standard by) {
  const int64_t start = op.segments.start(first);
  const int n = static_cast<int>(op.segments.start(last) - start), whole = whole_fours(n);
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards) + start;
  const Rates rates = rates_of(op, first, by);
  double here[kTile], d[kTile], a[kTile], v[kTile + 1];
  for (int i = 0; i < n; ++i) here[i] = rewards[i];
  if (rates.whitens) whiten(here, n, by, false);
  for (int i = 0; i <= n; ++i) v[i] = 0;
  if (op.values != nullptr)
    for (int i = 0; i < n; ++i) v[i] = static_cast<const T*>(op.values)[start + i];
  for (int i = 0; i < n; ++i) here[i] -= v[i];
  if (longest == 1 && n == last - first) {  // each token is a sequence
    for (int i = 0; i < n; ++i) d[i] = here[i] + rates.gamma * (op.bootstrap ? op.bootstrap[first + i] : 0);
  } else {
    for (int i = 0; i < n; ++i) d[i] = here[i] + rates.gamma * v[i + 1];
    for (int i = 0; i < n; ++i) a[i] = rates.decay;
    for (int i = n; i < whole; ++i) d[i] = 0, a[i] = 1;
    int64_t before = 0, behind;
    for (int64_t s = first; s < last; ++s, before = behind) {
      behind = op.segments.start(s + 1) - start;
      if (behind == before) continue;
      d[behind - 1] = here[behind - 1] + rates.gamma * (op.bootstrap ? op.bootstrap[s] : 0), a[behind - 1] = 0;
    }
  }
  double zeros[kFour] = {};
  if (longest > 1) {
    recurrences().back(d, a, whole, 0);
    for (int i = 0; i < whole; i += kFour)
      for (int k = 0; k < kFour; ++k) zeros[k] += d[i + k] * 0;
  }
  T *advantages = static_cast<T*>(op.advantages) + start, *returns = static_cast<T*>(op.returns) + start;
  for (int i = 0; i < n; ++i) advantages[i] = static_cast<T>(d[i]);
  for (int i = 0; i < n; ++i) returns[i] = static_cast<T>(d[i] + v[i]);
  return (zeros[0] + zeros[1]) + (zeros[2] + zeros[3]) == 0;
}

// Computes sequences first to last - 1, each of at most kCut tokens.
template <typename T>
FINEALIGN_INLINE void scan_sequences(const Advantages& op, int64_t first, int64_t last) {
  const Standard by = standard_of(op.whiten_rewards, sizeof(T) == 8);
  const bool packs = op.segments.mask == nullptr && op.gamma_stride == 0 && op.lam_stride == 0;
  for (int64_t s = first, end; s < last; s = end) {
    const int64_t start = op.segments.start(s);
    int64_t longest = 0, stop = start;
    for (end = s; packs && end < last; ++end) {
      const int64_t behind = op.segments.start(end + 1);
      if (behind - stop > kShort || behind - start > kTile) break;
      longest = std::max(longest, behind - stop), stop = behind;
    }
    if (end - s > 1 && scan_packed<T>(op, s, end, longest, by)) continue;
    end = std::max(end, s + 1);
    for (int64_t one = s; one < end; ++one)
      scan_tokens<T>(op, {one, op.segments.start(one), op.segments.start(one + 1)}, at_end<T>(op, one), by, true);
  }
}

// ---- pivots and the last whitening -----------------------------------------------------------------------------------

// 1 where score and advantage agree (A >= 0 and score above the baseline, or A < 0 and score below it), 0 for NaN. Compared
// in float32, as everywhere.
template <typename T>
FINEALIGN_INLINE void pivots(const Advantages& op, const T* advantages, int64_t first, int64_t stop) {
  const T* score = static_cast<const T*>(op.score) + first;
  const uint8_t* mask = op.segments.mask ? op.segments.mask + first : nullptr;
  float* weight = static_cast<float*>(op.token_weight) + first;
  const float baseline = static_cast<float>(op.baseline);
  for (int64_t i = 0; i < stop - first; ++i) {
    const float q = static_cast<float>(score[i]);
    const bool up = (advantages[i] >= 0) & (q > baseline), down = (advantages[i] < 0) & (q < baseline);
    weight[i] = (up | down) ? 1.0f : 0.0f;
  }
  if (mask != nullptr)
    for (int64_t i = 0; i < stop - first; ++i) weight[i] = mask[i] ? weight[i] : 0;
}

// out may be x; tokens that are not kept become 0.
template <typename T, typename Keep>
FINEALIGN_INLINE void whiten_tokens(const T* x, const Keep* keep, int64_t n, const Whitening& by, T* out) {
  const Standard standard = standard_of(by, sizeof(T) == 8);
  for (int64_t base = 0; base < n; base += kTile) {
    const int many = static_cast<int>(std::min<int64_t>(kTile, n - base));
    double value[kTile];
    for (int i = 0; i < many; ++i) value[i] = x[base + i];
    whiten(value, many, standard, by.shift);
    select_kept(value, keep ? keep + base : nullptr, many);
    for (int i = 0; i < many; ++i) out[base + i] = static_cast<T>(value[i]);
  }
}

// The steps after the scan for tokens [first, stop).
template <typename T>
FINEALIGN_INLINE Moments finish(const Advantages& op, int64_t first, int64_t stop) {
  const T* advantages = static_cast<const T*>(op.advantages) + first;
  T* whitened = op.whitened ? static_cast<T*>(op.whitened) + first : nullptr;
  const uint8_t* mask = op.segments.mask ? op.segments.mask + first : nullptr;
  const float* pivot = op.pivots_first ? static_cast<const float*>(op.token_weight) + first : nullptr;
  Moments moments{};
  if (op.pivots_first && op.score) pivots(op, advantages, first, stop);
  if (op.advantage_moments)
    moments = pivot ? moments_of(advantages, pivot, stop - first) : moments_of(advantages, mask, stop - first);
  if (whitened && pivot) whiten_tokens(advantages, pivot, stop - first, op.whiten_advantages, whitened);
  else if (whitened) whiten_tokens(advantages, mask, stop - first, op.whiten_advantages, whitened);
  if (!op.pivots_first && op.score) pivots<T>(op, whitened ? whitened : advantages, first, stop);
  return moments;
}

// target_clones cannot be used with templates, so there is one wide function for each type, chosen by `T`.
#define FINEALIGN_STEPS(T)                                                                                   \
  FINEALIGN_WIDE_UNFUSED void shape_tokens(const Advantages& op, int64_t first, int64_t stop, T) {           \
    shape<T>(op, first, stop);                                                                               \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED Moments shaped_moments(const Advantages& op, int64_t first, int64_t stop, T) {      \
    const T* x = static_cast<const T*>(op.shaped ? op.shaped : op.rewards) + first;                          \
    return moments_of(x, op.segments.mask ? op.segments.mask + first : nullptr, stop - first);               \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED Affine scan(const Advantages& op, const Piece& piece, State state, bool stores, T) { \
    return scan_tokens<T>(op, piece, state, standard_of(op.whiten_rewards, sizeof(T) == 8), stores);                         \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED void scan_short(const Advantages& op, int64_t first, int64_t last, T) {             \
    scan_sequences<T>(op, first, last);                                                                      \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED Moments finish_tokens(const Advantages& op, int64_t first, int64_t stop, T) {       \
    return finish<T>(op, first, stop);                                                                       \
  }
FINEALIGN_STEPS(float)
FINEALIGN_STEPS(double)

// ---- all sequences -------------------------------------------------------------------------------------------------

// The states at the right of all pieces without y: the next valid value of the same sequence.
template <typename T>
std::vector<State> states(const Advantages& op, const std::vector<Piece>& pieces, Parallel parallel) {
  const T* values = static_cast<const T*>(op.values);
  const auto value = [values](int64_t token) { return values ? static_cast<double>(values[token]) : 0; };
  std::vector<int64_t> valid(pieces.size());  // the first valid token of each piece, or its stop if there is none
  for_pieces(pieces, parallel, [&](int64_t i, Piece piece) {
    for (valid[i] = piece.first; valid[i] < piece.stop && !op.segments.keeps(valid[i]);) ++valid[i];
  });
  std::vector<State> right(pieces.size());
  for (int64_t i = static_cast<int64_t>(pieces.size()) - 1; i >= 0; --i) {
    const bool last = i + 1 == static_cast<int64_t>(pieces.size()) || pieces[i + 1].s != pieces[i].s;
    right[i] = last ? at_end<T>(op, pieces[i].s) : right[i + 1];
    if (last || valid[i + 1] == pieces[i + 1].stop) {
      if (!last && op.zero && right[i].seen) right[i].ahead = 0;
      continue;
    }
    const bool beside = valid[i + 1] == pieces[i].stop;
    right[i] = {0, op.zero && !beside ? 0 : value(valid[i + 1]), true};
  }
  return right;
}

template <typename T>
void run(const Advantages& op, Parallel parallel) {
  const bool shapes = op.shaped != nullptr, scans = op.returns != nullptr, places = shapes && !op.rewards;
  const bool finishes = op.advantages != nullptr;
  const std::vector<Piece> pieces = cut(op.segments, op.longest);
  const int64_t windows = windows_of(op.segments);
  const int64_t many = static_cast<int64_t>(pieces.size());
  std::vector<Moments> of_rewards(windows + many, Moments{}), of_advantages(of_rewards);
  T* shaped = static_cast<T*>(op.shaped);

  const auto shape_all = [&](int64_t first, int64_t stop, Moments& moments) {
    if (shapes && (op.rewards || op.old_logp)) shape_tokens(op, first, stop, T());
    if (op.reward_moments) moments = moments + shaped_moments(op, first, stop, T());
  };
  for_short(op.segments, parallel, [&](int64_t window, int64_t first, int64_t last) {
    const int64_t start = op.segments.start(first), stop = op.segments.start(last);
    if (places) {
      thread_local std::vector<Placed> placed;
      std::fill(shaped + start, shaped + stop, T(0));
      for (int64_t s = first; s < last; ++s) place_all<T>(op, s, placed);
    }
    shape_all(start, stop, of_rewards[window]);
    if (scans) scan_short(op, first, last, T());
    if (finishes) of_advantages[window] = of_advantages[window] + finish_tokens(op, start, stop, T());
  });

  if (places && many) {
    for_pieces(pieces, parallel, [&](int64_t, Piece piece) { std::fill(shaped + piece.first, shaped + piece.stop, T(0)); });
    for_pieces(pieces, parallel, [&](int64_t, Piece piece) {
      std::vector<Placed> placed;
      if (piece.first == op.segments.start(piece.s)) place_all<T>(op, piece.s, placed);
    });
  }
  for_pieces(pieces, parallel, [&](int64_t i, Piece piece) {
    shape_all(piece.first, piece.stop, of_rewards[windows + i]);
  });
  if (scans && many) {
    std::vector<State> right = states<T>(op, pieces, parallel);
    std::vector<Affine> maps(many);
    for_pieces(pieces, parallel, [&](int64_t i, Piece piece) { maps[i] = scan(op, piece, right[i], false, T()); });
    for (int64_t i = many - 1; i > 0; --i)
      if (pieces[i - 1].s == pieces[i].s) right[i - 1].y = maps[i](right[i].y);
    for_pieces(pieces, parallel, [&](int64_t i, Piece piece) { scan(op, piece, right[i], true, T()); });
  }
  if (finishes)
    for_pieces(pieces, parallel, [&](int64_t i, Piece piece) {
      of_advantages[windows + i] = finish_tokens(op, piece.first, piece.stop, T());
    });

  const auto store_moments = [&](double* out, const std::vector<Moments>& parts) {
    if (out == nullptr) return;
    const Moments sum = total(parts.data(), static_cast<int64_t>(parts.size()));
    out[0] = sum.n, out[1] = sum.sum, out[2] = sum.squares, out[3] = sum.mean, out[4] = sum.away;
  };
  store_moments(op.reward_moments, of_rewards);
  store_moments(op.advantage_moments, of_advantages);
}

}  // namespace

void advantages_cpu(const Advantages& op, Parallel parallel) {
  if (op.dtype == DType::f64) run<double>(op, parallel);
  else run<float>(op, parallel);
}

}  // namespace finealign
