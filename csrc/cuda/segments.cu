// Launches of kernels/cuda/segments.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "segments.cuh"

namespace finealign {
namespace {

// Segments a block takes: one where there are few, so that each has a whole block; as many as warps where many.
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

}  // namespace

const char* segment_reduce_cuda(const SegmentReduce& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return launch(segment_reduce_kernel<float>, op, stream);
    case DType::bf16: return launch(segment_reduce_kernel<__nv_bfloat16>, op, stream);
    case DType::f16: return launch(segment_reduce_kernel<__half>, op, stream);
    case DType::f64: return launch(segment_reduce_kernel<double>, op, stream);
  }
  return "unknown dtype";
}

const char* segment_spread_cuda(const SegmentSpread& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return launch(segment_spread_kernel<float>, op, stream);
    case DType::bf16: return launch(segment_spread_kernel<__nv_bfloat16>, op, stream);
    case DType::f16: return launch(segment_spread_kernel<__half>, op, stream);
    case DType::f64: return launch(segment_spread_kernel<double>, op, stream);
  }
  return "unknown dtype";
}

}  // namespace finealign
