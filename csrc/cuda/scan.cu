// Launches of kernels/cuda/scan.cuh.

#include <cuda_runtime.h>

#include "launch.h"
#include "scan.cuh"

namespace finealign {
namespace {

// How many sequences a block takes: one if there are few, so that each has a whole block; otherwise one for each warp.
int sequences_each(int64_t count) { return count <= 2048 ? 1 : kWarps; }

const char* failure() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// One kernel whose blocks take whole sequences, or three whose blocks take pieces of them.
template <bool kForward, typename Op>
const char* launch(void (*kernel)(Op, int), void (*maps)(Op, Link*), void (*pieces)(Op, const Link*), const Op& op,
                   Link* links, cudaStream_t stream) {
  if (op.segments.count == 0) return nullptr;
  const int64_t blocks_of_pieces = slots(op.segments, kPiece);
  if (blocks_of_pieces > INT32_MAX) return "too many tokens for one launch";
  if (blocks_of_pieces > 0) {
    const auto grid = static_cast<unsigned>(blocks_of_pieces);
    maps<<<grid, kThreads, 0, stream>>>(op, links);
    const auto warps = static_cast<unsigned>((op.segments.count + kWarps - 1) / kWarps);
    enter_kernel<kForward><<<warps, kThreads, 0, stream>>>(op.segments, links);
    pieces<<<grid, kThreads, 0, stream>>>(op, links);
    return failure();
  }
  const int each = sequences_each(op.segments.count);
  const int64_t blocks = (op.segments.count + each - 1) / each;
  if (blocks > INT32_MAX) return "too many sequences for one launch";
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(op, each);
  return failure();
}

// A kernel with one token for each thread; with more tokens, its blocks loop.
const char* launch_tokens(void (*kernel)(Advantages), const Advantages& op, cudaStream_t stream) {
  const int64_t blocks = (op.segments.total + kThreads - 1) / kThreads, most = 1 << 16;
  if (blocks == 0) return nullptr;
  kernel<<<static_cast<unsigned>(blocks < most ? blocks : most), kThreads, 0, stream>>>(op);
  return failure();
}

template <typename T>
const char* moments(const void* x, const Segments& segments, const float* kept, Moments* parts, double* out,
                    cudaStream_t stream) {
  const int64_t blocks = moment_parts(segments.total);
  if (blocks > INT32_MAX) return "too many tokens for one launch";
  if (blocks > 0)
    moments_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(static_cast<const T*>(x), segments.mask,
                                                                              kept, segments.total, parts);
  add_moments_kernel<<<1, kThreads, 0, stream>>>(parts, blocks, reinterpret_cast<Moments*>(out));
  return failure();
}

template <typename T>
const char* run(const Advantages& op, Moments* parts, Link* links, cudaStream_t stream) {
  const char* failed = nullptr;
  const void* shaped = op.shaped ? op.shaped : op.rewards;
  if (op.shaped) failed = launch_tokens(shape_kernel<T>, op, stream);
  if (!failed && op.reward_moments) failed = moments<T>(shaped, op.segments, nullptr, parts, op.reward_moments, stream);
  if (!failed && op.returns)
    failed = launch<false>(gae_kernel<T>, gae_maps_kernel<T>, gae_pieces_kernel<T>, op, links, stream);
  const float* kept = op.pivots_first ? static_cast<const float*>(op.token_weight) : nullptr;
  const bool pivots_before = op.pivots_first && op.score;  // the moments are those of the pivots
  if (!failed && pivots_before) failed = launch_tokens(finish_kernel<T>, op, stream);
  if (!failed && op.advantage_moments)
    failed = moments<T>(op.advantages, op.segments, kept, parts, op.advantage_moments, stream);
  if (!failed && !pivots_before && (op.whitened || op.score)) failed = launch_tokens(finish_kernel<T>, op, stream);
  return failed;
}

template <typename T, bool kForward>
const char* run(const Scan& op, Link* links, cudaStream_t stream) {
  return launch<kForward>(scan_kernel<T, kForward>, scan_maps_kernel<T, kForward>, scan_pieces_kernel<T, kForward>, op,
                          links, stream);
}

}  // namespace

const char* scan_cuda(const Scan& op, Link* links, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  if (op.dtype == DType::f64) return op.forward ? run<double, true>(op, links, on) : run<double, false>(op, links, on);
  return op.forward ? run<float, true>(op, links, on) : run<float, false>(op, links, on);
}

const char* advantages_cuda(const Advantages& op, void* parts, Link* links, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  const auto room = static_cast<Moments*>(parts);
  return op.dtype == DType::f64 ? run<double>(op, room, links, on) : run<float>(op, room, links, on);
}

}  // namespace finealign
