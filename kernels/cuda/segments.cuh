// Segment sums, means and last tokens on a GPU, and their transposes. csrc/launch.h fixes the order of a sum.
//
// A block takes `each` consecutive segments. First each warp takes segments of one chunk alone. Then all warps take the
// longer ones together, a chunk each. If there are only a few long segments, their chunks are summed first by warps all
// over the GPU, a block adds up the chunks of a segment in order, and blocks write a piece each. The order of additions is
// that of launch.h in all cases, so the result does not depend on the launch. A lane loads several tokens before it uses the
// mask of the first. There are no atomics, and blocks of one kernel share nothing.
#pragma once
#include <cstdint>

#include "launch.h"
#include "numbers.cuh"

namespace finealign {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kLanes;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(kLanes == 32, "a lane of the sum is a lane of a warp");
constexpr int kAhead = 8;          // tokens that a lane reads before it adds the first of them
constexpr int64_t kSpread = 4096;  // tokens of a long segment that one block writes

// The bounds of segment s. valid is false if cu_seqlens does not start at 0, decreases, or does not end at total. [start, stop)
// is then the part of the batch that the segment fills with NaN; it is never outside the batch. Such parts may overlap, and
// any of the segments may write last.
struct Bounds {
  int64_t start, stop;
  bool valid;
};

__device__ __forceinline__ int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ Bounds bounds(const Segments& segments, int64_t s) {
  const int64_t start = segments.start(s), stop = segments.start(s + 1);
  const bool first = s == 0, last = s == segments.count - 1;
  const bool ends_fit = (!first || start == 0) && (!last || stop == segments.total);
  if (start >= 0 && start <= stop && stop <= segments.total && ends_fit) return {start, stop, true};
  const int64_t from = first ? 0 : clamp(start, 0, segments.total);
  return {from, last ? segments.total : clamp(stop, from, segments.total), false};
}

// ---- pieces of long segments ---------------------------------------------------------------------------------------

// A piece of a segment, counted from its start, at one of the slots of launch.h.
struct Piece {
  int64_t segment, index, count;  // index >= count: the slot is unused
};

__device__ __forceinline__ int64_t first_slot(const Segments& segments, int64_t s, int64_t size) {
  return segments.start(s) / size + s;
}

// Bounds must be valid.
__device__ __forceinline__ Piece piece_at(const Segments& segments, int64_t slot, int64_t size) {
  int64_t low = 0, high = segments.count - 1;
  while (low < high) {
    const int64_t middle = high - (high - low) / 2;
    if (first_slot(segments, middle, size) <= slot) low = middle;
    else high = middle - 1;
  }
  const int64_t tokens = segments.start(low + 1) - segments.start(low);
  return {low, slot - first_slot(segments, low, size), (tokens + size - 1) / size};
}

// One block: whether all bounds are valid. If they are not, slots must not be used.
__device__ __forceinline__ bool all_valid(const Segments& segments) {
  if (segments.cu_seqlens == nullptr) return true;
  bool valid = true;
  for (int64_t s = threadIdx.x; s < segments.count; s += kThreads) valid = valid && bounds(segments, s).valid;
  return __syncthreads_and(valid) != 0;
}

// One block: all threads call add(parts[0]), add(parts[1]), ...
template <typename Part, typename Add>
__device__ __forceinline__ void add_in_order(const Part* parts, int64_t count, Add add) {
  __shared__ Part shared[kThreads];
  for (int64_t first = 0; first < count; first += kThreads) {
    const int n = static_cast<int>(count - first < kThreads ? count - first : kThreads);
    if (threadIdx.x < n) shared[threadIdx.x] = parts[first + threadIdx.x];
    __syncthreads();
#pragma unroll 4
    for (int k = 0; k < n; ++k) add(shared[k]);
    __syncthreads();  // before the next are read
  }
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// One warp. All lanes return the tally of the first chunk of [start, stop). x may be null if no sum is needed.
template <typename T>
__device__ __forceinline__ Tally chunk_tally(const Segments& segments, const T* x, int64_t start, int64_t stop) {
  double sum = 0;
  int kept = 0, last = -1;  // last counts from start
  const int n = static_cast<int>(stop - start < kChunk ? stop - start : kChunk);
  const uint8_t* mask = segments.mask == nullptr ? nullptr : segments.mask + start;
  x = x == nullptr ? nullptr : x + start;
#pragma unroll 1
  for (int first = threadIdx.x % kLanes; first < n; first += kAhead * kLanes) {
    T values[kAhead];
    bool keeps[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int i = first + k * kLanes;
      const bool has = i < n;
      values[k] = has && x != nullptr ? x[i] : T(0.0f);
      keeps[k] = has && (mask == nullptr || mask[i] != 0);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (!keeps[k]) continue;  // select, do not multiply: a masked token may hold NaN
      sum += load(values[k]);
      ++kept;
      last = first + k * kLanes;
    }
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, half);
    kept += __shfl_xor_sync(kAllLanes, kept, half);
    const int other = __shfl_xor_sync(kAllLanes, last, half);
    last = last > other ? last : other;
  }
  return {sum, kept, last < 0 ? -1 : start + last};
}

// Adds the chunk that comes after all of a tally.
__device__ __forceinline__ void append(Tally& tally, const Tally& chunk) {
  tally.sum += chunk.sum;
  tally.kept += chunk.kept;
  if (chunk.last >= 0) tally.last = chunk.last;
}

// The tally of tokens that are all kept, without the sum: no load is needed.
__device__ __forceinline__ Tally all_kept(Bounds b) {
  return {0, b.stop - b.start, b.stop > b.start ? b.stop - 1 : -1};
}

// One block. All threads return the tally of a segment.
template <typename T>
__device__ __forceinline__ Tally block_tally(const Segments& segments, const T* x, int64_t start, int64_t stop) {
  __shared__ Tally chunks[kWarps];
  const int warp = threadIdx.x / kLanes;
  Tally tally{0, 0, -1};
  for (int64_t i = start; i < stop; i += kWarps * kChunk) {
    const int64_t mine = i + warp * kChunk;
    const Tally chunk = mine < stop ? chunk_tally(segments, x, mine, stop) : Tally{0, 0, -1};
    if (threadIdx.x % kLanes == 0) chunks[warp] = chunk;
    __syncthreads();
#pragma unroll 1  // unrolled, it would take 48 registers
    for (int w = 0; w < kWarps; ++w) append(tally, chunks[w]);
    __syncthreads();  // before the next round writes chunks
  }
  return tally;
}

// Fills parts of segments with several chunks; a warp for each slot.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) segment_parts_kernel(Segments segments, const T* x, Tally* parts) {
  if (!all_valid(segments)) return;
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  const Piece at = piece_at(segments, slot, kChunk);
  if (at.index >= at.count || at.count == 1) return;
  const int64_t start = segments.start(at.segment) + at.index * kChunk;
  const Tally part = chunk_tally(segments, x, start, segments.start(at.segment + 1));
  if (threadIdx.x % kLanes == 0) parts[slot] = part;
}

// One block. All threads return the tally of segment s, from its parts if there are parts and it has several chunks.
template <typename T>
__device__ __forceinline__ Tally block_tally(const Segments& segments, const T* x, const Tally* parts, int64_t s,
                                             Bounds b) {
  if (parts == nullptr || b.stop - b.start <= kChunk) return block_tally(segments, x, b.start, b.stop);
  Tally tally{0, 0, -1};
  add_in_order(parts + first_slot(segments, s, kChunk), (b.stop - b.start + kChunk - 1) / kChunk,
               [&](const Tally& part) { append(tally, part); });
  return tally;
}

// Calls by_warp(s, bounds) for the segments of this block with one chunk, and by_block(s, bounds) for the others.
template <typename ByWarp, typename ByBlock>
__device__ __forceinline__ void for_segments(const Segments& segments, int each, ByWarp by_warp, ByBlock by_block) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * each;
  const int64_t end = first + each < segments.count ? first + each : segments.count;
  for (int64_t s = first + threadIdx.x / kLanes; s < end; s += kWarps) {
    const Bounds b = bounds(segments, s);
    if (b.stop - b.start <= kChunk) by_warp(s, b);
  }
  for (int64_t s = first; s < end; ++s) {
    const Bounds b = bounds(segments, s);
    if (b.stop - b.start > kChunk) by_block(s, b);
  }
}

template <typename T>
__device__ __forceinline__ void finish_reduce(const SegmentReduce& op, int64_t s, bool valid, const Tally& tally) {
  using A = typename Wide<T>::type;
  A* out = static_cast<A*>(op.out) + s;
  if (!valid) *out = static_cast<A>(NAN);
  else if (op.over == Over::sum) *out = static_cast<A>(tally.sum);
  else if (op.over == Over::mean) *out = static_cast<A>(tally.sum / (tally.kept > 0 ? tally.kept : 1));
  else *out = tally.last >= 0 ? load(static_cast<const T*>(op.x)[tally.last]) : A(0);
}

// out[s] = sum, mean or last of x over the kept tokens of segment s; 0 if there are none.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) segment_reduce_kernel(SegmentReduce op, int each) {
  const T* x = op.over == Over::last ? nullptr : static_cast<const T*>(op.x);
  const bool reads = op.tallies();
  const Tally* parts = op.parts != nullptr && all_valid(op.segments) ? op.parts : nullptr;
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        const Tally tally = reads && b.valid ? chunk_tally(op.segments, x, b.start, b.stop) : all_kept(b);
        if (threadIdx.x % kLanes == 0) finish_reduce<T>(op, s, b.valid, tally);
      },
      [&](int64_t s, Bounds b) {
        const Tally tally = reads && b.valid ? block_tally(op.segments, x, parts, s, b) : all_kept(b);
        if (threadIdx.x == 0) finish_reduce<T>(op, s, b.valid, tally);
      });
}

// Thread `thread` of `threads` writes its share of the tokens [b.start, b.stop), which are segment s or a piece of it.
template <typename T>
__device__ __forceinline__ void fill(const SegmentSpread& op, int64_t s, Bounds b, const Tally& tally, int thread,
                                     int threads) {
  using A = typename Wide<T>::type;
  T* out = static_cast<T*>(op.out);
  A value = static_cast<const A*>(op.v)[s];
  if (op.over == Over::mean) value = static_cast<A>(static_cast<double>(value) / (tally.kept > 0 ? tally.kept : 1));
#pragma unroll 1
  for (int64_t first = b.start + thread; first < b.stop; first += kAhead * threads) {
    bool takes[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * threads;
      takes[k] = op.over == Over::last ? i == tally.last : i < b.stop && op.segments.keeps(i);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = first + k * threads;
      if (i < b.stop) store(out + i, !b.valid ? static_cast<A>(NAN) : takes[k] ? value : A(0));
    }
  }
}

// out[i] = v[s], or v[s] / (kept tokens of s), or v[s] only at the last kept token of s; 0 at masked tokens.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) segment_spread_kernel(SegmentSpread op, int each) {
  const T* none = nullptr;
  const bool reads = op.tallies();
  for_segments(
      op.segments, each,
      [&](int64_t s, Bounds b) {
        const Tally tally = reads && b.valid ? chunk_tally(op.segments, none, b.start, b.stop) : all_kept(b);
        fill<T>(op, s, b, tally, threadIdx.x % kLanes, kLanes);
      },
      [&](int64_t s, Bounds b) {
        const Tally tally = reads && b.valid ? block_tally(op.segments, none, b.start, b.stop) : all_kept(b);
        fill<T>(op, s, b, tally, threadIdx.x, kThreads);
      });
}

// The same with a block for each slot, for the tokens of a piece. If any bounds are invalid, blocks take whole segments.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) segment_pieces_kernel(SegmentSpread op) {
  const T* none = nullptr;
  const Segments& segments = op.segments;
  const bool valid = all_valid(segments);
  Piece at{static_cast<int64_t>(blockIdx.x), 0, 1};
  if (valid) at = piece_at(segments, at.segment, kSpread);
  if (at.index >= at.count || at.segment >= segments.count) return;
  Bounds b = bounds(segments, at.segment);
  const bool reads = op.tallies() && b.valid;
  const Tally tally = reads ? block_tally(segments, none, valid ? op.parts : nullptr, at.segment, b) : all_kept(b);
  if (valid) {
    b.start += at.index * kSpread;
    if (b.stop - b.start > kSpread) b.stop = b.start + kSpread;
  }
  fill<T>(op, at.segment, b, tally, threadIdx.x, kThreads);
}

}  // namespace finealign
