// Recurrences over the sequences of a flat batch on a GPU: y_t = x_t + a_t y_(t+1), its transpose, and GAE.
//
// A sequence is cut into spans of kSpan tokens, counted from its start. In a span each lane composes the maps
// y -> d_t + a_t y of its own tokens, the lanes' maps are composed in a tree, and y enters the span last: through the
// spans before it, one after the other. A warp walks a short sequence alone, the warps of a block take a span each of a
// longer one, with the same arithmetic, so that bits depend on a sequence's own tokens alone. All of it is float64.
#pragma once

#include "formulas.cuh"
#include "segments.cuh"

namespace finealign {

constexpr int kEach = 4;               // tokens of a lane, one behind the other
constexpr int kSpan = kLanes * kEach;  // tokens of a warp

// ---- maps ----------------------------------------------------------------------------------------------------------

// y -> b + a y.
struct Map {
  double a, b;

  // Decays above 1 may overflow in a product; what meets 0 stays 0 all the same.
  __device__ __forceinline__ double operator()(double y) const { return y == 0 && a == a ? b : fma(a, y, b); }
};

__device__ __forceinline__ Map after(Map later, Map earlier) { return {later.a * earlier.a, later(earlier.b)}; }

// What a token takes for the value of the next valid one: nothing is known before the first token, then no valid token
// has been seen, then one has.
struct Ahead {
  double value;
  int state;  // 0: no token, 1: masked ones alone, 2: a valid one
};

// zero: a masked token is a step whose value is 0, but after the last valid token.
__device__ __forceinline__ Ahead after(Ahead later, Ahead earlier, bool zero) {
  if (later.state == 2) return later;
  if (later.state == 0) return earlier;
  if (earlier.state == 2) return {zero ? 0 : earlier.value, 2};
  return {earlier.value, 1};
}

// The sum over a block's threads in a tree, written by the first.
__device__ __forceinline__ void add_block(Moments sum, Moments* out) {
  __shared__ Moments warps[kWarps];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    sum.n += __shfl_xor_sync(kAllLanes, sum.n, half);
    sum.sum += __shfl_xor_sync(kAllLanes, sum.sum, half);
    sum.squares += __shfl_xor_sync(kAllLanes, sum.squares, half);
  }
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w)
    sum = {sum.n + warps[w].n, sum.sum + warps[w].sum, sum.squares + warps[w].squares};
  *out = sum;
}

// ---- lanes and warps in the order in which tokens are walked ---------------------------------------------------------

template <bool kForward>
__device__ __forceinline__ int order() {
  const int lane = threadIdx.x % kLanes;
  return kForward ? lane : kLanes - 1 - lane;
}

// The value of the lane that comes `steps` before this one.
template <bool kForward, typename V>
__device__ __forceinline__ V before(V value, int steps) {
  return kForward ? __shfl_up_sync(kAllLanes, value, steps) : __shfl_down_sync(kAllLanes, value, steps);
}

template <bool kForward>
__device__ __forceinline__ Map before(Map map, int steps) {
  return {before<kForward>(map.a, steps), before<kForward>(map.b, steps)};
}

template <bool kForward>
__device__ __forceinline__ Ahead before(Ahead ahead, int steps) {
  return {before<kForward>(ahead.value, steps), before<kForward>(ahead.state, steps)};
}

__device__ __forceinline__ Map from_lane(Map map, int lane) {
  return {__shfl_sync(kAllLanes, map.a, lane), __shfl_sync(kAllLanes, map.b, lane)};
}
__device__ __forceinline__ Ahead from_lane(Ahead ahead, int lane) {
  return {__shfl_sync(kAllLanes, ahead.value, lane), __shfl_sync(kAllLanes, ahead.state, lane)};
}

// Makes `mine` the part of all lanes up to this one; returns that of the lanes before it, `none` in the first.
template <bool kForward, typename Part, typename Join>
__device__ __forceinline__ Part parts_before(Part& mine, Part none, Join join) {
#pragma unroll
  for (int steps = 1; steps < kLanes; steps *= 2) {
    const Part other = before<kForward>(mine, steps);
    if (order<kForward>() >= steps) mine = join(mine, other);
  }
  const Part previous = before<kForward>(mine, 1);
  return order<kForward>() == 0 ? none : previous;
}

// What enters this warp's span. `carry` is what enters the first one of the team's spans, and is moved past all of them;
// `whole` is each warp's own part, in all its lanes.
template <int kTeam, typename Part, typename Value, typename Join>
__device__ __forceinline__ Value entering(Part whole, Value& carry, Part* shared, Join join) {
  Value enter = carry;
  if constexpr (kTeam == 1) {
    carry = join(whole, carry);
  } else {
    const int warp = threadIdx.x / kLanes;
    if (threadIdx.x % kLanes == 0) shared[warp] = whole;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kTeam; ++w) {
      if (w == warp) enter = carry;
      carry = join(shared[w], carry);
    }
    __syncthreads();  // before the next round writes
  }
  return enter;
}

// y of the span's tokens, over d. `carry` is y before the team's spans, and is moved past them.
template <bool kForward, int kTeam>
__device__ __forceinline__ void scan_span(double (&d)[kEach], const double (&a)[kEach], double& carry, Map* shared) {
  Map own{1, 0};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = kForward ? e : kEach - 1 - e;
    own = after(Map{a[i], d[i]}, own);
  }
  const auto join = [](Map later, Map earlier) { return after(later, earlier); };
  const Map left = parts_before<kForward>(own, Map{1, 0}, join);
  const Map whole = from_lane(own, kForward ? kLanes - 1 : 0);
  double y = left(entering<kTeam>(whole, carry, shared, [](Map map, double at) { return map(at); }));
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = kForward ? e : kEach - 1 - e;
    d[i] = y = Map{a[i], d[i]}(y);
  }
}

// The tokens of one lane in one span: [first, first + kEach), of which those from stop on are none.
struct Place {
  int64_t first, stop;
  __device__ __forceinline__ bool has(int e) const { return first + e < stop; }
};

// each(place) for every round of a sequence's spans, from its end where not kForward; kTeam warps take one each.
template <bool kForward, int kTeam, typename Each>
__device__ __forceinline__ void for_spans(int64_t start, int64_t stop, Each each) {
  const int64_t spans = (stop - start + kSpan - 1) / kSpan;
  const int warp = kTeam == 1 ? 0 : threadIdx.x / kLanes;
  for (int64_t round = 0; round < spans; round += kTeam) {
    const int64_t index = round + warp, span = kForward ? index : spans - 1 - index;
    const int64_t first = start + span * kSpan + threadIdx.x % kLanes * kEach;
    each(Place{first, index < spans ? stop : first});
  }
}

// Fills tokens of a segment with invalid bounds; thread `thread` of `threads`.
template <typename T>
__device__ __forceinline__ void fill_nan(T* out, Bounds b, int thread, int threads) {
  for (int64_t i = b.start + thread; i < b.stop; i += threads) out[i] = static_cast<T>(NAN);
}

// ---- reverse_scan ----------------------------------------------------------------------------------------------------

template <typename T, bool kForward, int kTeam>
__device__ __forceinline__ void scan_sequence(const Scan& op, int64_t s, Bounds b, Map* shared) {
  const T *x = static_cast<const T*>(op.x), *decay = static_cast<const T*>(op.decay);
  if (b.start == b.stop) return;  // with no token at all, decay is null too
  const double rate = op.rates ? op.rates[s * op.rate_stride] : 0;  // no tokens: decay is null as well
  double carry = 0;
  for_spans<kForward, kTeam>(b.start, b.stop, [&](Place place) {
    double d[kEach], a[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t i = place.first + e, at = kForward ? i - 1 : i;  // whose decay stands before y
      d[e] = place.has(e) && op.segments.keeps(i) ? static_cast<double>(x[i]) : 0;
      a[e] = 1;
      if (place.has(e) && at < b.start) a[e] = 0;
      else if (place.has(e) && op.segments.keeps(at)) a[e] = decay ? static_cast<double>(decay[at]) : rate;
    }
    scan_span<kForward, kTeam>(d, a, carry, shared);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int64_t i = place.first + e;
      if (place.has(e)) static_cast<T*>(op.out)[i] = op.segments.keeps(i) ? static_cast<T>(d[e]) : T(0);
    }
  });
}

template <typename T, bool kForward>
__global__ void __launch_bounds__(kThreads, 3) scan_kernel(Scan op, int each) {
  __shared__ Map shared[kWarps];
  T* out = static_cast<T*>(op.out);
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        if (b.valid) scan_sequence<T, kForward, 1>(op, s, b, shared);
        else fill_nan(out, b, threadIdx.x % kLanes, kLanes);
      },
      [&](int64_t s, Bounds b) {
        if (b.valid) scan_sequence<T, kForward, kWarps>(op, s, b, shared);
        else fill_nan(out, b, threadIdx.x, kThreads);
      });
}

// ---- advantages ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ Standard standard_of(const Whitening& by) {
  if (by.moments == nullptr) return {0, 1};
  return standard({by.moments[0], by.moments[1], by.moments[2]}, by.scale, by.unbiased);
}

__device__ __forceinline__ double whitened(double x, Standard by, bool shift) {
  const double y = by.scale == 0 ? 0 : (x - by.mean) * by.scale;
  return shift ? y : y + by.mean;
}

// shaped = rewards - β kl, 0 at masked tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) shape_kernel(Advantages op) {
  const T *rewards = static_cast<const T*>(op.rewards), *old_logp = static_cast<const T*>(op.old_logp);
  const T* ref_logp = static_cast<const T*>(op.ref_logp);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < op.segments.total; i += step) {
    const bool keep = op.segments.keeps(i);
    const double d = keep ? static_cast<double>(old_logp[i]) - static_cast<double>(ref_logp[i]) : 0;
    const double kl = keep ? divergence(op.estimator, d) : 0;
    double reward = keep ? static_cast<double>(rewards[i]) : 0;
    if (op.kl_coef != 0) reward -= op.kl_coef * kl;
    static_cast<T*>(op.shaped)[i] = static_cast<T>(reward);
    static_cast<T*>(op.kl)[i] = static_cast<T>(kl);
  }
}

template <typename T, int kTeam>
__device__ __forceinline__ void gae_sequence(const Advantages& op, int64_t s, Bounds b, Map* maps, Ahead* aheads) {
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards);
  const T* values = static_cast<const T*>(op.values);
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  const double gamma = op.gamma[s * op.gamma_stride], decay = gamma * op.lam[s * op.lam_stride];
  const bool zero = op.zero, whitens = op.whiten_rewards.moments != nullptr;
  const Standard by = standard_of(op.whiten_rewards);
  double carry = 0;
  Ahead next{op.bootstrap ? op.bootstrap[s] : 0, 0};
  const auto join = [zero](Ahead later, Ahead earlier) { return after(later, earlier, zero); };
  for_spans<false, kTeam>(b.start, b.stop, [&](Place place) {
    double v[kEach], d[kEach], a[kEach];
    bool valid[kEach];
    Ahead own{0, 0};
#pragma unroll
    for (int e = kEach - 1; e >= 0; --e) {
      const int64_t i = place.first + e;
      valid[e] = place.has(e) && op.segments.keeps(i);
      v[e] = valid[e] && values ? static_cast<double>(values[i]) : 0;
      d[e] = valid[e] ? static_cast<double>(rewards[i]) : 0;
      if (place.has(e)) own = join(Ahead{v[e], valid[e] ? 2 : 1}, own);
    }
    const Ahead right = parts_before<false>(own, Ahead{0, 0}, join);
    Ahead ahead = join(right, entering<kTeam>(from_lane(own, 0), next, aheads, join));
#pragma unroll
    for (int e = kEach - 1; e >= 0; --e) {
      if (whitens) d[e] = whitened(d[e], by, op.whiten_rewards.shift);
      const double delta = fma(gamma, ahead.value, d[e] - v[e]);
      const double step = zero && ahead.state == 2 ? gamma * ahead.value : 0;  // of a masked token
      d[e] = valid[e] ? delta : place.has(e) ? step : 0;
      a[e] = valid[e] || (zero && place.has(e)) ? decay : 1;
      if (place.has(e)) ahead = join(Ahead{v[e], valid[e] ? 2 : 1}, ahead);
    }
    scan_span<false, kTeam>(d, a, carry, maps);
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (!place.has(e)) continue;
      advantages[place.first + e] = valid[e] ? static_cast<T>(d[e]) : T(0);
      returns[place.first + e] = valid[e] ? static_cast<T>(d[e] + v[e]) : T(0);
    }
  });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gae_kernel(Advantages op, int each) {
  __shared__ Map maps[kWarps];
  __shared__ Ahead aheads[kWarps];
  T *advantages = static_cast<T*>(op.advantages), *returns = static_cast<T*>(op.returns);
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        if (b.valid) return gae_sequence<T, 1>(op, s, b, maps, aheads);
        fill_nan(advantages, b, threadIdx.x % kLanes, kLanes);
        fill_nan(returns, b, threadIdx.x % kLanes, kLanes);
      },
      [&](int64_t s, Bounds b) {
        if (b.valid) return gae_sequence<T, kWarps>(op, s, b, maps, aheads);
        fill_nan(advantages, b, threadIdx.x, kThreads);
        fill_nan(returns, b, threadIdx.x, kThreads);
      });
}

// Block: the moments of kMomentTokens tokens, to parts[block]. Tokens count where the mask, or else `kept`, is not 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) moments_kernel(const T* x, const uint8_t* mask, const float* kept,
                                                           int64_t total, Moments* parts) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentTokens;
  const int64_t stop = first + kMomentTokens < total ? first + kMomentTokens : total;
  Moments sum{0, 0, 0};
  for (int64_t i = first + threadIdx.x; i < stop; i += kThreads) {
    if (kept ? kept[i] == 0 : mask != nullptr && mask[i] == 0) continue;  // select: it may be NaN
    const double value = x[i];
    sum = {sum.n + 1, sum.sum + value, fma(value, value, sum.squares)};
  }
  add_block(sum, parts + blockIdx.x);
}

// One block: parts added up, each thread's in order, then the threads' in a tree.
__global__ void __launch_bounds__(kThreads) add_moments_kernel(const Moments* parts, int64_t count, Moments* out) {
  Moments sum{0, 0, 0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads)
    sum = {sum.n + parts[i].n, sum.sum + parts[i].sum, sum.squares + parts[i].squares};
  add_block(sum, out);
}

// Whitened in place or elsewhere, and pivots by the signs; each where its output is given.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(Advantages op) {
  const T *advantages = static_cast<const T*>(op.advantages), *score = static_cast<const T*>(op.score);
  const float* kept = op.pivots_first ? static_cast<const float*>(op.token_weight) : nullptr;
  float* weight = static_cast<float*>(op.token_weight);
  const bool whitens = op.whitened != nullptr;
  const Standard by = standard_of(op.whiten_advantages);
  const float baseline = static_cast<float>(op.baseline);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < op.segments.total; i += step) {
    const bool valid = op.segments.keeps(i);
    T advantage = advantages[i];
    if (whitens) {
      const bool keep = kept && !score ? kept[i] != 0 : valid;
      advantage = keep ? static_cast<T>(whitened(advantage, by, op.whiten_advantages.shift)) : T(0);
      static_cast<T*>(op.whitened)[i] = advantage;
    }
    if (score == nullptr) continue;
    const float q = static_cast<float>(score[i]);  // compared in float32, as everywhere
    const bool up = advantage >= 0 && q > baseline, down = advantage < 0 && q < baseline;  // NaN is on neither side
    weight[i] = valid && (up || down) ? 1.0f : 0.0f;
  }
}

}  // namespace finealign
