// From rewards to advantages on a CPU: formulas/returns.py and formulas/rewards.py (placement "end") in one pass over
// the tokens, or in two or three where moments of the whole batch come in between.

#include <utility>

#include "formulas.cuh"
#include "scan.h"

namespace finealign {
namespace {

// ---- moments -------------------------------------------------------------------------------------------------------

Moments operator+(Moments x, Moments y) { return {x.n + y.n, x.sum + y.sum, x.squares + y.squares}; }

// By halves, so that rounding errors grow with the logarithm of their number.
Moments total(const Moments* parts, int64_t count) {
  if (count == 0) return {0, 0, 0};
  if (count == 1) return parts[0];
  return total(parts, count / 2) + total(parts + count / 2, count - count / 2);
}

// How many of at most kTile tokens are kept; added up in bytes, which hold no more than 255.
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

// x_i becomes 0 where it is not kept: selected, not multiplied. Returns how many are kept.
template <typename Keep>
FINEALIGN_INLINE int select_kept(double* __restrict x, const Keep* __restrict keep, int n) {
  if (keep == nullptr) return n;
  const int count = count_kept(keep, n);
  if (count == 0) std::fill_n(x, n, 0.0);
  else if (count < n)
    for (int i = 0; i < n; ++i) x[i] = keep[i] != 0 ? x[i] : 0;
  return count;
}

using Half = double __attribute__((vector_size(kGroup / 2 * sizeof(double))));  // an array would be kept in memory

FINEALIGN_INLINE double added_up(Half lanes) { return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]); }

// Of at most kTile values; keep is null, or says which count.
template <typename T, typename Keep>
FINEALIGN_INLINE Moments tile_moments(const T* __restrict x, const Keep* __restrict keep, int n) {
  double value[kTile];
  for (int i = 0; i < n; ++i) value[i] = x[i];
  const int count = select_kept(value, keep, n), whole = whole_groups(n);
  if (count == 0) return {0, 0, 0};
  for (int i = n; i < whole; ++i) value[i] = 0;
  Half sum[2] = {}, squares[2] = {};
  for (int i = 0; i < whole; i += kGroup) {
    Half left, right;
    std::memcpy(&left, value + i, sizeof left);
    std::memcpy(&right, value + i + kGroup / 2, sizeof right);
    sum[0] += left, sum[1] += right;
    squares[0] += left * left, squares[1] += right * right;
  }
  return {static_cast<double>(count), added_up(sum[0] + sum[1]), added_up(squares[0] + squares[1])};
}

template <typename T, typename Keep>
FINEALIGN_INLINE Moments moments_of(const T* x, const Keep* keep, int64_t n) {
  Moments sum{0, 0, 0};
  for (int64_t i = 0; i < n; i += kTile)
    sum = sum + tile_moments(x + i, keep ? keep + i : keep, static_cast<int>(std::min<int64_t>(kTile, n - i)));
  return sum;
}

// ---- rewards -------------------------------------------------------------------------------------------------------

struct Placed {
  int64_t token;
  double reward;
};

// Appends the rewards of model k in sequence s, by token: formulas/rewards.py `places`, `_put`.
void place(const Advantages& op, int64_t k, int64_t s, std::vector<Placed>& placed) {
  const SegmentRewards& given = op.segment_rewards;
  const int64_t* bounds = given.bounds + k * (op.segments.count + 1) + s;
  const int64_t start = op.segments.start(s), limit = op.segments.start(s + 1);
  int64_t covered = start, receiver = -1;  // no later token is looked at twice
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
    if (to < 0) {  // no token of the response yet: its first one
      for (to = start; to < limit && !op.segments.keeps(to); ++to) {}
      if (to == limit) return;
    }
    if (placed.size() == mine || placed.back().token != to) placed.push_back({to, given.reward[j]});
    else placed.back().reward = given.reward[j] + (given.overwrite ? 0 : placed.back().reward);
  }
}

// Rewards of all models at the tokens of sequence s, which hold 0 before.
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

// shaped = rewards - β kl over tokens [first, stop); the rewards of models stand in shaped.
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

// What comes from the right of a token.
struct State {
  double y;      // the advantage
  double ahead;  // the value that the next valid token to the left takes for V_u
  bool seen;     // a valid token
};

template <typename T>
State at_end(const Advantages& op, int64_t s) {
  return {0, op.bootstrap ? op.bootstrap[s] : 0, false};
}

FINEALIGN_INLINE void whiten(double* x, int n, Standard by, bool shift) {
  for (int i = 0; i < n; ++i) x[i] = by.scale == 0 ? 0 : (x[i] - by.mean) * by.scale;
  if (!shift)
    for (int i = 0; i < n; ++i) x[i] += by.mean;
}

Standard standard_of(const Whitening& by) {
  if (by.moments == nullptr) return {0, 1};
  return standard({by.moments[0], by.moments[1], by.moments[2]}, by.scale, by.unbiased);
}

// Tokens of a piece, from the state at its right. Returns the advantage at its left and the product of its decays;
// stores where `stores`.
template <typename T>
FINEALIGN_INLINE Affine scan_tokens(const Advantages& op, const Piece& piece, State state, Standard by, bool stores) {
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards);
  const T* values = static_cast<const T*>(op.values);
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  const uint8_t* mask = op.segments.mask;
  const double gamma = op.gamma[piece.s * op.gamma_stride], decay = gamma * op.lam[piece.s * op.lam_stride];
  const bool whitens = op.whiten_rewards.moments != nullptr;
  double d[kTile], v[kTile + 1], a[kTile], all = 1;
  const int64_t tiles = (piece.stop - piece.first + kTile - 1) / kTile;
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t first = piece.first + tile * kTile;
    const int n = static_cast<int>(std::min<int64_t>(kTile, piece.stop - first)), whole = whole_groups(n);
    if (tile > 0) {  // the next tile, which is a whole one
      prefetch(rewards + first - kTile, kTile);
      if (values != nullptr) prefetch(values + first - kTile, kTile);
      if (mask != nullptr) prefetch(mask + first - kTile, kTile);
      if (stores) prefetch(advantages + first - kTile, kTile), prefetch(returns + first - kTile, kTile);
    }
    const int kept = mask ? count_kept(mask + first, n) : n;
    if (kept == 0 && !op.zero) {
      if (stores) std::fill_n(advantages + first, n, T(0)), std::fill_n(returns + first, n, T(0));
      continue;
    }
    for (int i = 0; i < n; ++i) d[i] = rewards[first + i];
    if (whitens) whiten(d, n, by, op.whiten_rewards.shift);
    if (values != nullptr)
      for (int i = 0; i < n; ++i) v[i] = values[first + i];
    else
      for (int i = 0; i < n; ++i) v[i] = 0;
    const auto pad = [&] {  // after the sequence's end, where y is 0
      for (int i = n; i < whole; ++i) d[i] = 0, a[i] = 1;
    };
    if (kept == n) {
      v[n] = state.ahead;
      for (int i = 0; i < n; ++i) d[i] = (d[i] - v[i]) + gamma * v[i + 1];
      pad();
      if (!stores) {
        for (int i = 0; i < n; ++i) a[i] = decay;
        all *= product(a, whole);
      }
      state = {scan_back(d, decay, whole, state.y), v[0], true};
    } else {
      for (int i = n - 1; i >= 0; --i) {
        const bool valid = mask[first + i] != 0;
        const double ahead = gamma * state.ahead, delta = (d[i] - v[i]) + ahead;
        const double step = op.zero && state.seen ? ahead : 0;
        d[i] = valid ? delta : step;
        a[i] = valid || op.zero ? decay : 1;
        state.ahead = valid ? v[i] : op.zero && state.seen ? 0 : state.ahead;
        state.seen = state.seen || valid;
      }
      pad();
      if (!stores) all *= product(a, whole);
      state.y = scan_back(d, a, whole, state.y);
    }
    if (!stores) continue;
    if (kept != n) select_kept(d, mask + first, n), select_kept(v, mask + first, n);
    for (int i = 0; i < n; ++i) advantages[first + i] = static_cast<T>(d[i]);
    for (int i = 0; i < n; ++i) returns[first + i] = static_cast<T>(d[i] + v[i]);
  }
  return {all, state.y};
}

constexpr int64_t kFew = 8 * kGroup;

// The same, bit for bit, a group after another: for sequences whose tiles would be mostly empty.
template <typename T>
FINEALIGN_INLINE void scan_few(const Advantages& op, const Piece& piece, State state, Standard by) {
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards);
  const T* values = static_cast<const T*>(op.values);
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  const double gamma = op.gamma[piece.s * op.gamma_stride], decay = gamma * op.lam[piece.s * op.lam_stride];
  for (int64_t stop = piece.stop, first; stop > piece.first; stop = first) {
    first = piece.first + (stop - 1 - piece.first) / kGroup * kGroup;
    double p = 0, q = 1, without[kGroup], times[kGroup], v[kGroup];  // y = without + times · the y of the group's right
    for (int64_t t = stop - 1; t >= first; --t) {
      const double ahead = gamma * state.ahead;
      double delta = op.zero && state.seen ? ahead : 0, step = op.zero ? decay : 1;
      v[t - first] = 0;
      if (op.segments.keeps(t)) {
        double r = rewards[t];
        if (op.whiten_rewards.moments) whiten(&r, 1, by, op.whiten_rewards.shift);
        const double value = values ? values[t] : 0;
        delta = (r - value) + ahead, step = decay;
        v[t - first] = state.ahead = value, state.seen = true;
      } else if (op.zero && state.seen) {
        state.ahead = 0;
      }
      without[t - first] = p = delta + step * p;
      times[t - first] = q = step * q;
    }
    for (int64_t t = first; t < stop; ++t) {
      const double y = without[t - first] + times[t - first] * state.y;
      const bool valid = op.segments.keeps(t);
      advantages[t] = static_cast<T>(valid ? y : 0);
      returns[t] = static_cast<T>(valid ? y + v[t - first] : 0);
    }
    state.y = without[0] + times[0] * state.y;
  }
}

// The same, bit for bit, of a sequence of one group: nothing comes from its right.
template <typename T>
FINEALIGN_INLINE void scan_group(const Advantages& op, const Piece& piece, State state, Standard by) {
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards);
  const T* values = static_cast<const T*>(op.values);
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  const double gamma = op.gamma[piece.s * op.gamma_stride], decay = gamma * op.lam[piece.s * op.lam_stride];
  double y = 0;
  for (int64_t t = piece.stop - 1; t >= piece.first; --t) {
    const double ahead = gamma * state.ahead;
    if (op.segments.keeps(t)) {
      double r = rewards[t];
      if (op.whiten_rewards.moments) whiten(&r, 1, by, op.whiten_rewards.shift);
      const double value = values ? values[t] : 0;
      y = ((r - value) + ahead) + decay * y;
      state.ahead = value, state.seen = true;
      advantages[t] = static_cast<T>(y + 0.0), returns[t] = static_cast<T>((y + 0.0) + value);  // -0 becomes 0
    } else {
      if (op.zero) y = (state.seen ? ahead : 0) + decay * y, state.ahead = state.seen ? 0 : state.ahead;
      advantages[t] = returns[t] = 0;
    }
  }
}

// All sequences from first to last - 1, each of at most kCut tokens.
template <typename T>
FINEALIGN_INLINE void scan_sequences(const Advantages& op, int64_t first, int64_t last) {
  const Standard by = standard_of(op.whiten_rewards);
  for (int64_t s = first; s < last; ++s) {
    const Piece all{s, op.segments.start(s), op.segments.start(s + 1)};
    if (all.stop - all.first <= kGroup) scan_group<T>(op, all, at_end<T>(op, s), by);
    else if (all.stop - all.first <= kFew) scan_few<T>(op, all, at_end<T>(op, s), by);
    else scan_tokens<T>(op, all, at_end<T>(op, s), by, true);
  }
}

// ---- pivots and the last whitening -----------------------------------------------------------------------------------

// 1 where the score is on the advantage's side of the baseline; NaN is on neither. Compared in float32, as everywhere.
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

// out may be x; what is not kept becomes 0.
template <typename T, typename Keep>
FINEALIGN_INLINE void whiten_tokens(const T* x, const Keep* keep, int64_t n, const Whitening& by, T* out) {
  const Standard standard = standard_of(by);
  for (int64_t base = 0; base < n; base += kTile) {
    const int many = static_cast<int>(std::min<int64_t>(kTile, n - base));
    double value[kTile];
    for (int i = 0; i < many; ++i) value[i] = x[base + i];
    whiten(value, many, standard, by.shift);
    select_kept(value, keep ? keep + base : nullptr, many);
    for (int i = 0; i < many; ++i) out[base + i] = static_cast<T>(value[i]);
  }
}

// What follows the scan at tokens [first, stop).
template <typename T>
FINEALIGN_INLINE Moments finish(const Advantages& op, int64_t first, int64_t stop) {
  const T* advantages = static_cast<const T*>(op.advantages) + first;
  T* whitened = op.whitened ? static_cast<T*>(op.whitened) + first : nullptr;
  const uint8_t* mask = op.segments.mask ? op.segments.mask + first : nullptr;
  const float* pivot = op.pivots_first ? static_cast<const float*>(op.token_weight) + first : nullptr;
  Moments moments{0, 0, 0};
  if (op.pivots_first && op.score) pivots(op, advantages, first, stop);
  if (op.advantage_moments)
    moments = pivot ? moments_of(advantages, pivot, stop - first) : moments_of(advantages, mask, stop - first);
  if (whitened && pivot) whiten_tokens(advantages, pivot, stop - first, op.whiten_advantages, whitened);
  else if (whitened) whiten_tokens(advantages, mask, stop - first, op.whiten_advantages, whitened);
  if (!op.pivots_first && op.score) pivots<T>(op, whitened ? whitened : advantages, first, stop);
  return moments;
}

// target_clones takes no templates: one wide function a type, which `T` chooses.
#define FINEALIGN_STEPS(T)                                                                                   \
  FINEALIGN_WIDE_UNFUSED void shape_tokens(const Advantages& op, int64_t first, int64_t stop, T) {           \
    shape<T>(op, first, stop);                                                                               \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED Moments shaped_moments(const Advantages& op, int64_t first, int64_t stop, T) {      \
    const T* x = static_cast<const T*>(op.shaped ? op.shaped : op.rewards) + first;                          \
    return moments_of(x, op.segments.mask ? op.segments.mask + first : nullptr, stop - first);               \
  }                                                                                                          \
  FINEALIGN_WIDE_UNFUSED Affine scan(const Advantages& op, const Piece& piece, State state, bool stores, T) { \
    return scan_tokens<T>(op, piece, state, standard_of(op.whiten_rewards), stores);                         \
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

// The states at the right of all pieces, but for y: the next valid value of the same sequence.
template <typename T>
std::vector<State> states(const Advantages& op, const std::vector<Piece>& pieces, Parallel parallel) {
  const T* values = static_cast<const T*>(op.values);
  const auto value = [values](int64_t token) { return values ? static_cast<double>(values[token]) : 0; };
  std::vector<int64_t> valid(pieces.size());  // the first valid token of each piece, its stop where there is none
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
  const int64_t windows = op.segments.total / kBlock + 1;
  const int64_t many = static_cast<int64_t>(pieces.size());
  std::vector<Moments> of_rewards(windows + many, Moments{0, 0, 0}), of_advantages(of_rewards);
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
    out[0] = sum.n, out[1] = sum.sum, out[2] = sum.squares;
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
