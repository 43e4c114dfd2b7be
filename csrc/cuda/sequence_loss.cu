// Launches of kernels/cuda/sequence_loss.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "sequence_loss.cuh"

namespace finealign {
namespace {

template <typename Op>
const char* launch(void (*kernel)(Op, int), const Op& op, int64_t work, void* stream) {
  if (work == 0) return nullptr;
  const int each = work <= 2048 ? 1 : kWarps;  // few: one for each block; many: one for each warp
  const int64_t blocks = (work + each - 1) / each;
  if (blocks > INT32_MAX) return "too many sequences for one launch";
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, each);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// First the chunks of a few long sequences, a warp for each.
template <typename T>
const char* forward(SequenceLossForward op, void* stream) {
  const int64_t blocks = (slots(op.tokens.segments, kChunk) + kWarps - 1) / kWarps;
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  if (blocks == 0) op.parts = nullptr;
  else sequence_parts_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  return launch(sequence_loss_forward_kernel<T>, op, op.items(), stream);
}

template <typename T>
const char* backward(const SequenceLossBackward& op, void* stream) {
  const int64_t blocks = slots(op.tokens.segments, kSpread);
  if (blocks == 0) return launch(sequence_loss_backward_kernel<T>, op, op.tokens.segments.count, stream);
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  sequence_spread_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* sequence_loss_forward_cuda(const SequenceLossForward& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return forward<float>(op, stream);
    case DType::bf16: return forward<__nv_bfloat16>(op, stream);
    case DType::f16: return forward<__half>(op, stream);
    case DType::f64: return forward<double>(op, stream);
  }
  return "unknown dtype";
}

const char* sequence_loss_backward_cuda(const SequenceLossBackward& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return backward<float>(op, stream);
    case DType::bf16: return backward<__nv_bfloat16>(op, stream);
    case DType::f16: return backward<__half>(op, stream);
    case DType::f64: return backward<double>(op, stream);
  }
  return "unknown dtype";
}

}  // namespace finealign
