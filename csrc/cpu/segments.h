// Shared by the CPU kernels over segments: number types, the order in which a segment is added up, and how the work is split.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "launch.h"

// A function with this attribute is compiled for wide vectors too, and the version for the processor is chosen at load time.
// It must not contain a product that is added to something: one version would round it twice and the other once.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FINEALIGN_WIDE __attribute__((target_clones("default", "arch=x86-64-v3")))
#else
#define FINEALIGN_WIDE
#endif
#define FINEALIGN_INLINE inline __attribute__((always_inline))  // compiled with its caller, for the caller's vectors

namespace finealign {
namespace {

constexpr int64_t kBlock = 32 * kChunk;  // smallest number of tokens for one thread

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

inline double load(double x) { return x; }
inline float load(float x) { return x; }
inline float load(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float load(f16 x) {
  const uint32_t magnitude = x.bits & 0x7fffu, sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  // The magnitude read as the bits of a float is too small by a factor 2^112; the product corrects it, also for subnormals.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // inf, NaN
  return bit_cast<float>((magnitude < 0x7c00u ? finite : special) | sign);
}

// Rounds to nearest, ties to even. It is called once for each segment, so it need not be fast.
template <typename T, typename A>
T store(A x) {
  return x;
}
template <>
inline bf16 store<bf16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x) return {static_cast<uint16_t>((u >> 16) | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
template <>
inline f16 store<f16>(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (size >= 65520.f) return {static_cast<uint16_t>(sign | 0x7c00)};  // rounds to infinity
  int exponent = -14;  // the last digit is worth 2^(exponent - 10)
  if (size >= 0x1p-14f) exponent = std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (steps + (exponent + 14) * 1024))};
}

// Calls f(T()) with the C++ type of a dtype.
template <typename F>
void by_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::f32: return f(float());
    case DType::bf16: return f(bf16());
    case DType::f16: return f(f16());
    case DType::f64: return f(double());
  }
}

// ---- one segment ---------------------------------------------------------------------------------------------------

// The sum of at most kChunk terms in the order of launch.h. terms(i, count, group) writes terms i .. i + count - 1 into
// a group of A.
template <typename A, typename Terms>
FINEALIGN_INLINE double sum_terms(int64_t n, Terms terms) {
  int width = 1;  // lanes from n on are 0
  while (width < kLanes && width < n) width *= 2;
  double lane[kLanes];
  std::fill(lane, lane + width, 0.0);
  A group[kLanes];
  const auto add = [&](int64_t i, int count) __attribute__((always_inline)) {  // loops that the compiler vectorises
    terms(i, count, group);
    for (int j = 0; j < count; ++j) lane[j] += group[j];
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(i, kLanes);
  add(i, static_cast<int>(n - i));
  for (int half = width / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

inline int64_t kept(const Segments& segments, int64_t start, int64_t stop) {
  if (segments.mask == nullptr) return stop - start;
  int64_t count = 0;
  for (int64_t i = start; i < stop; ++i) count += segments.mask[i] != 0;
  return count;
}

// ---- all segments --------------------------------------------------------------------------------------------------

// The first segment that starts at or after a token; a token's segment is the one before first_from(token + 1).
inline int64_t first_from(const Segments& segments, int64_t token) {
  int64_t low = 0, high = segments.count;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (segments.start(middle) < token) low = middle + 1;
    else high = middle;
  }
  return low;
}

// The segment of a token.
inline int64_t segment_of(const Segments& segments, int64_t token) {
  return segments.cu_seqlens == nullptr ? token / segments.width : first_from(segments, token + 1) - 1;
}

// Calls each(s, start, stop) for every segment. The work is split by the tokens at which segments start.
template <typename Each>
void for_segments(const Segments& segments, Parallel parallel, Each each) {
  const int64_t blocks = segments.total / kBlock + 1;  // the last one has the empty segments at the end
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = first_from(segments, end * kBlock);
    for (int64_t s = first_from(segments, begin * kBlock); s < stop; ++s)
      each(s, segments.start(s), segments.start(s + 1));
  });
}

// Calls each(k, first) for all whole chunks of all segments, where `first` is the chunk's first token. A whole chunk holds
// the last token of exactly one window [k kChunk, (k + 1) kChunk), the window in which it starts. So chunk c of a segment has
// k = start / kChunk + c, no two have the same k < total / kChunk, and long and short segments are split the same way.
template <typename Each>
void for_whole_chunks(const Segments& segments, Parallel parallel, Each each) {
  parallel(segments.total / kChunk, kBlock / kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t token = (k + 1) * kChunk - 1, s = segment_of(segments, token);
      const int64_t first = token - (token - segments.start(s)) % kChunk;
      if (first + kChunk <= segments.start(s + 1)) each(k, first);  // otherwise it is the rest of a segment
    }
  });
}

}  // namespace
}  // namespace finealign
