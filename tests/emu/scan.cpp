// kernels/cuda/scan.cuh behind a C interface, run by cuda_host_shim.h.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "scan.cuh"

using namespace finealign;

namespace {

struct How {
  int each, order;  // each 0: a block takes a piece of a sequence
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

// The launches of csrc/cuda/scan.cu, in room full of NaN.
template <bool kForward, typename Op>
int run(void (*kernel)(Op, int), void (*maps)(Op, Link*), void (*pieces)(Op, const Link*), const Op& op, How how) {
  const Segments& segments = op.segments;
  if (how.each > 0)
    return run((segments.count + how.each - 1) / how.each, how, [&] { kernel(op, how.each); });
  std::vector<Link> links(segments.total / kPiece + segments.count, Link{{NAN, NAN}, NAN, NAN, 77});
  const unsigned slots = links.size();
  const int failed = run(slots, how, [&] { maps(op, links.data()); }) ||
                     run((segments.count + kWarps - 1) / kWarps, how, [&] { enter_kernel<kForward>(segments, links.data()); });
  return failed || run(slots, how, [&] { pieces(op, links.data()); });
}

template <typename T, bool kForward>
int run(const Scan& op, How how) {
  return run<kForward>(scan_kernel<T, kForward>, scan_maps_kernel<T, kForward>, scan_pieces_kernel<T, kForward>, op, how);
}
template <typename T>
int run(const Advantages& op, How how) {
  return run<false>(gae_kernel<T>, gae_maps_kernel<T>, gae_pieces_kernel<T>, op, how);
}

}  // namespace

extern "C" int emu_size(int which) {
  const size_t sizes[] = {sizeof(Segments), sizeof(Scan), sizeof(Advantages), sizeof(How)};
  return static_cast<int>(sizes[which]);
}

extern "C" int emu_scan(const Scan* op, How how) {
  if (op->dtype == DType::f64) return op->forward ? run<double, true>(*op, how) : run<double, false>(*op, how);
  return op->forward ? run<float, true>(*op, how) : run<float, false>(*op, how);
}

extern "C" int emu_gae(const Advantages* op, How how) {
  return op->dtype == DType::f64 ? run<double>(*op, how) : run<float>(*op, how);
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
