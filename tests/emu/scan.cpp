// kernels/cuda/scan.cuh behind a C interface, run by cuda_host_shim.h.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "scan.cuh"

using namespace finealign;

namespace {

struct How {
  int each, order;
  unsigned seed;
};

int run(unsigned blocks, How how, std::function<void()> kernel) {
  try {
    emu::launch(blocks, kThreads, static_cast<emu::Order>(how.order), how.seed, std::move(kernel));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emu: %s\n", error.what());
    return 1;
  }
  return 0;
}

unsigned blocks_of(const Segments& segments, How how) { return (segments.count + how.each - 1) / how.each; }

}  // namespace

extern "C" int emu_size(int which) {
  const size_t sizes[] = {sizeof(Segments), sizeof(Scan), sizeof(Advantages), sizeof(How)};
  return static_cast<int>(sizes[which]);
}

extern "C" int emu_scan(const Scan* op, How how) {
  const bool wide = op->dtype == DType::f64;
  const auto kernel = op->forward ? (wide ? scan_kernel<double, true> : scan_kernel<float, true>)
                                  : (wide ? scan_kernel<double, false> : scan_kernel<float, false>);
  return run(blocks_of(op->segments, how), how, [&] { kernel(*op, how.each); });
}

extern "C" int emu_gae(const Advantages* op, How how) {
  const auto kernel = op->dtype == DType::f64 ? gae_kernel<double> : gae_kernel<float>;
  return run(blocks_of(op->segments, how), how, [&] { kernel(*op, how.each); });
}

// A kernel of one token a thread, in so few blocks that each walks on.
extern "C" int emu_tokens(const Advantages* op, bool finish, How how) {
  const bool wide = op->dtype == DType::f64;
  const auto kernel = finish ? (wide ? finish_kernel<double> : finish_kernel<float>)
                             : (wide ? shape_kernel<double> : shape_kernel<float>);
  return run(3, how, [&] { kernel(*op); });
}

extern "C" int emu_moments(const Advantages* op, Moments* parts, How how) {
  const int64_t total = op->segments.total;
  const auto* mask = op->segments.mask;
  const auto* kept = op->pivots_first ? static_cast<const float*>(op->token_weight) : nullptr;
  const int failed = run(static_cast<unsigned>(moment_parts(total)), how, [&] {
    if (op->dtype == DType::f64) moments_kernel(static_cast<const double*>(op->advantages), mask, kept, total, parts);
    else moments_kernel(static_cast<const float*>(op->advantages), mask, kept, total, parts);
  });
  if (failed) return failed;
  return run(1, how, [&] {
    add_moments_kernel(parts, moment_parts(total), reinterpret_cast<Moments*>(op->advantage_moments));
  });
}
