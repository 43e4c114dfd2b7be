// The torch-free line between bindings.cpp and the kernels: every op's CPU twin and CUDA launch is declared here.
// No torch and no CUDA header, so a .cu compiles in seconds and device code can be compiled by a host compiler.
#pragma once
#include <cstdint>
#include <functional>

#ifdef __CUDACC__
#define FINEALIGN_BOTH __host__ __device__
#else
#define FINEALIGN_BOTH
#endif

namespace finealign {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Bytes of one element.
inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Splits [0, size) among torch's threads, at least grain each.
using Range = std::function<void(int64_t begin, int64_t end)>;
using Parallel = void (*)(int64_t size, int64_t grain, const Range& range);

// ---- row statistics over a tile of logits (csrc/cpu/row_logprobs.cpp) ---------------------------------------------

// z = softcap(scale * (x + bias)) / temperature
struct Head {
  const float* bias;  // (columns,) or null
  float scale;
  float softcap;  // 0: none
  float inv_temperature;
};

constexpr int64_t kSkip = -2;  // target of a row that is not read
constexpr int64_t kBad = -1;   // target of a row whose label is out of range

enum Want : int32_t { kEntropy = 1, kSquares = 2, kMean = 4 };
constexpr int kParts = 6;  // a row's partial of one tile: m, R, T, Q, sum of z, count

struct RowForward {
  void* x;  // (rows, columns), row stride in elements; written only where e == x
  DType dtype;
  int64_t row_stride, columns, col0;
  Head head;
  int32_t want;
  const int64_t* target;  // (rows,)
  float* part;            // (rows, kParts), row stride in elements
  int64_t part_stride;
  int64_t* first;  // (rows,) column of the first maximum
  int64_t first_stride;
  float* label;  // (rows, 2) z and 1 - tanh²(y / softcap) at the label, written where it lies in this tile
  int64_t label_stride;
  void* e;        // (rows, columns) exp(z - m), or null; may be x where both are float32
  DType e_dtype;
  int64_t e_stride;
};

struct RowBackward {
  void* out;  // (rows, columns)
  DType out_dtype;
  int64_t out_stride;
  const void* src;  // x of RowForward, or its e where e_max is given; may be out
  DType dtype;
  int64_t row_stride, columns, col0;
  const int64_t* index;  // (rows,) row of src, or null
  const float* e_max;    // (rows,) m of this tile
  Head head;
  const int64_t* target;  // (rows,)
  const float* coef;      // (8, rows): dlogp, dlse, dentropy, m, log1p(R), entropy, logp, label's 1 - tanh²
  int64_t rows;
};

void row_forward(const RowForward& op, int64_t begin, int64_t end);
void row_backward(const RowBackward& op, int64_t begin, int64_t end);
const char* row_instructions();  // "avx512", "avx2" or "baseline": what run-time dispatch chose

// ---- segments (csrc/cpu/segments.cpp, csrc/cuda/segments.cu) -------------------------------------------------------

// Segment s holds the tokens [start(s), start(s + 1)) of a flat batch.
struct Segments {
  const void* cu_seqlens;  // (count + 1,) int32, or int64 where wide
  bool wide;
  int64_t count, total;  // S, N
  const uint8_t* mask;   // (total,), 0: the token is left out; or null

  FINEALIGN_BOTH int64_t start(int64_t s) const {
    return wide ? static_cast<const int64_t*>(cu_seqlens)[s] : static_cast<const int32_t*>(cu_seqlens)[s];
  }
  FINEALIGN_BOTH bool keeps(int64_t token) const { return mask == nullptr || mask[token] != 0; }
};

// What a segment and its tokens exchange; `last` is the last token that the mask keeps. For each of the three, reduce
// (tokens to segments) and spread (segments to tokens) are each other's transpose.
enum class Over : int32_t { sum = 0, mean = 1, last = 2 };

// The sum of a segment depends on its own tokens and their order alone: not on the batch around it, on threads, launch
// shapes or the device, nor on masked tokens after its end. All additions are float64, the result is rounded once. In a
// chunk of kChunk tokens counted from the segment's start, lane j adds tokens j, j + kLanes, ...; lanes are added by
// halves, chunks in order.
constexpr int kChunk = 1024;
constexpr int kLanes = 32;

struct SegmentReduce {
  Segments segments;
  Over over;
  const void* x;  // (total,)
  DType dtype;
  void* out;  // (count,) float32; float64 for float64
};

struct SegmentSpread {
  Segments segments;
  Over over;
  const void* v;  // (count,) float32; float64 for float64
  void* out;      // (total,)
  DType dtype;
};

// cu_seqlens must be valid: starts at 0, does not decrease, ends at total.
void segment_reduce_cpu(const SegmentReduce& op, Parallel parallel);
void segment_spread_cpu(const SegmentSpread& op, Parallel parallel);

// Queued on the stream; null, or why not. A segment with invalid bounds gives NaN and is not read.
const char* segment_reduce_cuda(const SegmentReduce& op, void* stream);
const char* segment_spread_cuda(const SegmentSpread& op, void* stream);

}  // namespace finealign
