// kernels/cuda/policy_loss.cuh behind a C interface, run by cuda_host_shim.h: the launches of csrc/cuda/policy_loss.cu, one
// after the other.
#include <cuda_host_shim.h>  // first, so that it can come precompiled

#include <cstdio>

#include "policy_loss.cuh"

using namespace finealign;

namespace {

struct Launcher {
  emu::Order order;
  unsigned seed;

  template <typename Kernel>
  void operator()(int64_t blocks, Kernel kernel) const {
    if (blocks > 0) emu::launch(static_cast<unsigned>(blocks), kThreads, order, seed, kernel);
  }
};

template <typename T>
void forward(const PolicyLossForward& op, int64_t each, const Launcher& launch) {
  const bool split = each == 0;  // chunks of long rows apart
  if (split) each = 1;
  const int64_t slots = op.segments.total / kChunk + op.segments.count;
  if (op.sums_rows() && split) launch((slots + kWarps - 1) / kWarps, [&] { policy_row_parts_kernel<T>(op); });
  if (op.sums_rows())
    launch((op.segments.count + each - 1) / each, [&] { policy_rows_kernel<T>(op, static_cast<int>(each), split); });
  launch((op.chunks() + kWarps - 1) / kWarps, [&] { policy_parts_kernel<T>(op); });
  launch(1, [&] { policy_totals_kernel(op); });
  launch(op.chunks(), [&] { policy_tokens_kernel<T>(op); });
  launch(1, [&] { policy_results_kernel<typename Wide<T>::type>(op); });
}

template <typename F>
int run(DType dtype, F f) {
  try {
    if (dtype == DType::f32) f(float());
    if (dtype == DType::bf16) f(__nv_bfloat16());
    if (dtype == DType::f16) f(__half());
    if (dtype == DType::f64) f(double());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emu: %s\n", error.what());
    return 1;
  }
  return 0;
}

}  // namespace

// tensors, integers and numbers in the order of launch.h.
extern "C" int emu_policy_forward(void** at, const int64_t* n, const double* x, int64_t each, int order, unsigned seed) {
  PolicyLossForward op{};
  op.segments = {at[0], n[0] != 0, n[1], n[2], static_cast<const uint8_t*>(at[1]), n[3]};
  op.logp = at[2], op.old_logp = at[3], op.ref_logp = at[4], op.entropy = at[5];
  op.advantage = at[6], op.weight = at[7], op.sampler = at[8];
  op.dtype = static_cast<DType>(n[4]), op.advantage_by_row = n[5] != 0, op.sampler_by_row = n[6] != 0;
  op.psi = static_cast<Psi>(n[7]), op.ratio = static_cast<RatioOf>(n[8]);
  op.first = x[0], op.second = x[1], op.dual = x[2], op.below = x[3], op.above = x[4];
  op.estimator = static_cast<Estimator>(n[9]), op.kl_coef = x[5], op.entropy_coef = x[6];
  op.share = static_cast<ShareOf>(n[10]), op.kept = n[11] != 0, op.count_empty = n[12] != 0;
  const auto number = [&](int i) { return static_cast<const double*>(at[i]); };
  op.denominator = {x[7], number(9)}, op.max_length = {x[8], number(10)};
  op.entropy_by_token = n[13] != 0, op.entropy_denominator = {x[9], number(11)};
  op.loss = at[12], op.numbers = at[13], op.losses = at[14], op.dlogp = at[15], op.dentropy = at[16];
  op.rows = static_cast<Row*>(at[17]), op.parts = static_cast<Terms*>(at[18]);
  op.totals = static_cast<Totals*>(at[19]), op.row_parts = static_cast<Row*>(at[20]);
  const Launcher launch{static_cast<emu::Order>(order), seed};
  return run(op.dtype, [&](auto type) { forward<decltype(type)>(op, each, launch); });
}

extern "C" int emu_policy_backward(const void* upstream, const void* d, void* out, int dtype, int64_t total, int blocks,
                                   int order, unsigned seed) {
  const PolicyLossBackward op{upstream, d, out, static_cast<DType>(dtype), total};
  const Launcher launch{static_cast<emu::Order>(order), seed};
  return run(op.dtype, [&](auto type) { launch(blocks, [&] { policy_backward_kernel<decltype(type)>(op); }); });
}
