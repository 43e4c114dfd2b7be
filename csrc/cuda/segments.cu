// Launches of kernels/cuda/segments.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "segments.cuh"

namespace finealign {
namespace {

// How many segments a block takes: one if there are few, so that each has a whole block; otherwise one for each warp.
int segments_each(int64_t count) { return count <= 2048 ? 1 : kWarps; }

template <typename Op>
const char* launch(void (*kernel)(Op, int), const Op& op, void* stream) {
  if (op.segments.count == 0) return nullptr;
  const int each = segments_each(op.segments.count);
  const int64_t blocks = (op.segments.count + each - 1) / each;
  if (blocks > INT32_MAX) return "too many segments for one launch";
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, each);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// First the chunks of a few long segments, a warp for each.
template <typename T, typename Op>
const char* tally(const Op& op, const T* x, void* stream) {
  const int64_t blocks = (slots(op.segments, kChunk) + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  segment_parts_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      op.segments, x, op.parts);
  return nullptr;
}

template <typename T>
const char* reduce(SegmentReduce op, void* stream) {
  const char* failed = nullptr;
  const T* x = op.over == Over::last ? nullptr : static_cast<const T*>(op.x);
  if (!op.tallies() || slots(op.segments, kChunk) == 0) op.parts = nullptr;
  else failed = tally(op, x, stream);
  return failed ? failed : launch(segment_reduce_kernel<T>, op, stream);
}

template <typename T>
const char* spread(const SegmentSpread& op, void* stream) {
  const int64_t blocks = slots(op.segments, kSpread);
  if (blocks == 0) return launch(segment_spread_kernel<T>, op, stream);
  const T* none = nullptr;
  if (op.tallies())
    if (const char* failed = tally(op, none, stream)) return failed;
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  segment_pieces_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* segment_reduce_cuda(const SegmentReduce& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return reduce<float>(op, stream);
    case DType::bf16: return reduce<__nv_bfloat16>(op, stream);
    case DType::f16: return reduce<__half>(op, stream);
    case DType::f64: return reduce<double>(op, stream);
  }
  return "unknown dtype";
}

const char* segment_spread_cuda(const SegmentSpread& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return spread<float>(op, stream);
    case DType::bf16: return spread<__nv_bfloat16>(op, stream);
    case DType::f16: return spread<__half>(op, stream);
    case DType::f64: return spread<double>(op, stream);
  }
  return "unknown dtype";
}

}  // namespace finealign
