// kernels/cuda/sequence_loss.cuh behind a C interface, run by cuda_host_shim.h. The ops are those of launch.h, whole.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "sequence_loss.cuh"

using namespace finealign;

namespace {

int run(int64_t blocks, int order, unsigned seed, std::function<void()> kernel) {
  try {
    emu::launch(static_cast<unsigned>(blocks), kThreads, static_cast<emu::Order>(order), seed, std::move(kernel));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emu: %s\n", error.what());
    return 1;
  }
  return 0;
}

int64_t slots_of(const Segments& segments, int64_t size) { return segments.total / size + segments.count; }

// The launches of csrc/cuda/sequence_loss.cu; each 0: pieces of sequences.
template <typename T>
int forward(SequenceLossForward op, int each, int order, unsigned seed) {
  const int64_t slots = slots_of(op.tokens.segments, kChunk);
  std::vector<Stretch> parts(slots, Stretch{NAN, NAN});
  if (each == 0) {
    each = 1, op.parts = parts.data();
    if (run((slots + kWarps - 1) / kWarps, order, seed, [&] { sequence_parts_kernel<T>(op); })) return 1;
  }
  return run((op.items() + each - 1) / each, order, seed, [&] { sequence_loss_forward_kernel<T>(op, each); });
}

template <typename T>
int backward(const SequenceLossBackward& op, int each, int order, unsigned seed) {
  const Segments& segments = op.tokens.segments;
  if (each == 0) return run(slots_of(segments, kSpread), order, seed, [&] { sequence_spread_kernel<T>(op); });
  return run((segments.count + each - 1) / each, order, seed, [&] { sequence_loss_backward_kernel<T>(op, each); });
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
    case DType::f32: return forward<float>(op, each, order, seed);
    case DType::bf16: return forward<__nv_bfloat16>(op, each, order, seed);
    case DType::f16: return forward<__half>(op, each, order, seed);
    case DType::f64: return forward<double>(op, each, order, seed);
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
    case DType::f32: return backward<float>(op, each, order, seed);
    case DType::bf16: return backward<__nv_bfloat16>(op, each, order, seed);
    case DType::f16: return backward<__half>(op, each, order, seed);
    case DType::f64: return backward<double>(op, each, order, seed);
  }
  return 1;
}
