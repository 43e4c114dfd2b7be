// The torch-free line between bindings.cpp and the kernels: every op's CPU twin and CUDA launch is declared here.
// No torch and no CUDA header, so a .cu compiles in seconds and device code can be compiled by a host compiler.
#pragma once
#include <cstdint>

namespace finealign {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Bytes of one element.
inline int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

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
  float* zlabel;  // (rows,) written where the label lies in this tile
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
  const float* coef;      // (7, rows): dlogp, dlse, dentropy, m, log1p(R), entropy, logp
  int64_t rows;
};

void row_forward(const RowForward& op, int64_t begin, int64_t end);
void row_backward(const RowBackward& op, int64_t begin, int64_t end);
const char* row_instructions();  // "avx512", "avx2" or "baseline": what run-time dispatch chose

// ---- segments (csrc/cpu/segments.cpp, csrc/cuda/segments.cu) -------------------------------------------------------

}  // namespace finealign
