// Launches of kernels/cuda/policy_loss.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "policy_loss.cuh"

namespace finealign {
namespace {

const char* failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
const char* forward(const PolicyLossForward& op, cudaStream_t stream) {
  const int64_t count = op.segments.count;
  const int each = count <= 2048 ? 1 : kWarps;  // few rows: one for each block; many: one for each warp
  const int64_t by_rows = (count + each - 1) / each, by_slots = (slots(op.segments, kChunk) + kWarps - 1) / kWarps;
  if (by_rows > INT32_MAX || op.chunks() > INT32_MAX) return "too many tokens for one launch";
  const auto rows = static_cast<unsigned>(by_rows), chunks = static_cast<unsigned>(op.chunks());
  const auto warps = (chunks + kWarps - 1) / kWarps, long_ones = static_cast<unsigned>(by_slots);
  if (op.sums_rows() && long_ones > 0) policy_row_parts_kernel<T><<<long_ones, kThreads, 0, stream>>>(op);
  if (op.sums_rows() && rows > 0) policy_rows_kernel<T><<<rows, kThreads, 0, stream>>>(op, each, long_ones > 0);
  if (chunks > 0) policy_parts_kernel<T><<<warps, kThreads, 0, stream>>>(op);
  policy_totals_kernel<<<1, kThreads, 0, stream>>>(op);
  if (chunks > 0) policy_tokens_kernel<T><<<chunks, kThreads, 0, stream>>>(op);
  policy_results_kernel<typename Wide<T>::type><<<1, kThreads, 0, stream>>>(op);
  return failure();
}

template <typename T>
const char* backward(const PolicyLossBackward& op, cudaStream_t stream) {
  const int64_t blocks = (op.total + kThreads - 1) / kThreads, most = 1 << 16;  // with more tokens, blocks loop
  if (blocks == 0) return nullptr;
  policy_backward_kernel<T><<<static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, stream>>>(op);
  return failure();
}

}  // namespace

const char* policy_loss_forward_cuda(const PolicyLossForward& op, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case DType::f32: return forward<float>(op, on);
    case DType::bf16: return forward<__nv_bfloat16>(op, on);
    case DType::f16: return forward<__half>(op, on);
    case DType::f64: return forward<double>(op, on);
  }
  return "unknown dtype";
}

const char* policy_loss_backward_cuda(const PolicyLossBackward& op, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (op.dtype) {
    case DType::f32: return backward<float>(op, on);
    case DType::bf16: return backward<__nv_bfloat16>(op, on);
    case DType::f16: return backward<__half>(op, on);
    case DType::f64: return backward<double>(op, on);
  }
  return "unknown dtype";
}

}  // namespace finealign
