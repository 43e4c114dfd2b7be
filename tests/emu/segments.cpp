// kernels/cuda/segments.cuh behind a C interface, run by cuda_host_shim.h.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "segments.cuh"

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

// The launches of csrc/cuda/segments.cu; each 0: pieces of segments.
template <typename T, typename Op>
int tally(const Op& op, const T* x, int order, unsigned seed) {
  const int64_t blocks = (slots_of(op.segments, kChunk) + kWarps - 1) / kWarps;
  return run(blocks, order, seed, [&] { segment_parts_kernel(op.segments, x, op.parts); });
}

template <typename T>
int reduce(SegmentReduce op, int each, int order, unsigned seed) {
  std::vector<Tally> parts(slots_of(op.segments, kChunk), Tally{NAN, -99, 1 << 20});
  if (each == 0 && op.tallies()) {
    op.parts = parts.data();
    if (tally(op, op.over == Over::last ? nullptr : static_cast<const T*>(op.x), order, seed)) return 1;
  }
  each = each == 0 ? 1 : each;
  return run((op.segments.count + each - 1) / each, order, seed, [&] { segment_reduce_kernel<T>(op, each); });
}

template <typename T>
int spread(SegmentSpread op, int each, int order, unsigned seed) {
  if (each > 0)
    return run((op.segments.count + each - 1) / each, order, seed, [&] { segment_spread_kernel<T>(op, each); });
  std::vector<Tally> parts(slots_of(op.segments, kChunk), Tally{NAN, -99, 1 << 20});
  op.parts = parts.data();
  const T* none = nullptr;
  if (op.tallies() && tally(op, none, order, seed)) return 1;
  return run(slots_of(op.segments, kSpread), order, seed, [&] { segment_pieces_kernel<T>(op); });
}

}  // namespace

extern "C" int emu_segment_reduce(const void* x, int dtype, const uint8_t* mask, const void* cu_seqlens, bool wide,
                                  int64_t count, int64_t total, int over, void* out, int each, int order,
                                  unsigned seed) {
  const Segments segments{cu_seqlens, wide, count, total, mask};
  const SegmentReduce op{segments, static_cast<Over>(over), x, static_cast<DType>(dtype), out, nullptr};
  switch (op.dtype) {
    case DType::f32: return reduce<float>(op, each, order, seed);
    case DType::bf16: return reduce<__nv_bfloat16>(op, each, order, seed);
    case DType::f16: return reduce<__half>(op, each, order, seed);
    case DType::f64: return reduce<double>(op, each, order, seed);
  }
  return 1;
}

extern "C" int emu_segment_spread(const void* v, int dtype, const uint8_t* mask, const void* cu_seqlens, bool wide,
                                  int64_t count, int64_t total, int over, void* out, int each, int order,
                                  unsigned seed) {
  const Segments segments{cu_seqlens, wide, count, total, mask};
  const SegmentSpread op{segments, static_cast<Over>(over), v, out, static_cast<DType>(dtype), nullptr};
  switch (op.dtype) {
    case DType::f32: return spread<float>(op, each, order, seed);
    case DType::bf16: return spread<__nv_bfloat16>(op, each, order, seed);
    case DType::f16: return spread<__half>(op, each, order, seed);
    case DType::f64: return spread<double>(op, each, order, seed);
  }
  return 1;
}
