// kernels/cuda/segments.cuh behind a C interface, run by cuda_host_shim.h.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "segments.cuh"

using namespace finealign;

namespace {

template <typename Op>
int run(void (*kernel)(Op, int), const Op& op, int each, int order, unsigned seed) {
  try {
    const unsigned blocks = (op.segments.count + each - 1) / each;
    emu::launch(blocks, kThreads, static_cast<emu::Order>(order), seed, [&] { kernel(op, each); });
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emu: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" int emu_segment_reduce(const void* x, int dtype, const uint8_t* mask, const void* cu_seqlens, bool wide,
                                  int64_t count, int64_t total, int over, void* out, int each, int order,
                                  unsigned seed) {
  const Segments segments{cu_seqlens, wide, count, total, mask};
  const SegmentReduce op{segments, static_cast<Over>(over), x, static_cast<DType>(dtype), out};
  switch (op.dtype) {
    case DType::f32: return run(segment_reduce_kernel<float>, op, each, order, seed);
    case DType::bf16: return run(segment_reduce_kernel<__nv_bfloat16>, op, each, order, seed);
    case DType::f16: return run(segment_reduce_kernel<__half>, op, each, order, seed);
    case DType::f64: return run(segment_reduce_kernel<double>, op, each, order, seed);
  }
  return 1;
}

extern "C" int emu_segment_spread(const void* v, int dtype, const uint8_t* mask, const void* cu_seqlens, bool wide,
                                  int64_t count, int64_t total, int over, void* out, int each, int order,
                                  unsigned seed) {
  const Segments segments{cu_seqlens, wide, count, total, mask};
  const SegmentSpread op{segments, static_cast<Over>(over), v, out, static_cast<DType>(dtype)};
  switch (op.dtype) {
    case DType::f32: return run(segment_spread_kernel<float>, op, each, order, seed);
    case DType::bf16: return run(segment_spread_kernel<__nv_bfloat16>, op, each, order, seed);
    case DType::f16: return run(segment_spread_kernel<__half>, op, each, order, seed);
    case DType::f64: return run(segment_spread_kernel<double>, op, each, order, seed);
  }
  return 1;
}
