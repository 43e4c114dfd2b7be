// Losses of whole sequences on a GPU: tokens to scores to losses with their slopes, and back to tokens.
//
// A block takes `each` consecutive items; an item has one or two sequences. First each warp sums sequences of one chunk
// alone. Then all warps of the block sum the longer ones together. Then one thread for each item computes the loss from the
// scores. The order of additions is that of launch.h in both cases. If there are only a few long sequences, their chunks
// are summed before by warps all over the GPU, and gradients are written by blocks that take a piece each. A lane loads
// several tokens before it uses the mask of the first. There are no atomics.
#pragma once
#include "formulas.cuh"
#include "segments.cuh"

namespace finealign {

// One warp. All lanes return the sums over the first chunk of [start, stop).
template <typename T>
__device__ __forceinline__ Stretch chunk_part(const SequenceLossForward& op, int64_t start, int64_t stop) {
  using A = typename Wide<T>::type;
  const T *logp = static_cast<const T*>(op.logp) + start, *ref = static_cast<const T*>(op.ref_logp);
  const A* weight = static_cast<const A*>(op.tokens.weight);
  const uint8_t* mask = op.tokens.segments.mask;
  if (ref != nullptr) ref += start;
  if (weight != nullptr) weight += start;
  if (mask != nullptr) mask += start;
  const int n = static_cast<int>(stop - start < kChunk ? stop - start : kChunk);
  const bool counts = op.tokens.counts();
  Stretch part{0, 0};
#pragma unroll 1
  for (int first = threadIdx.x % kLanes; first < n; first += kAhead * kLanes) {
    T logps[kAhead], refs[kAhead];
    A weights[kAhead];
    bool keeps[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * kLanes;
      const bool has = i < n;
      logps[k] = has ? logp[i] : T(0.0f);
      refs[k] = has && ref != nullptr ? ref[i] : T(0.0f);
      weights[k] = has && weight != nullptr ? weight[i] : A(1);
      keeps[k] = has && (mask == nullptr || mask[i] != 0);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!keeps[k]) continue;  // select, do not multiply: a masked token may hold NaN
      A x = load(logps[k]);
      if (ref != nullptr) x -= load(refs[k]);
      const A w = weights[k];
      if (weight == nullptr) part.score += x;
      else if (w != 0) part.score = fma(static_cast<double>(w), static_cast<double>(x), part.score);
      part.weight += counts ? A(1) : w;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    part.score += __shfl_xor_sync(kAllLanes, part.score, half);
    part.weight += __shfl_xor_sync(kAllLanes, part.weight, half);
  }
  return part;
}

__device__ __forceinline__ void append(Stretch& total, const Stretch& part) {
  total.score += part.score, total.weight += part.weight;
}

// One block. All threads return the sums of a sequence.
template <typename T>
__device__ __forceinline__ Stretch block_part(const SequenceLossForward& op, int64_t start, int64_t stop) {
  __shared__ Stretch parts[kWarps];
  const int warp = threadIdx.x / kLanes;
  Stretch total{0, 0};
  for (int64_t i = start; i < stop; i += kWarps * kChunk) {
    const int64_t mine = i + warp * kChunk;
    const Stretch part = mine < stop ? chunk_part<T>(op, mine, stop) : Stretch{0, 0};
    if (threadIdx.x % kLanes == 0) parts[warp] = part;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) append(total, parts[w]);
    __syncthreads();  // before the next round writes parts
  }
  return total;
}

// Fills parts of sequences with several chunks; a warp for each slot.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sequence_parts_kernel(SequenceLossForward op) {
  const Segments& segments = op.tokens.segments;
  if (!all_valid(segments)) return;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const Piece at = piece_at(segments, slot, kChunk);
  if (at.index >= at.count || at.count == 1) return;
  const int64_t start = segments.start(at.segment) + at.index * kChunk;
  const Stretch part = chunk_part<T>(op, start, segments.start(at.segment + 1));
  if (threadIdx.x % kLanes == 0) op.parts[slot] = part;
}

// Returns the score of a sequence, not rounded, from its sums; writes the rounded results.
template <typename T>
__device__ __forceinline__ double finish_score(const SequenceLossForward& op, int64_t s, bool valid, Stretch total) {
  using A = typename Wide<T>::type;
  double score = valid ? total.score : static_cast<double>(NAN);
  if (op.ref_sum != nullptr) score -= static_cast<const A*>(op.ref_sum)[s];
  if (op.denominator != nullptr) {
    const double divisor = !valid || total.weight == 0 ? 1 : total.weight;  // no token
    static_cast<A*>(op.denominator)[s] = static_cast<A>(divisor);
    score /= divisor;
  }
  static_cast<A*>(op.score)[s] = static_cast<A>(score);
  return score;
}

template <typename T>
__device__ __forceinline__ void finish_item(const SequenceLossForward& op, int64_t i, double chosen, double rejected) {
  using A = typename Wide<T>::type;
  const bool paired = op.pairs != Pairs::none;
  const double shift = op.shifts != nullptr ? op.shifts[i] : op.shift, sign = op.sign != nullptr ? op.sign[i] : 1;
  const double hyper = op.hypers != nullptr ? op.hypers[i] : op.hyper;
  const Margins m = margins_of(op.form, paired, op.beta, shift, sign, chosen, rejected);
  Item phi{}, first{};
#pragma unroll 1  // so that the functions of the margin are compiled once
  for (int k = op.form == Form::margin ? 1 : 0; k < 2; ++k) {
    first = phi;
    phi = margin_loss(k == 0 ? op.first : op.phi, k == 0 ? m.first : m.phi, hyper);
  }
  const Outcome out = outcome_of(op.form, paired, op.beta, op.scale, sign, phi, first);
  static_cast<A*>(op.losses)[i] = static_cast<A>(out.loss);
  static_cast<A*>(op.slope)[chosen_of(op.pairs, i)] = static_cast<A>(out.chosen);
  if (paired) static_cast<A*>(op.slope)[rejected_of(op.pairs, i, op.items())] = static_cast<A>(out.rejected);
}

// Computes losses, score, slope and denominator; `each` is at most kWarps.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sequence_loss_forward_kernel(SequenceLossForward op, int each) {
  __shared__ double score[2 * kWarps];  // of chosen and rejected sequences
  const Segments& segments = op.tokens.segments;
  const bool split = op.parts != nullptr && all_valid(segments);
  const int64_t items = op.items(), first = static_cast<int64_t>(blockIdx.x) * each;
  const int n = static_cast<int>(items - first < each ? items - first : each);
  const int sequences = op.pairs == Pairs::none ? n : 2 * n;
  const auto sequence = [&](int q) {
    return q < n ? chosen_of(op.pairs, first + q) : rejected_of(op.pairs, first + q - n, items);
  };
  for (int q = threadIdx.x / kLanes; q < sequences; q += kWarps) {
    const Bounds b = bounds(segments, sequence(q));
    if (b.stop - b.start > kChunk) continue;
    const Stretch total = b.valid ? chunk_part<T>(op, b.start, b.stop) : Stretch{0, 0};
    if (threadIdx.x % kLanes == 0) score[q] = finish_score<T>(op, sequence(q), b.valid, total);
  }
  for (int q = 0; q < sequences; ++q) {
    const Bounds b = bounds(segments, sequence(q));
    if (b.stop - b.start <= kChunk) continue;
    Stretch total{0, 0};
    if (split)
      add_in_order(op.parts + first_slot(segments, sequence(q), kChunk), (b.stop - b.start + kChunk - 1) / kChunk,
                   [&](const Stretch& part) { append(total, part); });
    else if (b.valid) total = block_part<T>(op, b.start, b.stop);
    if (threadIdx.x == 0) score[q] = finish_score<T>(op, sequence(q), b.valid, total);
  }
  __syncthreads();
  if (threadIdx.x < n) finish_item<T>(op, first + threadIdx.x, score[threadIdx.x], score[threadIdx.x + n]);
}

// Thread `thread` of `threads` writes its tokens of sequence s.
template <typename T>
__device__ __forceinline__ void spread(const SequenceLossBackward& op, int64_t s, Bounds b, int thread, int threads) {
  using A = typename Wide<T>::type;
  const int64_t items = op.pairs == Pairs::none ? op.tokens.segments.count : op.tokens.segments.count / 2;
  const double upstream = static_cast<const A*>(op.upstream)[item_of(op.pairs, s, items) * op.upstream_stride];
  const double under = op.denominator != nullptr ? static_cast<const A*>(op.denominator)[s] : A(1);
  // an item that is not counted has upstream 0 and gives 0, even if its slope is NaN
  const A value = static_cast<A>(upstream == 0 ? 0 : upstream * static_cast<const A*>(op.slope)[s] / under);
  const A* weight = static_cast<const A*>(op.tokens.weight);
#pragma unroll 1
  for (int64_t first = b.start + thread; first < b.stop; first += kAhead * threads) {
    A weights[kAhead];
    bool keeps[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * threads;
      weights[k] = i < b.stop && weight != nullptr ? weight[i] : A(1);
      keeps[k] = i < b.stop && op.tokens.segments.keeps(i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * threads;
      const A each = weight != nullptr ? (weights[k] != 0 ? value : A(0)) * weights[k] : value;
      if (i < b.stop) store(static_cast<T*>(op.dlogp) + i, !b.valid ? static_cast<A>(NAN) : keeps[k] ? each : A(0));
    }
  }
}

// dlogp[i] = upstream · slope · weight / denominator of the token's sequence; 0 at masked tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) sequence_loss_backward_kernel(SequenceLossBackward op, int each) {
  for_segments(
      op.tokens.segments, each, [&](int64_t s, Bounds b) { spread<T>(op, s, b, threadIdx.x % kLanes, kLanes); },
      [&](int64_t s, Bounds b) { spread<T>(op, s, b, threadIdx.x, kThreads); });
}

// The same with a block for each slot, for the tokens of a piece. If any bounds are invalid, blocks take whole sequences.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) sequence_spread_kernel(SequenceLossBackward op) {
  const Segments& segments = op.tokens.segments;
  if (!all_valid(segments)) {
    const int64_t s = blockIdx.x;
    if (s < segments.count) spread<T>(op, s, bounds(segments, s), threadIdx.x, kThreads);
    return;
  }
  const Piece at = piece_at(segments, blockIdx.x, kSpread);
  if (at.index >= at.count) return;
  const int64_t before = at.index * kSpread, start = segments.start(at.segment) + before;
  const int64_t end = segments.start(at.segment + 1), stop = end - start < kSpread ? end : start + kSpread;
  spread<T>(op, at.segment, {start, stop, true}, threadIdx.x, kThreads);
}

}  // namespace finealign
