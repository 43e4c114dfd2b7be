// Recurrences over the sequences of a flat batch on a GPU: y_t = x_t + a_t y_(t+1), its transpose, and GAE.
//
// A sequence is cut into spans of kSpan tokens, counted from its start. In a span, each lane composes the maps
// y -> d_t + a_t y of its own tokens, then the maps of the lanes are composed in a tree. The y that enters a span comes from
// the spans that are computed before it, one after the other. One warp computes a short sequence alone; for a longer one, each
// warp of a block takes a span, with the same arithmetic.
//
// A sequence of more than kPiece tokens is cut into pieces, also counted from its start. The y that enters a piece comes from
// the maps of the pieces computed before it, one after the other. One block computes piece after piece. If there are only a
// few sequences, each piece has its own block: first the maps of all pieces, then the y that enters each, then all y. Bits
// therefore depend only on a sequence's own tokens. Everything is float64.
//
// Tokens and mask are loaded before the mask is used, and the tokens of the next round before the scan of this one, so that
// loads overlap.
#pragma once

#include "formulas.cuh"
#include "segments.cuh"

namespace finealign {

constexpr int kEach = 4;               // adjacent tokens of a lane
constexpr int kSpan = kLanes * kEach;  // tokens of a warp
constexpr unsigned kSpans = kPiece / kSpan;  // of a piece
static_assert(kPiece % (kWarps * kSpan) == 0 && kPiece >= kChunk, "a warp alone walks one piece, a block whole rounds");

// ---- maps ----------------------------------------------------------------------------------------------------------

// A product of decays above 1 may overflow to inf; multiplied by 0 it still gives 0.
__device__ __forceinline__ double through(Map map, double y) {
  return y == 0 && map.a == map.a ? map.b : fma(map.a, y, map.b);
}

__device__ __forceinline__ Map after(Map later, Map earlier) { return {later.a * earlier.a, through(later, earlier.b)}; }

// The value of the next valid token, which a token needs, and whether there is one so far.
struct Ahead {
  double value;
  int state;  // tokens seen so far: 0 none, 1 only masked ones, 2 a valid one
};

// zero: a masked token is a step with value 0, except after the last valid token.
__device__ __forceinline__ Ahead after(Ahead later, Ahead earlier, bool zero) {
  if (later.state == 2) return later;
  if (later.state == 0) return earlier;
  if (earlier.state == 2) return {zero ? 0 : earlier.value, 2};
  return {earlier.value, 1};
}

// The sum over the threads of a block, in a tree; thread 0 writes it.
__device__ __forceinline__ void add_block(Moments sum, Moments* out) {
  __shared__ Moments warps[kWarps];
  for (int half = kLanes / 2; half > 0; half /= 2) {
    const Moments other{__shfl_down_sync(kAllLanes, sum.n, half), __shfl_down_sync(kAllLanes, sum.sum, half),
                        __shfl_down_sync(kAllLanes, sum.squares, half), __shfl_down_sync(kAllLanes, sum.mean, half),
                        __shfl_down_sync(kAllLanes, sum.away, half)};
    sum = sum + other;
  }
  if (threadIdx.x % kLanes == 0) warps[threadIdx.x / kLanes] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) sum = sum + warps[w];
  *out = sum;
}

// ---- lanes and warps in the order in which tokens are walked ---------------------------------------------------------

template <bool kForward>
__device__ __forceinline__ int order() {
  const int lane = threadIdx.x % kLanes;
  return kForward ? lane : kLanes - 1 - lane;
}

// The value of the lane that is `steps` before this one in that order.
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

// An inclusive scan over lanes in `mine`. Returns the exclusive scan, which is `none` in the first lane.
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

// Returns what enters this warp's span. `carry` is what enters the team's first span; it is moved past all of its spans.
// `own` is each warp's own part, in all its lanes.
template <int kTeam, typename Part, typename Value, typename Join>
__device__ __forceinline__ Value entering(Part own, Value& carry, Part* shared, Join join) {
  Value enter = carry;
  if constexpr (kTeam == 1) {
    carry = join(own, carry);
  } else {
    const int warp = threadIdx.x / kLanes;
    if (threadIdx.x % kLanes == 0) shared[warp] = own;
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

// The y that enters a span, and the map of the piece's spans before it, which is computed only if it is needed.
struct Course {
  double y;
  bool maps;
  Map whole;
};

// With kWrites, replaces d by the y of the span's tokens. `course` is moved past the team's spans.
template <bool kForward, int kTeam, bool kWrites>
__device__ __forceinline__ void scan_span(double (&d)[kEach], const double (&a)[kEach], Course& course, Map* shared) {
  Map own{1, 0};
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = kForward ? e : kEach - 1 - e;
    own = after(Map{a[i], d[i]}, own);
  }
  const Map left = parts_before<kForward>(own, Map{1, 0}, [](Map later, Map earlier) { return after(later, earlier); });
  const Map span = from_lane(own, kForward ? kLanes - 1 : 0);
  const auto move = [&](Map map, double y) {
    if (course.maps) course.whole = after(map, course.whole);
    return kWrites ? through(map, y) : y;
  };
  double y = through(left, entering<kTeam>(span, course.y, shared, move));
  if constexpr (!kWrites) return;
#pragma unroll
  for (int e = 0; e < kEach; ++e) {
    const int i = kForward ? e : kEach - 1 - e;
    d[i] = y = through(Map{a[i], d[i]}, y);
  }
}

// The tokens of one lane in one span, counted from the piece's first token: [first, first + kEach), without those from stop on.
struct Place {
  int first, stop;
  __device__ __forceinline__ bool has(int e) const { return first + e < stop; }
};

// The remainder changes no valid span; it bounds the product for the compiler.
template <bool kForward, int kTeam>
__device__ __forceinline__ Place place_of(int tokens, int round) {
  const int spans = (tokens + kSpan - 1) / kSpan, index = round * kTeam + (kTeam == 1 ? 0 : threadIdx.x / kLanes);
  const unsigned span = static_cast<unsigned>(kForward ? index : spans - 1 - index) % kSpans;  // unchanged if valid
  const int first = static_cast<int>(span * kSpan + threadIdx.x % kLanes * kEach);
  return {index < spans ? first : 0, index < spans ? tokens : 0};
}

// Calls each(place, result of fetch(place)) for every round of a piece's spans, from its end unless kForward. Each of kTeam
// warps takes a span.
template <bool kForward, int kTeam, typename Fetch, typename Each>
__device__ __forceinline__ void for_spans(int tokens, Fetch fetch, Each each) {
  const int rounds = (tokens + kTeam * kSpan - 1) / (kTeam * kSpan);
  Place place = place_of<kForward, kTeam>(tokens, 0);
  auto ahead = fetch(place);
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const Place here = place;
    auto read = ahead;
    place = place_of<kForward, kTeam>(tokens, round + 1);
    ahead = fetch(place);  // nothing, after the last
    each(here, read);
  }
}

__device__ __forceinline__ int64_t pieces_of(Bounds b) { return (b.stop - b.start + kPiece - 1) / kPiece; }

// Tokens [start, stop) of piece `index`.
__device__ __forceinline__ Bounds piece_of(Bounds b, int64_t index) {
  const int64_t start = b.start + index * kPiece;
  return {start, start + kPiece < b.stop ? start + kPiece : b.stop, true};
}

// Calls walk(index, course), which moves the course past a piece, for each piece of a sequence in order.
template <bool kForward, int kTeam, typename Walk>
__device__ __forceinline__ void for_pieces(Bounds b, Walk walk) {
  const int64_t pieces = kTeam == 1 ? 1 : pieces_of(b);  // a single warp takes sequences of one chunk
  double y = 0;
#pragma unroll 1
  for (int64_t k = 0; k < pieces; ++k) {
    Course course{y, k + 1 < pieces, {1, 0}};
    walk(kForward ? k : pieces - 1 - k, course);
    y = through(course.whole, y);
  }
}

// Fills tokens of a segment with invalid bounds; thread `thread` of `threads`.
template <typename T>
__device__ __forceinline__ void fill_nan(T* out, Bounds b, int thread, int threads) {
  for (int64_t i = b.start + thread; i < b.stop; i += threads) out[i] = static_cast<T>(NAN);
}

// ---- reverse_scan ----------------------------------------------------------------------------------------------------

// What a lane loads of its tokens; `decays` are the factors of their y.
template <typename T>
struct ScanTokens {
  T x[kEach], decay[kEach];
  bool keeps[kEach], decays[kEach];
};

// Computes piece `index` of sequence s. With kWrites it writes y. `course` is moved past the piece.
template <typename T, bool kForward, int kTeam, bool kWrites>
__device__ __forceinline__ void scan_piece(const Scan& op, int64_t s, Bounds b, int64_t index, Course& course,
                                           Map* shared) {
  const Bounds piece = piece_of(b, index);
  const T *x = static_cast<const T*>(op.x) + piece.start, *decay = static_cast<const T*>(op.decay);
  const uint8_t* mask = op.segments.mask;
  T* out = static_cast<T*>(op.out) + piece.start;
  if (decay != nullptr) decay += piece.start;
  if (mask != nullptr) mask += piece.start;
  const double rate = op.rates ? op.rates[s * op.rate_stride] : 0;  // without tokens, decay is null too
  const int lowest = index == 0 ? 0 : -1;  // the sequence has no token before its first one
  const auto fetch = [&](Place place) {
    ScanTokens<T> read;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int i = place.first + e, at = kForward ? i - 1 : i;
      const bool has = place.has(e), steps = has && at >= lowest;
      read.x[e] = has ? x[i] : T(0);
      read.decay[e] = steps && decay != nullptr ? decay[at] : T(0);
      read.keeps[e] = has && (mask == nullptr || mask[i] != 0);
      read.decays[e] = steps && (mask == nullptr || mask[at] != 0);
    }
    return read;
  };
  for_spans<kForward, kTeam>(static_cast<int>(piece.stop - piece.start), fetch, [&](Place place, const auto& read) {
    double d[kEach], a[kEach];
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      d[e] = read.keeps[e] ? static_cast<double>(read.x[e]) : 0;  // select: a masked token may hold NaN
      const bool starts = kForward && place.has(e) && place.first + e - 1 < lowest;
      a[e] = read.decays[e] ? (decay != nullptr ? static_cast<double>(read.decay[e]) : rate) : starts ? 0 : 1;
    }
    scan_span<kForward, kTeam, kWrites>(d, a, course, shared);
    if constexpr (!kWrites) return;
#pragma unroll
    for (int e = 0; e < kEach; ++e)
      if (place.has(e)) out[place.first + e] = read.keeps[e] ? static_cast<T>(d[e]) : T(0);
  });
}

template <typename T, bool kForward, int kTeam>
__device__ __forceinline__ void scan_sequence(const Scan& op, int64_t s, Bounds b, Map* shared) {
  if (b.start == b.stop) return;  // without tokens, decay is null too
  for_pieces<kForward, kTeam>(b, [&](int64_t index, Course& course) {
    scan_piece<T, kForward, kTeam, true>(op, s, b, index, course, shared);
  });
}

template <typename T, bool kForward>
__global__ void __launch_bounds__(kThreads, 2) scan_kernel(Scan op, int each) {
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

// A block for each slot: the map of a piece that is not the last one computed.
template <typename T, bool kForward>
__global__ void __launch_bounds__(kThreads, 3) scan_maps_kernel(Scan op, Link* links) {
  __shared__ Map shared[kWarps];
  if (!all_valid(op.segments)) return;
  const Piece at = piece_at(op.segments, blockIdx.x, kPiece);
  if (at.index >= at.count || at.index == (kForward ? at.count - 1 : 0)) return;
  Course course{0, true, {1, 0}};
  scan_piece<T, kForward, kWarps, false>(op, at.segment, bounds(op.segments, at.segment), at.index, course, shared);
  if (threadIdx.x == 0) links[blockIdx.x].whole = course.whole;
}

// A warp for each sequence: the y that enters each piece, from the maps of those before it.
template <bool kForward>
__global__ void __launch_bounds__(kThreads) enter_kernel(Segments segments, Link* links) {
  if (!all_valid(segments)) return;
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (s >= segments.count) return;
  const int64_t pieces = pieces_of(bounds(segments, s));
  const int lane = threadIdx.x % kLanes;
  links += first_slot(segments, s, kPiece);
  double y = 0;
  for (int64_t k = lane; k - lane < pieces; k += kLanes) {
    const int64_t index = kForward ? k : pieces - 1 - k;
    const Map whole = k + 1 < pieces ? links[index].whole : Map{1, 0};
    double enter = 0;
#pragma unroll 4
    for (int l = 0; l < kLanes; ++l) {
      if (l == lane) enter = y;
      y = through(from_lane(whole, l), y);
    }
    if (k < pieces) links[index].enter = enter;
  }
}

// A block for each slot: the y of a piece. If any bounds are invalid, blocks take whole sequences.
template <typename T, bool kForward>
__global__ void __launch_bounds__(kThreads, 2) scan_pieces_kernel(Scan op, const Link* links) {
  __shared__ Map shared[kWarps];
  if (!all_valid(op.segments)) {
    const int64_t s = blockIdx.x;
    if (s >= op.segments.count) return;
    const Bounds b = bounds(op.segments, s);
    if (b.valid) scan_sequence<T, kForward, kWarps>(op, s, b, shared);
    else fill_nan(static_cast<T*>(op.out), b, threadIdx.x, kThreads);
    return;
  }
  const Piece at = piece_at(op.segments, blockIdx.x, kPiece);
  if (at.index >= at.count) return;
  Course course{links[blockIdx.x].enter, false, {1, 0}};
  scan_piece<T, kForward, kWarps, true>(op, at.segment, bounds(op.segments, at.segment), at.index, course, shared);
}

// ---- advantages ------------------------------------------------------------------------------------------------------

// wide: of float64 values.
__device__ __forceinline__ Standard standard_of(const Whitening& by, bool wide) {
  if (by.moments == nullptr) return {0, 1};
  return standard(by.moments, by.scale, by.unbiased, wide);
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
    const T old = old_logp[i], ref = ref_logp[i], given = rewards[i];
    const bool keep = op.segments.keeps(i);
    const double d = keep ? static_cast<double>(old) - static_cast<double>(ref) : 0;
    const double kl = keep ? divergence(op.estimator, d) : 0;
    double reward = keep ? static_cast<double>(given) : 0;
    if (op.kl_coef != 0) reward -= op.kl_coef * kl;
    static_cast<T*>(op.shaped)[i] = static_cast<T>(reward);
    static_cast<T*>(op.kl)[i] = static_cast<T>(kl);
  }
}

template <typename T>
struct GaeTokens {
  T reward[kEach], value[kEach];
  bool keeps[kEach];
};

// Computes piece `index` of sequence s, as scan_piece does; `next` is moved past it too.
template <typename T, int kTeam, bool kWrites>
__device__ __forceinline__ void gae_piece(const Advantages& op, int64_t s, Bounds b, int64_t index, Course& course,
                                          Ahead& next, Map* maps, Ahead* aheads) {
  const Bounds piece = piece_of(b, index);
  const T* rewards = static_cast<const T*>(op.shaped ? op.shaped : op.rewards) + piece.start;
  const T* values = static_cast<const T*>(op.values);
  const uint8_t* mask = op.segments.mask;
  T *advantages = static_cast<T*>(op.advantages) + piece.start, *returns = static_cast<T*>(op.returns) + piece.start;
  if (values != nullptr) values += piece.start;
  if (mask != nullptr) mask += piece.start;
  const double gamma = op.gamma[s * op.gamma_stride], decay = gamma * op.lam[s * op.lam_stride];
  const bool zero = op.zero, whitens = op.whiten_rewards.moments != nullptr;
  const Standard by = standard_of(op.whiten_rewards, sizeof(T) == 8);
  const auto join = [zero](Ahead later, Ahead earlier) { return after(later, earlier, zero); };
  const auto fetch = [&](Place place) {
    GaeTokens<T> read;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const bool has = place.has(e);
      read.reward[e] = has ? rewards[place.first + e] : T(0);
      read.value[e] = has && values != nullptr ? values[place.first + e] : T(0);
      read.keeps[e] = has && (mask == nullptr || mask[place.first + e] != 0);
    }
    return read;
  };
  for_spans<false, kTeam>(static_cast<int>(piece.stop - piece.start), fetch, [&](Place place, const auto& read) {
    double v[kEach], d[kEach], a[kEach];
    Ahead own{0, 0};
#pragma unroll
    for (int e = kEach - 1; e >= 0; --e) {
      v[e] = read.keeps[e] ? static_cast<double>(read.value[e]) : 0;  // select: a masked token may hold NaN
      d[e] = read.keeps[e] ? static_cast<double>(read.reward[e]) : 0;
      if (place.has(e)) own = join(Ahead{v[e], read.keeps[e] ? 2 : 1}, own);
    }
    const Ahead right = parts_before<false>(own, Ahead{0, 0}, join);
    Ahead ahead = join(right, entering<kTeam>(from_lane(own, 0), next, aheads, join));
#pragma unroll
    for (int e = kEach - 1; e >= 0; --e) {
      const bool valid = read.keeps[e];
      if (whitens) d[e] = whitened(d[e], by, op.whiten_rewards.shift);
      const double delta = fma(gamma, ahead.value, d[e] - v[e]);
      const double step = zero && ahead.state == 2 ? gamma * ahead.value : 0;  // of a masked token
      d[e] = valid ? delta : place.has(e) ? step : 0;
      a[e] = valid || (zero && place.has(e)) ? decay : 1;
      if (place.has(e)) ahead = join(Ahead{v[e], valid ? 2 : 1}, ahead);
    }
    scan_span<false, kTeam, kWrites>(d, a, course, maps);
    if constexpr (!kWrites) return;
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (!place.has(e)) continue;
      advantages[place.first + e] = read.keeps[e] ? static_cast<T>(d[e]) : T(0);
      returns[place.first + e] = read.keeps[e] ? static_cast<T>(d[e] + v[e]) : T(0);
    }
  });
}

// The state after the last token of sequence s.
__device__ __forceinline__ Ahead bootstrap_of(const Advantages& op, int64_t s) {
  return {op.bootstrap ? op.bootstrap[s] : 0, 0};
}

template <typename T, int kTeam>
__device__ __forceinline__ void gae_sequence(const Advantages& op, int64_t s, Bounds b, Map* maps, Ahead* aheads) {
  Ahead next = bootstrap_of(op, s);
  for_pieces<false, kTeam>(b, [&](int64_t index, Course& course) {
    gae_piece<T, kTeam, true>(op, s, b, index, course, next, maps, aheads);
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

// One block: the state after the tokens before `from` of sequence s, from the first kept token at or after `from`, which is
// searched kPiece tokens at a time.
template <typename T>
__device__ __forceinline__ Ahead ahead_from(const Advantages& op, int64_t s, Bounds b, int64_t from) {
  __shared__ int firsts[kWarps];
  const T* values = static_cast<const T*>(op.values);
  const Ahead last = bootstrap_of(op, s);
  for (int64_t start = from; start < b.stop; start += kPiece) {
    const int64_t stop = start + kPiece < b.stop ? start + kPiece : b.stop;
    int first = kPiece;
#pragma unroll 4
    for (int64_t i = start + threadIdx.x; i < stop; i += kThreads)
      if (op.segments.keeps(i) && i - start < first) first = static_cast<int>(i - start);
    for (int half = kLanes / 2; half > 0; half /= 2) {
      const int other = __shfl_xor_sync(kAllLanes, first, half);
      first = other < first ? other : first;
    }
    if (threadIdx.x % kLanes == 0) firsts[threadIdx.x / kLanes] = first;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) first = firsts[w] < first ? firsts[w] : first;
    __syncthreads();  // before the next tokens are searched
    if (first == kPiece) continue;
    const int64_t i = start + first;
    return after(Ahead{0, i > from ? 1 : 0}, Ahead{values != nullptr ? static_cast<double>(values[i]) : 0, 2}, op.zero);
  }
  return after(Ahead{0, from < b.stop ? 1 : 0}, last, op.zero);
}

// As scan_maps_kernel; also finds the next value that the last token of each piece needs.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gae_maps_kernel(Advantages op, Link* links) {
  __shared__ Map maps[kWarps];
  __shared__ Ahead aheads[kWarps];
  if (!all_valid(op.segments)) return;
  const Piece at = piece_at(op.segments, blockIdx.x, kPiece);
  if (at.index >= at.count) return;
  const Bounds b = bounds(op.segments, at.segment);
  Ahead next = ahead_from<T>(op, at.segment, b, piece_of(b, at.index).stop);
  if (threadIdx.x == 0) links[blockIdx.x].value = next.value, links[blockIdx.x].state = next.state;
  if (at.index == 0) return;  // it is the last one computed
  Course course{0, true, {1, 0}};
  gae_piece<T, kWarps, false>(op, at.segment, b, at.index, course, next, maps, aheads);
  if (threadIdx.x == 0) links[blockIdx.x].whole = course.whole;
}

// As scan_pieces_kernel.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) gae_pieces_kernel(Advantages op, const Link* links) {
  __shared__ Map maps[kWarps];
  __shared__ Ahead aheads[kWarps];
  if (!all_valid(op.segments)) {
    const int64_t s = blockIdx.x;
    if (s >= op.segments.count) return;
    const Bounds b = bounds(op.segments, s);
    if (b.valid) return gae_sequence<T, kWarps>(op, s, b, maps, aheads);
    fill_nan(static_cast<T*>(op.advantages), b, threadIdx.x, kThreads);
    fill_nan(static_cast<T*>(op.returns), b, threadIdx.x, kThreads);
    return;
  }
  const Piece at = piece_at(op.segments, blockIdx.x, kPiece);
  if (at.index >= at.count) return;
  const Link link = links[blockIdx.x];
  Course course{link.enter, false, {1, 0}};
  Ahead next{link.value, static_cast<int>(link.state)};
  const Bounds b = bounds(op.segments, at.segment);
  gae_piece<T, kWarps, true>(op, at.segment, b, at.index, course, next, maps, aheads);
}

// A block writes the moments of kMomentTokens tokens to parts[block]. A token counts if the mask (or, without a mask, `kept`)
// is not 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) moments_kernel(const T* x, const uint8_t* mask, const float* kept,
                                                           int64_t total, Moments* parts) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kMomentTokens;
  const int64_t stop = first + kMomentTokens < total ? first + kMomentTokens : total;
  double n = 0, one = 0, d = 0, dd = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x; i < stop; i += kThreads) {
    const double value = x[i];
    const bool counts = kept ? kept[i] != 0 : mask == nullptr || mask[i] != 0;
    if (!counts) continue;  // select: it may be NaN
    if (n == 0) one = value;
    const double away = value - one;
    n += 1, d += away, dd = fma(away, away, dd);
  }
  add_block(n == 0 ? Moments{} : moments_about(one, n, d, dd), parts + blockIdx.x);
}

// One block adds up the parts: each thread its own in order, then the threads in a tree.
__global__ void __launch_bounds__(kThreads) add_moments_kernel(const Moments* parts, int64_t count, Moments* out) {
  Moments sum{};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum = sum + parts[i];
  add_block(sum, out);
}

// Whitens, in place or into another tensor, and sets pivots by the signs; each only if its output is given.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) finish_kernel(Advantages op) {
  const T *advantages = static_cast<const T*>(op.advantages), *score = static_cast<const T*>(op.score);
  const float* kept = op.pivots_first ? static_cast<const float*>(op.token_weight) : nullptr;
  float* weight = static_cast<float*>(op.token_weight);
  const bool whitens = op.whitened != nullptr;
  const Standard by = standard_of(op.whiten_advantages, sizeof(T) == 8);
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
    const bool up = advantage >= 0 && q > baseline, down = advantage < 0 && q < baseline;  // both false for NaN
    weight[i] = valid && (up || down) ? 1.0f : 0.0f;
  }
}

}  // namespace finealign
