// Launches of kernels/cuda/sequence_loss.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "sequence_loss.cuh"

namespace finealign {
namespace {

template <typename Op>
const char* launch(void (*kernel)(Op, int), const Op& op, int64_t work, void* stream) {
  if (work == 0) return nullptr;
  const int each = work <= 2048 ? 1 : kWarps;  // few: a whole block for each; many: as many as warps
  const int64_t blocks = (work + each - 1) / each;
  if (blocks > INT32_MAX) return "too many sequences for one launch";
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(op, each);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* sequence_loss_forward_cuda(const SequenceLossForward& op, void* stream) {
  switch (op.dtype) {
    case DType::f32: return launch(sequence_loss_forward_kernel<float>, op, op.items(), stream);
    case DType::bf16: return launch(sequence_loss_forward_kernel<__nv_bfloat16>, op, op.items(), stream);
    case DType::f16: return launch(sequence_loss_forward_kernel<__half>, op, op.items(), stream);
    case DType::f64: return launch(sequence_loss_forward_kernel<double>, op, op.items(), stream);
  }
  return "unknown dtype";
}

const char* sequence_loss_backward_cuda(const SequenceLossBackward& op, void* stream) {
  const int64_t count = op.tokens.segments.count;
  switch (op.dtype) {
    case DType::f32: return launch(sequence_loss_backward_kernel<float>, op, count, stream);
    case DType::bf16: return launch(sequence_loss_backward_kernel<__nv_bfloat16>, op, count, stream);
    case DType::f16: return launch(sequence_loss_backward_kernel<__half>, op, count, stream);
    case DType::f64: return launch(sequence_loss_backward_kernel<double>, op, count, stream);
  }
  return "unknown dtype";
}

}  // namespace finealign
