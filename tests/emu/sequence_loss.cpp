// kernels/cuda/sequence_loss.cuh behind a C interface, run by cuda_host_shim.h. The ops are those of launch.h, whole.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "sequence_loss.cuh"

using namespace finealign;

namespace {

template <typename Op>
int run(void (*kernel)(Op, int), const Op& op, int64_t work, int each, int order, unsigned seed) {
  try {
    const unsigned blocks = static_cast<unsigned>((work + each - 1) / each);
    emu::launch(blocks, kThreads, static_cast<emu::Order>(order), seed, [&] { kernel(op, each); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emu: %s\n", error.what());
    return 1;
  }
  return 0;
}

Segments segments_of(const void* cu_seqlens, bool wide, int64_t count, int64_t total, const uint8_t* mask) {
  return {cu_seqlens, wide, count, total, mask, cu_seqlens == nullptr && count > 0 ? total / count : 0};
}

}  // namespace

extern "C" int emu_sequence_forward(const void* logp, const void* ref_logp, const void* ref_sum, const uint8_t* mask,
                                    const void* weight, const void* cu_seqlens, bool wide, int64_t count, int64_t total,
                                    int dtype, int average, int pairs, int form, int phi, int first, double beta,
                                    double scale, double shift, const double* shifts, double hyper,
                                    const double* hypers, const double* sign, void* losses, void* score, void* slope,
                                    void* denominator, int each, int order, unsigned seed) {
  SequenceLossForward op{};
  op.tokens = {segments_of(cu_seqlens, wide, count, total, mask), weight, static_cast<Average>(average)};
  op.logp = logp, op.ref_logp = ref_logp, op.ref_sum = ref_sum, op.dtype = static_cast<DType>(dtype);
  op.pairs = static_cast<Pairs>(pairs), op.form = static_cast<Form>(form);
  op.phi = static_cast<Phi>(phi), op.first = static_cast<Phi>(first), op.beta = beta, op.scale = scale;
  op.shift = shift, op.shifts = shifts, op.hyper = hyper, op.hypers = hypers, op.sign = sign;
  op.losses = losses, op.score = score, op.slope = slope, op.denominator = denominator;
  switch (op.dtype) {
    case DType::f32: return run(sequence_loss_forward_kernel<float>, op, op.items(), each, order, seed);
    case DType::bf16: return run(sequence_loss_forward_kernel<__nv_bfloat16>, op, op.items(), each, order, seed);
    case DType::f16: return run(sequence_loss_forward_kernel<__half>, op, op.items(), each, order, seed);
    case DType::f64: return run(sequence_loss_forward_kernel<double>, op, op.items(), each, order, seed);
  }
  return 1;
}

extern "C" int emu_sequence_backward(const void* upstream, int64_t upstream_stride, const void* slope,
                                     const void* denominator, const uint8_t* mask, const void* weight,
                                     const void* cu_seqlens, bool wide, int64_t count, int64_t total, int dtype,
                                     int pairs, void* dlogp, int each, int order, unsigned seed) {
  const TokenWeights tokens{segments_of(cu_seqlens, wide, count, total, mask), weight, Average::none};
  const SequenceLossBackward op{tokens, static_cast<Pairs>(pairs), upstream, upstream_stride, slope, denominator,
                                dlogp,  static_cast<DType>(dtype)};
  switch (op.dtype) {
    case DType::f32: return run(sequence_loss_backward_kernel<float>, op, count, each, order, seed);
    case DType::bf16: return run(sequence_loss_backward_kernel<__nv_bfloat16>, op, count, each, order, seed);
    case DType::f16: return run(sequence_loss_backward_kernel<__half>, op, count, each, order, seed);
    case DType::f64: return run(sequence_loss_backward_kernel<double>, op, count, each, order, seed);
  }
  return 1;
}
