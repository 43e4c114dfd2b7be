// Policy losses of tokens on a GPU, in this order: sums of rows, totals of the batch, each token once, the results.
// csrc/launch.h fixes the order of every sum and formulas.cuh the arithmetic, so the bits are those of the CPU.
//
// A warp sums a chunk of a row. If there are only a few long rows, their chunks are summed by warps all over the GPU, and
// one block adds these sums in order. A block computes the terms of a chunk of the flat batch, 256 tokens at a time, in
// shared memory, and adds them lane by lane. A thread loads the numbers of several tokens before it uses the mask, so that
// the loads overlap. There are no atomics: the sums of one kernel are read by the next one.
#pragma once
#include "formulas.cuh"
#include "segments.cuh"

namespace finealign {

__device__ __forceinline__ double add_lanes(double x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x += __shfl_xor_sync(kAllLanes, x, half);
  return x;
}

// The log-probs of token i, and the differences that psi and the KL estimator need.
template <typename T>
__device__ __forceinline__ double number(const void* x, int64_t i) {
  return load(static_cast<const T*>(x)[i]);
}

// 0 where x is null.
template <typename T>
__device__ __forceinline__ T raw(const void* x, int64_t i) {
  return x != nullptr ? static_cast<const T*>(x)[i] : T(0.0f);
}

__device__ __forceinline__ double log_ratio_of(const PolicyLossForward& op, double logp, double old_logp) {
  return op.old_logp != nullptr ? logp - old_logp : no_log_ratio(logp);
}

// ---- rows and totals -----------------------------------------------------------------------------------------------

// One warp. All lanes return the sums over the first chunk of [start, stop).
template <typename T>
__device__ __forceinline__ Row chunk_row(const PolicyLossForward& op, bool log_ratios, int64_t start, int64_t stop) {
  using A = typename Wide<T>::type;
  const int64_t end = stop - start < kChunk ? stop : start + kChunk;
  const void *logp = log_ratios ? op.logp : nullptr, *old_logp = log_ratios ? op.old_logp : nullptr;
  const void* weight = op.kept ? op.weight : nullptr;
  Row part{0, 0, 0};
#pragma unroll 1
  for (int64_t first = start + threadIdx.x % kLanes; first < end; first += kAhead * kLanes) {
    T logps[kAhead], olds[kAhead];
    A weights[kAhead];
    bool keeps[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * kLanes;
      const bool has = i < end;
      logps[k] = raw<T>(has ? logp : nullptr, i), olds[k] = raw<T>(has ? old_logp : nullptr, i);
      weights[k] = raw<A>(has ? weight : nullptr, i);
      keeps[k] = has && op.segments.keeps(i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!keeps[k]) continue;  // select, do not multiply: a masked token may hold NaN
      part.length += 1;
      if (op.kept) part.weight += weights[k];
      if (log_ratios) part.log_ratio += log_ratio_of(op, load(logps[k]), load(olds[k]));
    }
  }
  part = {add_lanes(part.weight), add_lanes(part.length), add_lanes(part.log_ratio)};
  if (!op.kept) part.weight = part.length;
  return part;
}

__device__ __forceinline__ void append(Row& row, const Row& part) {
  row = {row.weight + part.weight, row.length + part.length, row.log_ratio + part.log_ratio};
}

// One block. All threads return the sums of a row.
template <typename T>
__device__ __forceinline__ Row block_row(const PolicyLossForward& op, bool log_ratios, int64_t start, int64_t stop) {
  __shared__ Row parts[kWarps];
  const int warp = threadIdx.x / kLanes;
  Row row{0, 0, 0};
  for (int64_t i = start; i < stop; i += kWarps * kChunk) {
    const int64_t mine = i + warp * kChunk;
    const Row part = mine < stop ? chunk_row<T>(op, log_ratios, mine, stop) : Row{0, 0, 0};
    if (threadIdx.x % kLanes == 0) parts[warp] = part;
    __syncthreads();
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) append(row, parts[w]);
    __syncthreads();  // before the next round writes parts
  }
  return row;
}

// Fills row_parts of rows with several chunks; a warp for each slot.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) policy_row_parts_kernel(PolicyLossForward op) {
  if (!all_valid(op.segments)) return;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const Piece at = piece_at(op.segments, slot, kChunk);
  if (at.index >= at.count || at.count == 1) return;
  const int64_t start = op.segments.start(at.segment) + at.index * kChunk;
  const Row part = chunk_row<T>(op, op.ratio != RatioOf::token, start, op.segments.start(at.segment + 1));
  if (threadIdx.x % kLanes == 0) op.row_parts[slot] = part;
}

// Fills rows, the sums of each row. Rows with invalid bounds are not read. split: row_parts holds the chunks of long rows.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) policy_rows_kernel(PolicyLossForward op, int each, bool split) {
  const bool log_ratios = op.ratio != RatioOf::token;
  split = split && all_valid(op.segments);
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        const Row row = b.valid ? chunk_row<T>(op, log_ratios, b.start, b.stop) : Row{0, 0, 0};
        if (threadIdx.x % kLanes == 0) op.rows[s] = row;
      },
      [&](int64_t s, Bounds b) {
        Row row{0, 0, 0};
        if (split)
          add_in_order(op.row_parts + first_slot(op.segments, s, kChunk), (b.stop - b.start + kChunk - 1) / kChunk,
                       [&](const Row& part) { append(row, part); });
        else if (b.valid) row = block_row<T>(op, log_ratios, b.start, b.stop);
        if (threadIdx.x == 0) op.rows[s] = row;
      });
}

// Fills parts[k]: weight and length of chunk k, and of the rows k, k + chunks(), ... how many have a token and how many
// have invalid bounds, 32 rows at a time. Counts are exact in any order.
enum : int { kWeightPart, kLengthPart, kRowsPart, kBadPart };

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) policy_parts_kernel(PolicyLossForward op) {
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes, chunks = op.chunks();
  if (k >= chunks) return;
  const bool counts = op.counts_rows();
  Row part{0, 0, 0};
  if (op.sums_tokens()) part = chunk_row<T>(op, false, k * kChunk, op.segments.total);
  double rows = 0, bad = 0;
  if (counts || op.segments.cu_seqlens != nullptr)
    for (int64_t s = k * kLanes + threadIdx.x % kLanes; s < op.segments.count; s += chunks * kLanes) {
      bad += bounds(op.segments, s).valid ? 0 : 1;
      rows += counts && op.rows[s].length > 0 ? 1 : 0;
    }
  rows = add_lanes(rows), bad = add_lanes(bad);
  if (threadIdx.x % kLanes != 0) return;
  double* out = op.parts[k].of;
  out[kWeightPart] = part.weight, out[kLengthPart] = part.length, out[kRowsPart] = rows, out[kBadPart] = bad;
}

// One warp. All lanes return the sum of a term over all chunks.
__device__ __forceinline__ double sum_parts(const PolicyLossForward& op, int term) {
  const int64_t chunks = op.chunks();
  double sum = 0;
#pragma unroll 8
  for (int64_t k = threadIdx.x % kLanes; k < chunks; k += kLanes) sum += op.parts[k].of[term];
  return add_lanes(sum);
}

// One block computes totals. Numbers that follow from the shape were not summed.
__global__ void __launch_bounds__(kThreads) policy_totals_kernel(PolicyLossForward op) {
  __shared__ double sums[kWarps];
  const int warp = threadIdx.x / kLanes;
  if (warp <= kBadPart) {
    const double sum = sum_parts(op, warp);
    if (threadIdx.x % kLanes == 0) sums[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const double tokens = static_cast<double>(op.segments.total), rows = static_cast<double>(op.segments.count);
  const bool summed = op.sums_tokens();
  *op.totals = {summed ? sums[kWeightPart] : tokens, summed ? sums[kLengthPart] : tokens,
                op.counts_rows() ? sums[kRowsPart] : rows, sums[kBadPart]};
}

// ---- tokens --------------------------------------------------------------------------------------------------------

// The row of a token: the last one that starts at or before it. The result is a valid row even for a wrong cu_seqlens.
__device__ __forceinline__ int64_t row_of(const Segments& segments, int64_t token) {
  if (segments.cu_seqlens == nullptr) return token / segments.width;
  int64_t low = 0, high = segments.count - 1;
  while (low < high) {
    const int64_t middle = high - (high - low) / 2;
    if (segments.start(middle) <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

// What a token adds to the sums. The two factors of a fused multiply-add are stored separately.
enum : int { kAddWeight, kAddLoss, kAddKlShare, kAddKl, kAddEntropyShare, kAddEntropy, kAddRatio, kAddLogRatio, kAddends };
constexpr int kSums = kOldKl + 1;  // terms that are summed, not counted

// The counts of a thread's tokens.
struct Counts {
  int low, high, dual, tokens;
};

// Writes the results of token i and its addends; adds to the counts if the mask keeps it.
template <typename T>
__device__ __forceinline__ void one_token(const PolicyLossForward& op, const Divisors& by, int64_t i, bool walks,
                                          double (&adds)[kAddends], Counts& count) {
  using A = typename Wide<T>::type;
  // all loads come first, before the mask is used, so that they overlap
  const T read_logp = raw<T>(op.logp, i), read_old = raw<T>(op.old_logp, i), read_ref = raw<T>(op.ref_logp, i);
  const T read_entropy = raw<T>(op.entropy, i);
  A advantage = raw<A>(op.advantage_by_row ? nullptr : op.advantage, i);
  A sampler = raw<A>(op.sampler_by_row ? nullptr : op.sampler, i);
  const A token_weight = raw<A>(op.weight, i);
  const bool keeps = op.segments.keeps(i);
  const int64_t s = walks ? row_of(op.segments, i) : 0;
  if (op.advantage_by_row) advantage = raw<A>(op.advantage, s);
  if (op.sampler_by_row) sampler = raw<A>(op.sampler, s);
#pragma unroll
  for (int k = 0; k < kAddends; ++k) adds[k] = 0;
  if (!keeps) {  // select, do not multiply: it may hold NaN
    static_cast<A*>(op.losses)[i] = 0, static_cast<A*>(op.dlogp)[i] = 0;
    if (op.dentropy != nullptr) static_cast<A*>(op.dentropy)[i] = 0;
    return;
  }
  const Row* row = op.sums_rows() ? op.rows + s : nullptr;
  const Shares share = shares_of(op, by, row);
  const double logp = load(read_logp), log_ratio = log_ratio_of(op, logp, load(read_old));
  double weight = share.policy;
  if (op.sampler != nullptr && op.sampler_by_row) weight *= sampler;
  if (op.weight != nullptr) weight *= token_weight;
  if (op.sampler != nullptr && !op.sampler_by_row) weight *= sampler;

  const double read = op.ratio == RatioOf::token ? log_ratio : log_ratio_of(op.ratio, *row), ratio = ratio_of(read);
  const Item psi = policy_loss_of(op.psi, read, ratio, advantage, logp, op.first, op.second, op.dual);
  Item kl{0, 0};
  if (op.ref_logp != nullptr) {
    const double own_ratio = op.ratio == RatioOf::token ? ratio : ratio_of(log_ratio);
    kl = divergence_of(op.estimator, logp - load(read_ref), log_ratio, own_ratio);
    adds[kAddKlShare] = share.kl, adds[kAddKl] = kl.value;
  }
  const double push = op.kl_coef != 0 ? kl.slope : 0;
  const double slope = policy_slope_of(weight, psi.slope * stretch_of(op.ratio, row), op.kl_coef * share.kl, push);
  static_cast<A*>(op.losses)[i] = static_cast<A>(psi.value);
  static_cast<A*>(op.dlogp)[i] = static_cast<A>(slope);
  if (op.entropy != nullptr) adds[kAddEntropyShare] = share.entropy, adds[kAddEntropy] = load(read_entropy);
  if (op.dentropy != nullptr) static_cast<A*>(op.dentropy)[i] = static_cast<A>(-op.entropy_coef * share.entropy);

  adds[kAddWeight] = weight, adds[kAddLoss] = weight != 0 ? psi.value : 0;
  adds[kAddRatio] = ratio, adds[kAddLogRatio] = log_ratio;
  count.low += advantage < 0 && ratio < op.below ? 1 : 0;
  count.high += advantage > 0 && ratio > op.above ? 1 : 0;
  count.dual += advantage < 0 && ratio > op.dual ? 1 : 0;
  count.tokens += 1;
}

// Computes losses, dlogp, dentropy and the terms of each chunk. A block takes a chunk, 256 tokens at a time: each thread
// computes the addends of one token, then warp w adds up term w in the order of launch.h, lane j the tokens j, j + kLanes,
// .... Zeros do not change a sum.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) policy_tokens_kernel(PolicyLossForward op) {
  __shared__ double shared[kAddends][kThreads];
  __shared__ Counts counts[kWarps];
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const Divisors by = divisors_of(op, *op.totals);
  const bool walks = op.sums_rows() || op.advantage_by_row || op.sampler_by_row;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kChunk;
  double sum = 0;
  Counts count{0, 0, 0, 0};
#pragma unroll 1
  for (int64_t start = first; start < first + kChunk; start += kThreads) {
    const int64_t i = start + threadIdx.x;
    double adds[kAddends] = {};
    if (i < op.segments.total) one_token<T>(op, by, i, walks, adds, count);
#pragma unroll
    for (int k = 0; k < kAddends; ++k) shared[k][threadIdx.x] = adds[k];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kWarps; ++k) {
      const int j = k * kLanes + lane;
      if (warp == kPolicyTerm) sum = fma(shared[kAddWeight][j], shared[kAddLoss][j], sum);
      else if (warp == kKlTerm) sum = fma(shared[kAddKlShare][j], shared[kAddKl][j], sum);
      else if (warp == kEntropyTerm) sum = fma(shared[kAddEntropyShare][j], shared[kAddEntropy][j], sum);
      else if (warp == kRatio) sum = sum_of(sum, shared[kAddRatio][j]);
      else if (warp == kOldKl) sum += -shared[kAddLogRatio][j];
    }
    __syncthreads();  // before the next round writes
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    count.low += __shfl_xor_sync(kAllLanes, count.low, half), count.high += __shfl_xor_sync(kAllLanes, count.high, half);
    count.dual += __shfl_xor_sync(kAllLanes, count.dual, half);
    count.tokens += __shfl_xor_sync(kAllLanes, count.tokens, half);
  }
  const double total = add_lanes(sum);
  double* out = op.parts[blockIdx.x].of;
  if (lane == 0 && warp < kSums) out[warp] = total;
  if (lane == 0) counts[warp] = count;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w)
    count = {count.low + counts[w].low, count.high + counts[w].high, count.dual + counts[w].dual,
             count.tokens + counts[w].tokens};
  out[kLow] = count.low, out[kHigh] = count.high, out[kDual] = count.dual, out[kTokens] = count.tokens;
}

// One block computes the loss and numbers.
template <typename A>
__global__ void __launch_bounds__(kThreads) policy_results_kernel(PolicyLossForward op) {
  __shared__ Terms total;
  for (int term = threadIdx.x / kLanes; term < kTerms; term += kWarps) {
    const double sum = sum_parts(op, term);
    if (threadIdx.x % kLanes == 0) total.of[term] = sum;
  }
  __syncthreads();
  const int term = threadIdx.x;
  if (term < kTokens) static_cast<A*>(op.numbers)[term] = static_cast<A>(number_of(total, term));
  if (term == 0) *static_cast<A*>(op.loss) = static_cast<A>(op.totals->bad != 0 ? NAN : loss_of(op, total));
}

// out = upstream · d; exactly 0 where d is 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) policy_backward_kernel(PolicyLossBackward op) {
  using A = typename Wide<T>::type;
  const A upstream = *static_cast<const A*>(op.upstream), *d = static_cast<const A*>(op.d);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < op.total; i += step)
    store(static_cast<T*>(op.out) + i, d[i] != 0 ? d[i] * upstream : A(0));
}

}  // namespace finealign
