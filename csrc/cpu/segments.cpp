// Segment sums, means and last tokens on a CPU, and their transposes. The bits are those of kernels/cuda/segments.cuh.

#include "segments.h"

#include <vector>

namespace finealign {
namespace {

// The sum of at most kChunk tokens; mask may be null.
template <typename T>
double chunk_sum(const T* x, const uint8_t* mask, int64_t n) {
  return sum_terms<typename Wide<T>::type>(n, [&](int64_t i, int count, auto* group) {
    for (int j = 0; j < count; ++j) group[j] = load(x[i + j]);
    if (mask != nullptr)  // select, do not multiply: a masked token may hold NaN
      for (int j = 0; j < count; ++j) group[j] = mask[i + j] ? group[j] : 0;
  });
}

// The index of the last kept token; start - 1 if there is none.
int64_t last_kept(const Segments& segments, int64_t start, int64_t stop) {
  int64_t i = stop - 1;
  while (i >= start && !segments.keeps(i)) --i;
  return i;
}

template <typename T>
std::vector<double> whole_chunk_sums(const Segments& segments, const T* x, Parallel parallel) {
  std::vector<double> sums(segments.total / kChunk);
  for_whole_chunks(segments, parallel, [&](int64_t k, int64_t first) {
    sums[k] = chunk_sum(x + first, segments.mask ? segments.mask + first : nullptr, kChunk);
  });
  return sums;
}

template <typename T>
void reduce(const SegmentReduce& op, Parallel parallel) {
  using A = typename Wide<T>::type;
  const Segments& segments = op.segments;
  const T* x = static_cast<const T*>(op.x);
  A* out = static_cast<A*>(op.out);
  if (op.over == Over::last) {
    for_segments(segments, parallel, [&](int64_t s, int64_t start, int64_t stop) {
      const int64_t last = last_kept(segments, start, stop);
      out[s] = last < start ? A(0) : load(x[last]);
    });
    return;
  }
  const std::vector<double> sums = whole_chunk_sums(segments, x, parallel);
  for_segments(segments, parallel, [&](int64_t s, int64_t start, int64_t stop) {
    double total = 0;
    int64_t token = start;
    for (; token + kChunk <= stop; token += kChunk) total += sums[token / kChunk];
    total += chunk_sum(x + token, segments.mask ? segments.mask + token : nullptr, stop - token);
    if (op.over == Over::mean) total /= std::max<int64_t>(1, kept(segments, start, stop));
    out[s] = static_cast<A>(total);
  });
}

template <typename T>
void spread(const SegmentSpread& op, Parallel parallel) {
  using A = typename Wide<T>::type;
  const Segments& segments = op.segments;
  const A* v = static_cast<const A*>(op.v);
  T* out = static_cast<T*>(op.out);
  const T zero = store<T>(A(0));
  std::vector<int64_t> found(op.over == Over::sum ? 0 : segments.count);  // number of kept tokens, or index of the last one
  if (op.over != Over::sum)
    for_segments(segments, parallel, [&](int64_t s, int64_t start, int64_t stop) {
      found[s] = op.over == Over::mean ? kept(segments, start, stop) : last_kept(segments, start, stop);
    });
  parallel(segments.total, kBlock, [&](int64_t begin, int64_t end) {
    int64_t s = begin < end ? first_from(segments, begin + 1) - 1 : segments.count;
    for (int64_t token = begin; token < end; ++s) {
      const int64_t stop = std::min(segments.start(s + 1), end);
      const A value = op.over == Over::mean ? static_cast<A>(double(v[s]) / std::max<int64_t>(1, found[s])) : v[s];
      const T stored = store<T>(value);
      if (op.over == Over::last) {
        for (; token < stop; ++token) out[token] = token == found[s] ? stored : zero;
      } else {
        for (; token < stop; ++token) out[token] = segments.keeps(token) ? stored : zero;
      }
    }
  });
}

}  // namespace

void segment_reduce_cpu(const SegmentReduce& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { reduce<decltype(type)>(op, parallel); });
}

void segment_spread_cpu(const SegmentSpread& op, Parallel parallel) {
  by_dtype(op.dtype, [&](auto type) { spread<decltype(type)>(op, parallel); });
}

}  // namespace finealign
