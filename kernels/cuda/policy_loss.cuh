// Policy losses of tokens on a GPU: rows, totals of the batch, every token once, the results. csrc/launch.h fixes the order
// of every sum and formulas.cuh the arithmetic, so the bits are a CPU's.
//
// A warp takes a chunk of the flat batch, a lane every 32nd of its tokens. No atomics; what one kernel sums the next reads.
#pragma once
#include "formulas.cuh"
#include "segments.cuh"

namespace finealign {

__device__ __forceinline__ double add_lanes(double x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x += __shfl_xor_sync(kAllLanes, x, half);
  return x;
}

// Log-probs at token i, and what psi and the estimator read of them.
template <typename T>
__device__ __forceinline__ double number(const void* x, int64_t i) {
  return load(static_cast<const T*>(x)[i]);
}

template <typename T>
__device__ __forceinline__ double log_ratio_at(const PolicyLossForward& op, int64_t i) {
  const double logp = number<T>(op.logp, i);
  return op.old_logp != nullptr ? logp - number<T>(op.old_logp, i) : no_log_ratio(logp);
}

// ---- rows and totals -----------------------------------------------------------------------------------------------

// One warp: all lanes return the sums of the first chunk of [start, stop).
template <typename T>
__device__ __forceinline__ Row chunk_row(const PolicyLossForward& op, bool log_ratios, int64_t start, int64_t stop) {
  using A = typename Wide<T>::type;
  const int64_t end = stop - start < kChunk ? stop : start + kChunk;
  Row part{0, 0, 0};
  for (int64_t i = start + threadIdx.x % kLanes; i < end; i += kLanes) {
    if (!op.segments.keeps(i)) continue;  // select, do not multiply: a masked token may hold NaN
    part.length += 1;
    if (op.kept) part.weight += number<A>(op.weight, i);
    if (log_ratios) part.log_ratio += log_ratio_at<T>(op, i);
  }
  part = {add_lanes(part.weight), add_lanes(part.length), add_lanes(part.log_ratio)};
  if (!op.kept) part.weight = part.length;
  return part;
}

__device__ __forceinline__ void append(Row& row, const Row& part) {
  row = {row.weight + part.weight, row.length + part.length, row.log_ratio + part.log_ratio};
}

// One block: all threads return the sums of a row.
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

// rows of each row; nothing is read of one with invalid bounds.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) policy_rows_kernel(PolicyLossForward op, int each) {
  const bool log_ratios = op.ratio != RatioOf::token;
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        const Row row = b.valid ? chunk_row<T>(op, log_ratios, b.start, b.stop) : Row{0, 0, 0};
        if (threadIdx.x % kLanes == 0) op.rows[s] = row;
      },
      [&](int64_t s, Bounds b) {
        const Row row = b.valid ? block_row<T>(op, log_ratios, b.start, b.stop) : Row{0, 0, 0};
        if (threadIdx.x == 0) op.rows[s] = row;
      });
}

// parts[k]: weight and length of chunk k; rows with a token and rows with invalid bounds, of rows k, k + chunks(), ...,
// 32 of them at a time. These are counted, so their order is free.
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

// One warp: all lanes return the sum of a term over all chunks.
__device__ __forceinline__ double sum_parts(const PolicyLossForward& op, int term) {
  double sum = 0;
  for (int64_t k = threadIdx.x % kLanes; k < op.chunks(); k += kLanes) sum += op.parts[k].of[term];
  return add_lanes(sum);
}

// totals, by one block. What is known from the shape was not summed.
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

// The row of a token: the last that starts at or before it. Never outside the rows, whatever cu_seqlens holds.
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

// Writes the results of token i, which the mask keeps, of row s, and adds its terms.
template <typename T>
__device__ __forceinline__ void one_token(const PolicyLossForward& op, const Divisors& by, int64_t i, int64_t s,
                                          Terms& sum) {
  using A = typename Wide<T>::type;
  const Row* row = op.sums_rows() ? op.rows + s : nullptr;
  const Shares share = shares_of(op, by, row);
  const double logp = number<T>(op.logp, i), log_ratio = log_ratio_at<T>(op, i);
  const double advantage = number<A>(op.advantage, op.advantage_by_row ? s : i);
  double weight = share.policy;
  if (op.sampler != nullptr && op.sampler_by_row) weight *= number<A>(op.sampler, s);
  if (op.weight != nullptr) weight *= number<A>(op.weight, i);
  if (op.sampler != nullptr && !op.sampler_by_row) weight *= number<A>(op.sampler, i);

  const double read = op.ratio == RatioOf::token ? log_ratio : log_ratio_of(op.ratio, *row), ratio = ratio_of(read);
  const Item psi = policy_loss_of(op.psi, read, ratio, advantage, logp, op.first, op.second, op.dual);
  Item kl{0, 0};
  if (op.ref_logp != nullptr) {
    const double own_ratio = op.ratio == RatioOf::token ? ratio : ratio_of(log_ratio);
    kl = divergence_of(op.estimator, logp - number<T>(op.ref_logp, i), log_ratio, own_ratio);
    sum.of[kKlTerm] = fma(share.kl, kl.value, sum.of[kKlTerm]);
  }
  const double push = op.kl_coef != 0 ? kl.slope : 0;
  const double slope = policy_slope_of(weight, psi.slope * stretch_of(op.ratio, row), op.kl_coef * share.kl, push);
  static_cast<A*>(op.losses)[i] = static_cast<A>(psi.value);
  static_cast<A*>(op.dlogp)[i] = static_cast<A>(slope);
  if (op.entropy != nullptr)
    sum.of[kEntropyTerm] = fma(share.entropy, number<T>(op.entropy, i), sum.of[kEntropyTerm]);
  if (op.dentropy != nullptr) static_cast<A*>(op.dentropy)[i] = static_cast<A>(-op.entropy_coef * share.entropy);

  sum.of[kPolicyTerm] = fma(weight, weight != 0 ? psi.value : 0, sum.of[kPolicyTerm]);
  sum.of[kRatio] = sum_of(sum.of[kRatio], ratio);
  sum.of[kOldKl] += -log_ratio;
  sum.of[kLow] += advantage < 0 && ratio < op.below ? 1 : 0;
  sum.of[kHigh] += advantage > 0 && ratio > op.above ? 1 : 0;
  sum.of[kDual] += advantage < 0 && ratio > op.dual ? 1 : 0;
  sum.of[kTokens] += 1;
}

// losses, dlogp, dentropy; the terms of each chunk.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) policy_tokens_kernel(PolicyLossForward op) {
  using A = typename Wide<T>::type;
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  if (k >= op.chunks()) return;
  const Divisors by = divisors_of(op, *op.totals);
  const bool walks = op.sums_rows() || op.advantage_by_row || op.sampler_by_row;
  const int64_t first = k * kChunk + threadIdx.x % kLanes;
  const int64_t stop = (k + 1) * kChunk < op.segments.total ? (k + 1) * kChunk : op.segments.total;
  int64_t s = walks && first < stop ? row_of(op.segments, first) : 0;
  Terms sum{};
  for (int64_t i = first; i < stop; i += kLanes) {
    while (walks && s + 1 < op.segments.count && op.segments.start(s + 1) <= i) ++s;
    if (op.segments.keeps(i)) one_token<T>(op, by, i, s, sum);
    else {
      static_cast<A*>(op.losses)[i] = 0, static_cast<A*>(op.dlogp)[i] = 0;
      if (op.dentropy != nullptr) static_cast<A*>(op.dentropy)[i] = 0;
    }
  }
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    const double total = add_lanes(sum.of[term]);
    if (threadIdx.x % kLanes == 0) op.parts[k].of[term] = total;
  }
}

// loss and numbers, by one block.
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

// out = upstream · d, exactly 0 where d is 0.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) policy_backward_kernel(PolicyLossBackward op) {
  using A = typename Wide<T>::type;
  const A upstream = *static_cast<const A*>(op.upstream), *d = static_cast<const A*>(op.d);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < op.total; i += step)
    store(static_cast<T*>(op.out) + i, d[i] != 0 ? d[i] * upstream : A(0));
}

}  // namespace finealign
