// Segment sums, means and last tokens on a CPU, and their transposes: kernels/cuda/segments.cuh bit for bit.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "launch.h"

namespace finealign {
namespace {

constexpr int64_t kBlock = 32 * kChunk;  // tokens that one thread takes at least

// ---- number types --------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

double load(double x) { return x; }
float load(float x) { return x; }
float load(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
float load(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // As a float's bits the magnitude is too small by 2^112; the product puts it right, subnormals included.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // inf, NaN
  return bit_cast<float>((magnitude < 0x7c00u ? finite : special) | sign);
}

// Rounds to nearest, ties to even; once for a segment, so it need not be fast.
template <typename T, typename A>
T store(A x) {
  return x;
}
template <>
bf16 store<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
f16 store<f16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  int exponent = -14;  // of the last place, 2^(exponent - 10)
  if (size >= 0x1p-14f) exponent = std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (steps + (exponent + 14) * 1024))};
}

// ---- one segment ---------------------------------------------------------------------------------------------------

// Sum of at most kChunk tokens in the order that launch.h fixes; mask may be null.
template <typename T>
double chunk_sum(const T* x, const uint8_t* mask, int64_t n) {
  int width = 1;  // lanes from n on would hold 0
  while (width < kLanes && width < n) width *= 2;
  double lane[kLanes];
  std::fill(lane, lane + width, 0.0);
  typename Wide<T>::type group[kLanes];
  const auto add = [&](int64_t i, int count) {  // three loops, each of which the compiler turns into vectors
    for (int j = 0; j < count; ++j) group[j] = load(x[i + j]);
    if (mask != nullptr)  // select, do not multiply: a masked token may hold NaN
      for (int j = 0; j < count; ++j) group[j] = mask[i + j] ? group[j] : 0;
    for (int j = 0; j < count; ++j) lane[j] += group[j];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(i, kLanes);
  add(i, static_cast<int>(n - i));
  for (int half = width / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

int64_t kept(const Segments& segments, int64_t start, int64_t stop) {
  if (segments.mask == nullptr) return stop - start;
  int64_t count = 0;
  for (int64_t i = start; i < stop; ++i) count += segments.mask[i] != 0;
  return count;
}

// Index of the last token kept, start - 1 where there is none.
int64_t last_kept(const Segments& segments, int64_t start, int64_t stop) {
  int64_t i = stop - 1;
  while (i >= start && !segments.keeps(i)) --i;
  return i;
}

// ---- all segments --------------------------------------------------------------------------------------------------

// The first segment that starts at or after a token; a token's segment is the one before first_from(token + 1).
int64_t first_from(const Segments& segments, int64_t token) {
  int64_t low = 0, high = segments.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (segments.start(middle) < token) low = middle + 1;
    else high = middle;
  }
  return low;
}

// each(s, start, stop) for every segment, shared out by the tokens at which segments start.
template <typename Each>
void for_segments(const Segments& segments, Parallel parallel, Each each) {
  const int64_t blocks = segments.total / kBlock + 1;  // the last one has the empty segments at the end
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = first_from(segments, end * kBlock);
    for (int64_t s = first_from(segments, begin * kBlock); s < stop; ++s)
      each(s, segments.start(s), segments.start(s + 1));
  });
}

// Sums of all whole chunks of all segments. A whole chunk holds the last token of exactly one window
// [k kChunk, (k + 1) kChunk), the window in which it starts: so chunk c of a segment has k = start / kChunk + c, no two
// have the same k, and long and short segments are the same work.
template <typename T>
std::vector<double> whole_chunk_sums(const Segments& segments, const T* x, Parallel parallel) {
  std::vector<double> sums(segments.total / kChunk);
  parallel(sums.size(), kBlock / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t token = (k + 1) * kChunk - 1, s = first_from(segments, token + 1) - 1;
      const int64_t first = token - (token - segments.start(s)) % kChunk;
      if (first + kChunk > segments.start(s + 1)) continue;  // the rest of a segment, no whole chunk
      sums[k] = chunk_sum(x + first, segments.mask ? segments.mask + first : nullptr, kChunk);
    }
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
  std::vector<int64_t> found(op.over == Over::sum ? 0 : segments.count);  // tokens kept, or the last one's index
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
  switch (op.dtype) {
    case DType::f32: return reduce<float>(op, parallel);
    case DType::bf16: return reduce<bf16>(op, parallel);
    case DType::f16: return reduce<f16>(op, parallel);
    case DType::f64: return reduce<double>(op, parallel);
  }
}

void segment_spread_cpu(const SegmentSpread& op, Parallel parallel) {
  switch (op.dtype) {
    case DType::f32: return spread<float>(op, parallel);
    case DType::bf16: return spread<bf16>(op, parallel);
    case DType::f16: return spread<f16>(op, parallel);
    case DType::f64: return spread<double>(op, parallel);
  }
}

}  // namespace finealign
