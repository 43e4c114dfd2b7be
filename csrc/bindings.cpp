// The signature and registration of every op. This is the only file that includes torch, and it uses only its stable ABI.
#include <Python.h>
#include <dlfcn.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

namespace finealign {
namespace {

// ---- what every op uses --------------------------------------------------------------------------------------------

// A function of the stable ABI (2.9+), but in libtorch_cuda.so, which a CPU build of torch does not have. It is looked up in
// the library that torch has loaded. So this file links only against libtorch_cpu.so and loads under both builds.
using StreamShim = int32_t (*)(int32_t device, void** stream);
StreamShim cuda_stream_shim() {
  static const StreamShim shim = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<StreamShim>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return shim;
}

[[maybe_unused]] void* current_stream(const Tensor& t) {
  STD_TORCH_CHECK(cuda_stream_shim() != nullptr, "finealign: this torch has no CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(cuda_stream_shim()(t.get_device_index(), &stream));
  return stream;
}

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64"); return DType::f32;
  }
}

// Runs the parts of a kernel on torch's own threads.
void parallel(int64_t size, int64_t grain, const Range& range) { torch::stable::parallel_for(0, size, grain, range); }

// Small inputs use one thread: waking the pool takes longer than the work of 32k elements.
int64_t grain(int64_t elements_each) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(elements_each, 1)); }

// ---- rows ----------------------------------------------------------------------------------------------------------

Head make_head(const std::optional<Tensor>& bias, double scale, double softcap, double inv_temperature) {
  return Head{bias ? bias->const_data_ptr<float>() : nullptr, static_cast<float>(scale), static_cast<float>(softcap),
              static_cast<float>(inv_temperature)};
}

void check_tile(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && (t.stride(1) == 1 || t.size(1) <= 1), name, " must be (rows, columns) with stride 1 in columns");
}

void row_tile_fwd(Tensor x, const std::optional<Tensor>& bias, const Tensor& target, int64_t col0, double scale,
                  double softcap, double inv_temperature, int64_t want, Tensor part, Tensor first, Tensor label,
                  const std::optional<Tensor>& e, bool in_place) {
  check_tile(x, "x");
  check_tile(part, "part");
  check_tile(label, "label");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(target.numel() == rows && part.size(0) == rows && part.size(1) == kParts && first.numel() == rows &&
                      label.size(0) == rows && label.size(1) == 2 && (!bias || bias->numel() == columns) &&
                      (!e || (e->size(0) == rows && e->size(1) == columns)),
                  "row_tile_fwd: shapes do not fit x");
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype != DType::f64 && (!in_place || dtype == DType::f32), "row_tile_fwd: dtype of x");
  RowForward op{const_cast<void*>(x.const_data_ptr()), dtype, x.stride(0), columns, col0,
                make_head(bias, scale, softcap, inv_temperature), static_cast<int32_t>(want),
                target.const_data_ptr<int64_t>(), part.mutable_data_ptr<float>(), part.stride(0),
                first.mutable_data_ptr<int64_t>(), first.stride(0), label.mutable_data_ptr<float>(), label.stride(0),
                nullptr, DType::f32, 0};
  if (in_place) op.e = op.x, op.e_stride = op.row_stride;
  if (e) op.e = const_cast<void*>(e->const_data_ptr()), op.e_dtype = dtype_of(*e, "e"), op.e_stride = e->stride(0);
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) { row_forward(op, begin, end); });
}

void row_tile_bwd(Tensor out, const std::optional<Tensor>& src, const std::optional<Tensor>& index,
                  const std::optional<Tensor>& e_max, const std::optional<Tensor>& bias, const Tensor& target,
                  const Tensor& coef, int64_t col0, double scale, double softcap, double inv_temperature) {
  check_tile(out, "out");
  const Tensor& from = src ? *src : out;
  check_tile(from, "src");
  const int64_t rows = out.size(0), columns = out.size(1);
  STD_TORCH_CHECK(target.numel() == rows && coef.dim() == 2 && (coef.size(0) == 8 || coef.size(0) == 9) && coef.size(1) == rows &&
                      coef.is_contiguous() && from.size(1) == columns && (index || from.size(0) == rows) &&
                      (!index || index->numel() == rows) && (!e_max || e_max->numel() == rows) &&
                      (!bias || bias->numel() == columns),
                  "row_tile_bwd: shapes do not fit out");
  const RowBackward op{out.mutable_data_ptr(), dtype_of(out, "out"), out.stride(0), from.const_data_ptr(),
                       dtype_of(from, "src"), from.stride(0), columns, col0,
                       index ? index->const_data_ptr<int64_t>() : nullptr, e_max ? e_max->const_data_ptr<float>() : nullptr,
                       make_head(bias, scale, softcap, inv_temperature), target.const_data_ptr<int64_t>(),
                       coef.const_data_ptr<float>(), coef.size(0) == 9, rows};
  STD_TORCH_CHECK(op.out_dtype != DType::f64 && op.dtype != DType::f64, "row_tile_bwd: float64 has no native kernel");
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) { row_backward(op, begin, end); });
}

// ---- segments ------------------------------------------------------------------------------------------------------

Segments make_segments(const Tensor& cu_seqlens, const std::optional<Tensor>& mask, int64_t total, const Tensor& like) {
  STD_TORCH_CHECK(cu_seqlens.device() == like.device() && (!mask || mask->device() == like.device()),
                  "cu_seqlens and mask must be on the device of the tokens or segment values");
  const bool wide = cu_seqlens.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1 && cu_seqlens.is_contiguous() &&
                      (wide || cu_seqlens.scalar_type() == ScalarType::Int),
                  "cu_seqlens must be (S + 1,) int32 or int64, contiguous");
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == total),
                  "mask must be (", total, ",) bool, contiguous");
  STD_TORCH_CHECK(total >= 0 && (total == 0 || cu_seqlens.size(0) > 1), "cu_seqlens must end at ", total);
  return Segments{cu_seqlens.const_data_ptr(), wide, cu_seqlens.size(0) - 1, total,
                  mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr};
}

// The segments of cu_seqlens or, without it, the rows of a padded batch of `count` rows.
Segments make_segments(const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& mask, int64_t count,
                       int64_t total, const Tensor& like) {
  if (cu_seqlens) return make_segments(*cu_seqlens, mask, total, like);
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() &&
                            mask->numel() == total && mask->device() == like.device()),
                  "mask must be bool in the shape of the tokens, contiguous");
  return Segments{nullptr, false, count, total, mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr,
                  count > 0 ? total / count : 0};
}

struct Lengths {
  int64_t shortest, longest;  // below 0 where cu_seqlens decreases
};

template <typename Index>
Lengths lengths_of(const Index* ends, int64_t count) {
  std::atomic<int64_t> shortest{0}, longest{0};
  parallel(count, 1 << 16, [&](int64_t begin, int64_t end) {
    int64_t least = 0, most = 0;
    for (int64_t s = begin; s < end; ++s) {
      const int64_t length = static_cast<int64_t>(ends[s + 1]) - ends[s];
      least = std::min(least, length), most = std::max(most, length);
    }
    for (int64_t seen = shortest; least < seen && !shortest.compare_exchange_weak(seen, least);) {}
    for (int64_t seen = longest; most > seen && !longest.compare_exchange_weak(seen, most);) {}
  });
  return {shortest, longest};
}

Lengths lengths_of(const Segments& segments) {
  return segments.wide ? lengths_of(static_cast<const int64_t*>(segments.cu_seqlens), segments.count)
                       : lengths_of(static_cast<const int32_t*>(segments.cu_seqlens), segments.count);
}

// Refuses an invalid cu_seqlens; the CPU kernels rely on it as addresses. Returns the length of the longest segment.
int64_t check_ends(const Segments& segments) {
  if (segments.cu_seqlens == nullptr) return segments.width;
  STD_TORCH_CHECK(segments.start(0) == 0, "cu_seqlens must start at 0, got ", segments.start(0));
  const Lengths lengths = lengths_of(segments);
  for (int64_t s = 0; lengths.shortest < 0 && s < segments.count; ++s)
    STD_TORCH_CHECK(segments.start(s) <= segments.start(s + 1), "cu_seqlens must not decrease, got cu_seqlens[", s + 1,
                    "] = ", segments.start(s + 1), " after ", segments.start(s));
  STD_TORCH_CHECK(segments.start(segments.count) == segments.total, "cu_seqlens must end at ", segments.total, ", got ",
                  segments.start(segments.count));
  return lengths.longest;
}

// Whether cu_seqlens is valid, for checks with an error message of their own.
bool cu_seqlens_fit(const Tensor& cu_seqlens, int64_t total) {
  const Segments segments = make_segments(cu_seqlens, std::nullopt, total, cu_seqlens);
  return segments.start(0) == 0 && segments.start(segments.count) == total && lengths_of(segments).shortest >= 0;
}

// The dtype of segment values: float64 for float64, otherwise float32.
ScalarType sum_type(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }

// Asks for large pages for a large result. The first access to a page takes longer than most computations here, and one page
// of 2 MiB takes far less time than 512 pages of 4 KiB.
void advise_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  if (bytes < int64_t{2 * page}) return;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only a hint: it may be refused
#endif
}

Tensor advised(Tensor out) {
  if (out.is_cpu()) advise_large_pages(out.mutable_data_ptr(), out.numel() * size_of(dtype_of(out, "a result")));
  return out;
}

Tensor new_vector(int64_t size, ScalarType type, const Tensor& like) {
  return advised(torch::stable::empty({&size, 1}, type, std::nullopt, like.device()));
}

// Workspace for `size` values of T, which has only members of 8 bytes.
template <typename T>
Tensor room_for(int64_t size, const Tensor& like) {
  static_assert(sizeof(T) % sizeof(double) == 0 && alignof(T) <= alignof(double));
  return new_vector(size * static_cast<int64_t>(sizeof(T) / sizeof(double)), ScalarType::Double, like);
}

Tensor new_rows(int64_t rows, int64_t columns, ScalarType type, const Tensor& like) {
  const int64_t sizes[] = {rows, columns};
  return advised(torch::stable::empty({sizes, 2}, type, std::nullopt, like.device()));
}

Over over_of(int64_t over) {
  STD_TORCH_CHECK(over >= 0 && over <= 2, "over must be 0 (sum), 1 (mean) or 2 (last), got ", over);
  return static_cast<Over>(over);
}

SegmentReduce make_reduce(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, int64_t over,
                          Tensor& out) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_contiguous(), "x must be (N,), contiguous");
  const Segments segments = make_segments(cu_seqlens, mask, x.size(0), x);
  out = new_vector(segments.count, sum_type(x.scalar_type()), x);
  return {segments, over_of(over), x.const_data_ptr(), dtype_of(x, "x"), out.mutable_data_ptr(), nullptr};
}

SegmentSpread make_spread(const Tensor& v, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, int64_t over,
                          int64_t total, ScalarType dtype, Tensor& out) {
  const Segments segments = make_segments(cu_seqlens, mask, total, v);
  STD_TORCH_CHECK(v.dim() == 1 && v.is_contiguous() && v.size(0) == segments.count, "v must be (S,), contiguous");
  STD_TORCH_CHECK(v.scalar_type() == sum_type(dtype), "v must be float32, or float64 for a float64 result");
  out = new_vector(total, dtype, v);
  return {segments, over_of(over), v.const_data_ptr(), out.mutable_data_ptr(), dtype_of(out, "the result"), nullptr};
}

Tensor segment_reduce(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, int64_t over) {
  Tensor out;
  const SegmentReduce op = make_reduce(x, mask, cu_seqlens, over, out);
  check_ends(op.segments);
  segment_reduce_cpu(op, parallel);
  return out;
}

Tensor segment_spread(const Tensor& v, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, int64_t over,
                      int64_t total, ScalarType dtype) {
  Tensor out;
  const SegmentSpread op = make_spread(v, mask, cu_seqlens, over, total, dtype, out);
  check_ends(op.segments);
  segment_spread_cpu(op, parallel);
  return out;
}

#ifdef FINEALIGN_CUDA
Tensor segment_reduce_on_gpu(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& cu_seqlens,
                             int64_t over) {
  const DeviceGuard guard(x.get_device_index());
  Tensor out;
  SegmentReduce op = make_reduce(x, mask, cu_seqlens, over, out);
  Tensor room = room_for<Tally>(op.tallies() ? slots(op.segments, kChunk) : 0, x);
  op.parts = static_cast<Tally*>(room.mutable_data_ptr());
  const char* failure = segment_reduce_cuda(op, current_stream(x));
  STD_TORCH_CHECK(failure == nullptr, "segment_reduce: ", failure);
  return out;
}

Tensor segment_spread_on_gpu(const Tensor& v, const std::optional<Tensor>& mask, const Tensor& cu_seqlens, int64_t over,
                             int64_t total, ScalarType dtype) {
  const DeviceGuard guard(v.get_device_index());
  Tensor out;
  SegmentSpread op = make_spread(v, mask, cu_seqlens, over, total, dtype, out);
  Tensor room = room_for<Tally>(op.tallies() ? slots(op.segments, kChunk) : 0, v);
  op.parts = static_cast<Tally*>(room.mutable_data_ptr());
  const char* failure = segment_spread_cuda(op, current_stream(v));
  STD_TORCH_CHECK(failure == nullptr, "segment_spread: ", failure);
  return out;
}
#endif

// ---- sequence losses -----------------------------------------------------------------------------------------------

// Token weights for the tokens of `like`, or, with `count` rows, for its rows.
TokenWeights make_token_weights(const Tensor& like, int64_t count, int64_t total, const std::optional<Tensor>& mask,
                                const std::optional<Tensor>& weight, const std::optional<Tensor>& cu_seqlens,
                                int64_t average, ScalarType type) {
  const Segments segments = make_segments(cu_seqlens, mask, count, total, like);
  STD_TORCH_CHECK(!weight || (weight->numel() == total && weight->is_contiguous() && weight->scalar_type() == type &&
                              weight->device() == like.device()),
                  "token_weight must have ", total, " elements, contiguous, float32, or float64 for float64 tokens");
  STD_TORCH_CHECK(average >= 0 && average <= 2, "average must be 0 (none), 1 (kept) or 2 (all), got ", average);
  return {segments, weight ? weight->const_data_ptr() : nullptr, static_cast<Average>(average)};
}

Pairs pairs_of(int64_t pairs, int64_t count) {
  STD_TORCH_CHECK(pairs >= 0 && pairs <= 2, "pairs must be 0 (none), 1 (halves) or 2 (interleaved), got ", pairs);
  STD_TORCH_CHECK(pairs == 0 || count % 2 == 0, "pairs need an even number of sequences, got ", count);
  return static_cast<Pairs>(pairs);
}

Phi phi_of(int64_t phi) {
  STD_TORCH_CHECK(phi >= 0 && phi <= static_cast<int64_t>(Phi::anchored), "phi is no known function, got ", phi);
  return static_cast<Phi>(phi);
}

// A vector of `size` float64 numbers, one for each item, or null.
const double* item_numbers(const std::optional<Tensor>& t, const char* name, int64_t size, const Tensor& like) {
  STD_TORCH_CHECK(!t || (t->dim() == 1 && t->numel() == size && t->is_contiguous() &&
                         t->scalar_type() == ScalarType::Double && t->device() == like.device()),
                  name, " must be (", size, ",) float64, contiguous");
  return t ? t->const_data_ptr<double>() : nullptr;
}

struct SequenceResults {
  Tensor losses, score, slope, denominator;
};

SequenceLossForward make_sequence_forward(
    const Tensor& logp, const std::optional<Tensor>& ref_logp, const std::optional<Tensor>& ref_sum,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& cu_seqlens, int64_t average, int64_t pairs, int64_t form, int64_t phi, int64_t first,
    double beta, double scale, double shift, const std::optional<Tensor>& shifts, double hyper,
    const std::optional<Tensor>& hypers, const std::optional<Tensor>& sign, SequenceResults& out) {
  const ScalarType type = sum_type(logp.scalar_type());
  const auto fits = [&](const std::optional<Tensor>& t, int64_t size, ScalarType of) {
    return !t || (t->numel() == size && t->is_contiguous() && t->scalar_type() == of && t->device() == logp.device());
  };
  STD_TORCH_CHECK(logp.dim() == (cu_seqlens ? 1 : 2) && logp.is_contiguous() &&
                      fits(ref_logp, logp.numel(), logp.scalar_type()),
                  "logp and ref_logp must be (N,) with cu_seqlens or (S, T) without, of one dtype, contiguous");
  SequenceLossForward op{};
  op.tokens = make_token_weights(logp, logp.size(0), logp.numel(), mask, token_weight, cu_seqlens, average, type);
  const int64_t count = op.tokens.segments.count;
  STD_TORCH_CHECK(fits(ref_sum, count, type) && !(ref_logp && ref_sum), "ref_sum must be (S,) in place of ref_logp");
  op.logp = logp.const_data_ptr(), op.dtype = dtype_of(logp, "logp");
  op.ref_logp = ref_logp ? ref_logp->const_data_ptr() : nullptr;
  op.ref_sum = ref_sum ? ref_sum->const_data_ptr() : nullptr;
  op.pairs = pairs_of(pairs, count), op.phi = phi_of(phi), op.first = phi_of(first), op.beta = beta, op.scale = scale;
  STD_TORCH_CHECK(form >= 0 && form <= 2, "form must be 0 (margin), 1 (beside) or 2 (sides), got ", form);
  op.form = static_cast<Form>(form);
  STD_TORCH_CHECK(op.form != Form::beside || op.pairs != Pairs::none, "form 1 (beside) is for pairs");
  STD_TORCH_CHECK(!sign || op.pairs == Pairs::none, "sign is for sequences, not for pairs");
  const int64_t items = op.items();
  op.sign = item_numbers(sign, "sign", items, logp);
  op.shift = shift, op.shifts = item_numbers(shifts, "shifts", items, logp);
  op.hyper = hyper, op.hypers = item_numbers(hypers, "hypers", items, logp);
  out = {new_vector(items, type, logp), new_vector(count, type, logp), new_vector(count, type, logp),
         new_vector(op.tokens.average == Average::none ? 0 : count, type, logp)};
  op.losses = out.losses.mutable_data_ptr(), op.score = out.score.mutable_data_ptr();
  op.slope = out.slope.mutable_data_ptr();
  op.denominator = op.tokens.average == Average::none ? nullptr : out.denominator.mutable_data_ptr();
  return op;
}

SequenceLossBackward make_sequence_backward(const Tensor& upstream, const Tensor& slope,
                                            const std::optional<Tensor>& denominator, const std::optional<Tensor>& mask,
                                            const std::optional<Tensor>& token_weight,
                                            const std::optional<Tensor>& cu_seqlens, int64_t pairs, int64_t size,
                                            ScalarType dtype, Tensor& dlogp) {
  const ScalarType type = sum_type(dtype);
  const int64_t count = slope.numel(), total = cu_seqlens ? size : count * size;
  const TokenWeights tokens = make_token_weights(slope, count, total, mask, token_weight, cu_seqlens, 0, type);
  const Pairs layout = pairs_of(pairs, count);
  STD_TORCH_CHECK(upstream.dim() == 1 && upstream.numel() == (pairs ? count / 2 : count) &&
                      tokens.segments.count == count && slope.is_contiguous() &&
                      (!denominator || (denominator->numel() == count && denominator->is_contiguous())),
                  "upstream must be (items,), slope and denominator (S,)");
  STD_TORCH_CHECK(upstream.scalar_type() == type && slope.scalar_type() == type &&
                      (!denominator || denominator->scalar_type() == type),
                  "upstream, slope and denominator must be float32, or float64 for a float64 result");
  STD_TORCH_CHECK(upstream.device() == slope.device() && (!denominator || denominator->device() == slope.device()),
                  "upstream, slope and denominator must be on one device");
  if (cu_seqlens) dlogp = new_vector(total, dtype, slope);
  else dlogp = new_rows(count, size, dtype, slope);
  return {tokens, layout, upstream.const_data_ptr(), upstream.stride(0), slope.const_data_ptr(),
          denominator ? denominator->const_data_ptr() : nullptr, dlogp.mutable_data_ptr(), dtype_of(dlogp, "dlogp")};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_loss_fwd(
    const Tensor& logp, const std::optional<Tensor>& ref_logp, const std::optional<Tensor>& ref_sum,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& cu_seqlens, int64_t average, int64_t pairs, int64_t form, int64_t phi, int64_t first,
    double beta, double scale, double shift, const std::optional<Tensor>& shifts, double hyper,
    const std::optional<Tensor>& hypers, const std::optional<Tensor>& sign) {
  SequenceResults out;
  const SequenceLossForward op = make_sequence_forward(logp, ref_logp, ref_sum, mask, token_weight, cu_seqlens, average,
                                                 pairs, form, phi, first, beta, scale, shift, shifts, hyper, hypers,
                                                 sign, out);
  check_ends(op.tokens.segments);
  sequence_loss_forward_cpu(op, parallel);
  return {out.losses, out.score, out.slope, out.denominator};
}

Tensor sequence_loss_bwd(const Tensor& upstream, const Tensor& slope, const std::optional<Tensor>& denominator,
                         const std::optional<Tensor>& mask, const std::optional<Tensor>& token_weight,
                         const std::optional<Tensor>& cu_seqlens, int64_t pairs, int64_t size, ScalarType dtype) {
  Tensor dlogp;
  const SequenceLossBackward op = make_sequence_backward(upstream, slope, denominator, mask, token_weight, cu_seqlens,
                                                         pairs, size, dtype, dlogp);
  check_ends(op.tokens.segments);
  sequence_loss_backward_cpu(op, parallel);
  return dlogp;
}

#ifdef FINEALIGN_CUDA
std::tuple<Tensor, Tensor, Tensor, Tensor> sequence_loss_fwd_on_gpu(
    const Tensor& logp, const std::optional<Tensor>& ref_logp, const std::optional<Tensor>& ref_sum,
    const std::optional<Tensor>& mask, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& cu_seqlens, int64_t average, int64_t pairs, int64_t form, int64_t phi, int64_t first,
    double beta, double scale, double shift, const std::optional<Tensor>& shifts, double hyper,
    const std::optional<Tensor>& hypers, const std::optional<Tensor>& sign) {
  const DeviceGuard guard(logp.get_device_index());
  SequenceResults out;
  SequenceLossForward op = make_sequence_forward(logp, ref_logp, ref_sum, mask, token_weight, cu_seqlens, average, pairs,
                                                 form, phi, first, beta, scale, shift, shifts, hyper, hypers, sign, out);
  Tensor room = room_for<Stretch>(slots(op.tokens.segments, kChunk), logp);
  op.parts = static_cast<Stretch*>(room.mutable_data_ptr());
  const char* failure = sequence_loss_forward_cuda(op, current_stream(logp));
  STD_TORCH_CHECK(failure == nullptr, "sequence_loss_fwd: ", failure);
  return {out.losses, out.score, out.slope, out.denominator};
}

Tensor sequence_loss_bwd_on_gpu(const Tensor& upstream, const Tensor& slope, const std::optional<Tensor>& denominator,
                                const std::optional<Tensor>& mask, const std::optional<Tensor>& token_weight,
                                const std::optional<Tensor>& cu_seqlens, int64_t pairs, int64_t size,
                                ScalarType dtype) {
  const DeviceGuard guard(slope.get_device_index());
  Tensor dlogp;
  const char* failure = sequence_loss_backward_cuda(
      make_sequence_backward(upstream, slope, denominator, mask, token_weight, cu_seqlens, pairs, size, dtype, dlogp),
      current_stream(slope));
  STD_TORCH_CHECK(failure == nullptr, "sequence_loss_bwd: ", failure);
  return dlogp;
}
#endif

// ---- policy losses -------------------------------------------------------------------------------------------------

// A number on the host, or one on the device instead.
Number number_of(double value, const std::optional<Tensor>& at, const char* name, const Tensor& like) {
  STD_TORCH_CHECK(!at || (at->numel() == 1 && at->scalar_type() == ScalarType::Double && at->device() == like.device()),
                  name, " must hold one float64 number");
  return {value, at ? at->const_data_ptr<double>() : nullptr};
}

Tensor new_scalar(ScalarType type, const Tensor& like) {
  const int64_t* none = nullptr;
  return torch::stable::empty({none, size_t{0}}, type, std::nullopt, like.device());
}

Tensor new_like(const Tensor& x, ScalarType type) {
  return advised(torch::stable::empty(x.sizes(), type, std::nullopt, x.device()));
}

int64_t at_most(int64_t value, int64_t most, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= most, name, " must be 0 to ", most, ", got ", value);
  return value;
}

// Returns losses, dlogp and, if the entropy has a gradient, dentropy in the shape of logp; loss (), numbers (8,).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss_fwd(
    const Tensor& logp, const std::optional<Tensor>& old_logp, const std::optional<Tensor>& ref_logp,
    const std::optional<Tensor>& entropy, const Tensor& advantages, const std::optional<Tensor>& token_weight,
    const std::optional<Tensor>& sampler_weight, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& cu_seqlens, bool advantage_by_row, bool sampler_by_row, int64_t psi, int64_t ratio,
    double first, double second, double dual, double below, double above, int64_t estimator, double kl_coef,
    double entropy_coef, int64_t share, bool kept, bool count_empty, double denominator,
    const std::optional<Tensor>& denominator_at, double max_length, const std::optional<Tensor>& max_length_at,
    bool entropy_by_token, double entropy_denominator, const std::optional<Tensor>& entropy_denominator_at) {
  const ScalarType type = sum_type(logp.scalar_type());
  const int64_t total = logp.numel();
  STD_TORCH_CHECK(logp.dim() == (cu_seqlens ? 1 : 2) && logp.is_contiguous(),
                  "logp must be (N,) with cu_seqlens or (S, T) without, contiguous");
  PolicyLossForward op{};
  op.segments = make_segments(cu_seqlens, mask, logp.size(0), total, logp);
  const auto given = [&](const std::optional<Tensor>& t, const char* name, ScalarType of, bool by_row) {
    const int64_t size = by_row ? op.segments.count : total;
    STD_TORCH_CHECK(!t || (t->numel() == size && t->is_contiguous() && t->scalar_type() == of &&
                           t->device() == logp.device()),
                    name, " must have ", size, " elements, contiguous, of the dtype of ",
                    of == type ? "the results" : "logp");
    return t ? t->const_data_ptr() : nullptr;
  };
  op.dtype = dtype_of(logp, "logp"), op.logp = logp.const_data_ptr();
  op.old_logp = given(old_logp, "old_logp", logp.scalar_type(), false);
  op.ref_logp = given(ref_logp, "ref_logp", logp.scalar_type(), false);
  op.entropy = given(entropy, "entropy", logp.scalar_type(), false);
  op.advantage = given(advantages, "advantages", type, advantage_by_row), op.advantage_by_row = advantage_by_row;
  op.weight = given(token_weight, "token_weight", type, false);
  op.sampler = given(sampler_weight, "sampler_weight", type, sampler_by_row);
  op.sampler_by_row = sampler_by_row && sampler_weight;
  op.psi = static_cast<Psi>(at_most(psi, 3, "psi")), op.ratio = static_cast<RatioOf>(at_most(ratio, 2, "ratio"));
  op.first = first, op.second = second, op.dual = dual, op.below = below, op.above = above;
  op.estimator = static_cast<Estimator>(at_most(estimator, 4, "estimator"));
  op.kl_coef = kl_coef, op.entropy_coef = entropy_coef;
  op.share = static_cast<ShareOf>(at_most(share, 2, "share")), op.kept = kept && token_weight;
  op.count_empty = count_empty, op.denominator = number_of(denominator, denominator_at, "denominator", logp);
  op.max_length = number_of(max_length, max_length_at, "max_length", logp);
  op.entropy_by_token = entropy_by_token;
  op.entropy_denominator = number_of(entropy_denominator, entropy_denominator_at, "entropy_denominator", logp);

  const bool moves_entropy = entropy && entropy_coef != 0;
  Tensor loss = new_scalar(type, logp), numbers = new_vector(kTokens, type, logp);
  Tensor losses = new_like(logp, type), dlogp = new_like(logp, type);
  Tensor dentropy = moves_entropy ? new_like(logp, type) : new_vector(0, type, logp);
  op.loss = loss.mutable_data_ptr(), op.numbers = numbers.mutable_data_ptr();
  op.losses = losses.mutable_data_ptr(), op.dlogp = dlogp.mutable_data_ptr();
  op.dentropy = moves_entropy ? dentropy.mutable_data_ptr() : nullptr;
#ifdef FINEALIGN_CUDA
  if (!logp.is_cpu()) {
    const DeviceGuard guard(logp.get_device_index());
    const int64_t rows = op.sums_rows() ? op.segments.count : 0;
    constexpr int64_t kDouble = sizeof(double);
    const int64_t row_parts = op.sums_rows() ? slots(op.segments, kChunk) : 0;
    const int64_t bytes = (rows + row_parts) * sizeof(Row) + op.chunks() * sizeof(Terms) + sizeof(Totals);
    Tensor room = new_vector(bytes / kDouble, ScalarType::Double, logp);
    op.rows = static_cast<Row*>(room.mutable_data_ptr());
    op.row_parts = op.rows + rows;
    op.parts = reinterpret_cast<Terms*>(op.row_parts + row_parts);
    op.totals = reinterpret_cast<Totals*>(op.parts + op.chunks());
    const char* failure = policy_loss_forward_cuda(op, current_stream(logp));
    STD_TORCH_CHECK(failure == nullptr, "policy_loss_fwd: ", failure);
    return {loss, numbers, losses, dlogp, dentropy};
  }
#endif
  check_ends(op.segments);
  policy_loss_forward_cpu(op, parallel);
  return {loss, numbers, losses, dlogp, dentropy};
}

Tensor policy_loss_bwd(const Tensor& upstream, const Tensor& d, ScalarType dtype) {
  STD_TORCH_CHECK(upstream.numel() == 1 && upstream.scalar_type() == d.scalar_type() &&
                      upstream.device() == d.device() && d.is_contiguous() && d.scalar_type() == sum_type(dtype),
                  "upstream must be one number of the type of d, float32, or float64 for a float64 result");
  Tensor out = new_like(d, dtype);
  const PolicyLossBackward op{upstream.const_data_ptr(), d.const_data_ptr(), out.mutable_data_ptr(),
                              dtype_of(out, "the result"), d.numel()};
#ifdef FINEALIGN_CUDA
  if (!d.is_cpu()) {
    const DeviceGuard guard(d.get_device_index());
    const char* failure = policy_loss_backward_cuda(op, current_stream(d));
    STD_TORCH_CHECK(failure == nullptr, "policy_loss_bwd: ", failure);
    return out;
  }
#endif
  policy_loss_backward_cpu(op, parallel);
  return out;
}

// ---- scans and advantages ------------------------------------------------------------------------------------------

// A vector of `size` elements of a type, or null.
const void* vector_of(const std::optional<Tensor>& t, const char* name, int64_t size, ScalarType type, const Tensor& like) {
  STD_TORCH_CHECK(!t || (t->dim() == 1 && t->numel() == size && t->is_contiguous() && t->scalar_type() == type &&
                         t->device() == like.device()),
                  name, " must be (", size, ",), contiguous, of the dtype of its op");
  return t ? t->const_data_ptr() : nullptr;
}

// One number for each sequence, or one for all.
const double* rates_of(const Tensor& t, const char* name, int64_t count, const Tensor& like, int64_t& stride) {
  stride = t.numel() == 1 ? 0 : 1;
  return static_cast<const double*>(vector_of(t, name, stride ? count : 1, ScalarType::Double, like));
}

ScalarType wide_type(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous() && sum_type(t.scalar_type()) == t.scalar_type(), name,
                  " must be (N,), contiguous, float32 or float64");
  return t.scalar_type();
}

// Runs on the device of `like`; on a GPU it launches on the current stream.
void run(const Scan& op, [[maybe_unused]] const Tensor& like) {
#ifdef FINEALIGN_CUDA
  if (!like.is_cpu()) {
    const DeviceGuard guard(like.get_device_index());
    Tensor room = room_for<Link>(slots(op.segments, kPiece), like);
    const char* failure = scan_cuda(op, static_cast<Link*>(room.mutable_data_ptr()), current_stream(like));
    STD_TORCH_CHECK(failure == nullptr, "reverse_scan: ", failure);
    return;
  }
#endif
  scan_cpu(op, parallel);
}

void run(const Advantages& op, [[maybe_unused]] const Tensor& like) {
#ifdef FINEALIGN_CUDA
  if (!like.is_cpu()) {
    const DeviceGuard guard(like.get_device_index());
    const bool adds = op.reward_moments || op.advantage_moments;
    Tensor parts = new_vector(adds ? 5 * moment_parts(op.segments.total) : 0, ScalarType::Double, like);
    Tensor room = room_for<Link>(op.returns ? slots(op.segments, kPiece) : 0, like);
    const char* failure = advantages_cuda(op, parts.mutable_data_ptr(), static_cast<Link*>(room.mutable_data_ptr()),
                                          current_stream(like));
    STD_TORCH_CHECK(failure == nullptr, "advantages: ", failure);
    return;
  }
#endif
  advantages_cpu(op, parallel);
}

// The length of the longest sequence; on a GPU bounds are not read here.
int64_t longest_of(const Segments& segments, const Tensor& like) { return like.is_cpu() ? check_ends(segments) : 0; }

Tensor reverse_scan(const Tensor& x, const std::optional<Tensor>& decay, const std::optional<Tensor>& rates,
                    const std::optional<Tensor>& mask, const Tensor& cu_seqlens, bool forward) {
  const ScalarType type = wide_type(x, "x");
  STD_TORCH_CHECK(decay.has_value() != rates.has_value(), "reverse_scan takes decay or rates");
  Scan op{};
  op.segments = make_segments(cu_seqlens, mask, x.size(0), x), op.longest = longest_of(op.segments, x);
  op.forward = forward, op.dtype = dtype_of(x, "x"), op.x = x.const_data_ptr();
  op.decay = vector_of(decay, "decay", x.size(0), type, x);
  if (rates) op.rates = rates_of(*rates, "rates", op.segments.count, x, op.rate_stride);
  Tensor out = new_vector(x.size(0), type, x);
  op.out = out.mutable_data_ptr();
  run(op, x);
  return out;
}

SegmentRewards make_segment_rewards(const Tensor& reward, const Tensor& end, const std::optional<Tensor>& start,
                                    const Tensor& bounds, int64_t sequences, bool overwrite, bool drop) {
  const int64_t many = reward.numel();
  STD_TORCH_CHECK(bounds.dim() == 2 && bounds.size(1) == sequences + 1 && bounds.is_contiguous() &&
                      bounds.scalar_type() == ScalarType::Long && bounds.device() == reward.device(),
                  "model_bounds must be (K, ", sequences + 1, ") int64, contiguous");
  const auto* at = bounds.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < bounds.numel(); ++i)
    STD_TORCH_CHECK(at[i] >= 0 && at[i] <= many && (i % (sequences + 1) == 0 || at[i - 1] <= at[i]),
                    "model_bounds must not decrease, nor leave [0, ", many, "]");
  const auto* ends = vector_of(end, "model_end", many, ScalarType::Long, reward);
  const auto* starts = vector_of(start, "model_start", many, ScalarType::Long, reward);
  return {bounds.size(0),
          static_cast<const double*>(vector_of(reward, "model_reward", many, ScalarType::Double, reward)),
          static_cast<const int64_t*>(ends),
          static_cast<const int64_t*>(starts),
          at,
          overwrite,
          drop};
}

Whitening make_whitening(const std::optional<Tensor>& moments, int64_t scale, bool unbiased, bool shift,
                         const Tensor& like) {
  STD_TORCH_CHECK(scale >= 0 && scale <= 2, "scale must be 0 (std), 1 (clamp) or 2 (compat), got ", scale);
  const auto* known = static_cast<const double*>(vector_of(moments, "moments", 5, ScalarType::Double, like));
  return {known, static_cast<Scale>(scale), unbiased, shift};
}

// Results that are not asked for are returned empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> advantages(
    const Tensor& cu_seqlens, const std::optional<Tensor>& mask, const std::optional<Tensor>& rewards,
    const std::optional<Tensor>& model_reward, const std::optional<Tensor>& model_end,
    const std::optional<Tensor>& model_start, const std::optional<Tensor>& model_bounds, bool overwrite, bool drop,
    const std::optional<Tensor>& old_logp, const std::optional<Tensor>& ref_logp, int64_t estimator, double kl_coef,
    bool wants_reward_moments, const std::optional<Tensor>& reward_moments, int64_t scale, bool unbiased,
    const std::optional<Tensor>& values, const std::optional<Tensor>& gamma, const std::optional<Tensor>& lam,
    const std::optional<Tensor>& bootstrap, bool zero, const std::optional<Tensor>& score, double baseline,
    bool pivots_first, bool wants_advantage_moments, int64_t total, ScalarType type) {
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "dtype must be float32 or float64");
  STD_TORCH_CHECK(rewards.has_value() != model_reward.has_value() && old_logp.has_value() == ref_logp.has_value() &&
                      (!model_reward || (model_end && model_bounds)) && gamma.has_value() == lam.has_value() &&
                      (gamma || !(values || score || wants_advantage_moments)),
                  "advantages: what is given does not fit together");
  const Tensor& like = rewards ? *rewards : *model_reward;
  const auto tokens = [&](const std::optional<Tensor>& t, const char* name) {
    return vector_of(t, name, total, type, like);
  };
  const auto result = [&](bool wanted, int64_t size, ScalarType of) { return new_vector(wanted ? size : 0, of, like); };
  STD_TORCH_CHECK(!model_reward || like.is_cpu(), "advantages: rewards of segments have no place on a GPU yet");
  Advantages op{};
  op.segments = make_segments(cu_seqlens, mask, total, like), op.longest = longest_of(op.segments, like);
  op.dtype = type == ScalarType::Double ? DType::f64 : DType::f32;
  op.rewards = tokens(rewards, "rewards");
  if (model_reward)
    op.segment_rewards = make_segment_rewards(*model_reward, *model_end, model_start, *model_bounds, op.segments.count,
                                              overwrite, drop);
  op.old_logp = tokens(old_logp, "old_logp"), op.ref_logp = tokens(ref_logp, "ref_logp");
  STD_TORCH_CHECK(estimator >= 0 && estimator <= 2, "estimator must be 0 (k1), 1 (k2) or 2 (k3), got ", estimator);
  op.estimator = static_cast<Estimator>(estimator), op.kl_coef = kl_coef;
  const bool shapes = model_reward || old_logp, scans = gamma.has_value();
  Tensor shaped = result(shapes, total, type), kl = result(old_logp.has_value(), total, type);
  Tensor of_rewards = result(wants_reward_moments, 5, ScalarType::Double);
  Tensor out = result(scans, total, type), returns = result(scans, total, type);
  Tensor weight = result(score.has_value(), total, ScalarType::Float);
  Tensor of_advantages = result(wants_advantage_moments, 5, ScalarType::Double);
  if (shapes) op.shaped = shaped.mutable_data_ptr();
  if (old_logp) op.kl = kl.mutable_data_ptr();
  if (wants_reward_moments) op.reward_moments = of_rewards.mutable_data_ptr<double>();
  op.whiten_rewards = make_whitening(reward_moments, scale, unbiased, false, like);
  op.values = tokens(values, "values"), op.zero = zero;
  op.score = tokens(score, "token_score"), op.baseline = baseline, op.pivots_first = pivots_first && score;
  if (scans) {
    op.gamma = rates_of(*gamma, "gamma", op.segments.count, like, op.gamma_stride);
    op.lam = rates_of(*lam, "lam", op.segments.count, like, op.lam_stride);
    op.bootstrap = static_cast<const double*>(
        vector_of(bootstrap, "bootstrap", op.segments.count, ScalarType::Double, like));
    op.advantages = out.mutable_data_ptr(), op.returns = returns.mutable_data_ptr();
  }
  if (score) op.token_weight = weight.mutable_data_ptr();
  if (wants_advantage_moments) op.advantage_moments = of_advantages.mutable_data_ptr<double>();
  run(op, like);
  return {shaped, kl, of_rewards, out, returns, weight, of_advantages};
}

// Tokens as one sequence.
Advantages of_tokens(const Tensor& x, const std::optional<Tensor>& mask, const int64_t* bounds) {
  wide_type(x, "x");
  STD_TORCH_CHECK(!mask || (mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->dim() == 1 &&
                            mask->numel() == x.size(0) && mask->device() == x.device()),
                  "mask must be (", x.size(0), ",) bool, contiguous");
  Advantages op{};
  const auto* keep = mask ? static_cast<const uint8_t*>(mask->const_data_ptr()) : nullptr;
  op.segments = {bounds, true, 1, x.size(0), keep}, op.longest = x.size(0);
  op.dtype = dtype_of(x, "x"), op.advantages = const_cast<void*>(x.const_data_ptr());  // only read, because returns is null
  return op;
}

Tensor moments(const Tensor& x, const std::optional<Tensor>& mask) {
  const int64_t bounds[] = {0, x.size(0)};
  Advantages op = of_tokens(x, mask, bounds);
  Tensor out = new_vector(5, ScalarType::Double, x);
  op.advantage_moments = out.mutable_data_ptr<double>();
  run(op, x);
  return out;
}

// With scores, pivots by the signs of the whitened values. If `kept` is given, only those tokens are whitened.
Tensor whiten_to(void* out, const Tensor& x, const std::optional<Tensor>& mask, const Tensor& moments, int64_t scale,
                 bool unbiased, bool shift, const std::optional<Tensor>& kept, const std::optional<Tensor>& score,
                 double baseline) {
  const int64_t bounds[] = {0, x.size(0)};
  Advantages op = of_tokens(x, mask, bounds);
  STD_TORCH_CHECK(!(kept && score), "whiten takes kept or scores");
  op.whiten_advantages = make_whitening(moments, scale, unbiased, shift, x), op.whitened = out;
  op.score = vector_of(score, "token_score", x.size(0), x.scalar_type(), x), op.baseline = baseline;
  Tensor weight = new_vector(score ? x.size(0) : 0, ScalarType::Float, x);
  op.pivots_first = kept.has_value();
  op.token_weight = kept ? const_cast<void*>(vector_of(kept, "kept", x.size(0), ScalarType::Float, x))
                         : weight.mutable_data_ptr();
  run(op, x);
  return weight;
}

Tensor whiten(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& moments, int64_t scale, bool unbiased,
              bool shift) {
  Tensor out = new_vector(x.numel(), wide_type(x, "x"), x);
  whiten_to(out.mutable_data_ptr(), x, mask, moments, scale, unbiased, shift, std::nullopt, std::nullopt, 0);
  return out;
}

Tensor whiten_(Tensor x, const std::optional<Tensor>& mask, const Tensor& moments, int64_t scale, bool unbiased,
               const std::optional<Tensor>& kept, const std::optional<Tensor>& score, double baseline) {
  return whiten_to(x.mutable_data_ptr(), x, mask, moments, scale, unbiased, true, kept, score, baseline);
}

// ---- state ---------------------------------------------------------------------------------------------------------

int64_t cuda_state() {  // 0: built without CUDA, 1: built with CUDA, torch without, 2: both
#ifdef FINEALIGN_CUDA
  return cuda_stream_shim() != nullptr ? 2 : 1;
#else
  return 0;
#endif
}

int64_t cpu_state() {  // 0: baseline, 2: avx2, 5: avx512
  const char* name = row_instructions();
  return name[0] != 'a' ? 0 : name[3] == '2' ? 2 : 5;
}

}  // namespace
}  // namespace finealign

STABLE_TORCH_LIBRARY(finealign, m) {
  m.def("row_tile_fwd(Tensor(a!) x, Tensor? bias, Tensor target, int col0, float scale, float softcap, float inv_temperature, "
        "int want, Tensor(b!) part, Tensor(c!) first, Tensor(d!) label, Tensor(e!)? e, bool in_place) -> ()");
  m.def("row_tile_bwd(Tensor(a!) out, Tensor? src, Tensor? index, Tensor? e_max, Tensor? bias, Tensor target, Tensor coef, "
        "int col0, float scale, float softcap, float inv_temperature) -> ()");
  m.def("segment_reduce(Tensor x, Tensor? mask, Tensor cu_seqlens, int over) -> Tensor");
  m.def("segment_spread(Tensor v, Tensor? mask, Tensor cu_seqlens, int over, SymInt total, ScalarType dtype) "
        "-> Tensor");
  m.def("sequence_loss_fwd(Tensor logp, Tensor? ref_logp, Tensor? ref_sum, Tensor? mask, Tensor? token_weight, "
        "Tensor? cu_seqlens, int average, int pairs, int form, int phi, int first, float beta, float scale, float shift, "
        "Tensor? shifts, float hyper, Tensor? hypers, Tensor? sign) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("sequence_loss_bwd(Tensor upstream, Tensor slope, Tensor? denominator, Tensor? mask, Tensor? token_weight, "
        "Tensor? cu_seqlens, int pairs, SymInt size, ScalarType dtype) -> Tensor");
  m.def("policy_loss_fwd(Tensor logp, Tensor? old_logp, Tensor? ref_logp, Tensor? entropy, Tensor advantages, "
        "Tensor? token_weight, Tensor? sampler_weight, Tensor? mask, Tensor? cu_seqlens, bool advantage_by_row, "
        "bool sampler_by_row, int psi, int ratio, float first, float second, float dual, float below, float above, "
        "int estimator, float kl_coef, float entropy_coef, int share, bool kept, bool count_empty, float denominator, "
        "Tensor? denominator_at, float max_length, Tensor? max_length_at, bool entropy_by_token, "
        "float entropy_denominator, Tensor? entropy_denominator_at) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("policy_loss_bwd(Tensor upstream, Tensor d, ScalarType dtype) -> Tensor");
  m.def("reverse_scan(Tensor x, Tensor? decay, Tensor? rates, Tensor? mask, Tensor cu_seqlens, bool forward) -> Tensor");
  m.def("advantages(Tensor cu_seqlens, Tensor? mask, Tensor? rewards, Tensor? model_reward, Tensor? model_end, "
        "Tensor? model_start, Tensor? model_bounds, bool overwrite, bool drop, Tensor? old_logp, Tensor? ref_logp, "
        "int estimator, float kl_coef, bool wants_reward_moments, Tensor? reward_moments, int scale, bool unbiased, "
        "Tensor? values, Tensor? gamma, Tensor? lam, Tensor? bootstrap, bool zero, Tensor? score, float baseline, "
        "bool pivots_first, bool wants_advantage_moments, SymInt total, ScalarType dtype) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("moments(Tensor x, Tensor? mask) -> Tensor");
  m.def("whiten(Tensor x, Tensor? mask, Tensor moments, int scale, bool unbiased, bool shift) -> Tensor");
  m.def("whiten_(Tensor(a!) x, Tensor? mask, Tensor moments, int scale, bool unbiased, Tensor? kept, Tensor? score, "
        "float baseline) -> Tensor");
  m.def("_cu_seqlens_fit(Tensor cu_seqlens, int total) -> bool");
  m.def("_cuda_state() -> int");
  m.def("_cpu_state() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(finealign, CPU, m) {
  m.impl("row_tile_fwd", TORCH_BOX(&finealign::row_tile_fwd));
  m.impl("row_tile_bwd", TORCH_BOX(&finealign::row_tile_bwd));
  m.impl("segment_reduce", TORCH_BOX(&finealign::segment_reduce));
  m.impl("segment_spread", TORCH_BOX(&finealign::segment_spread));
  m.impl("sequence_loss_fwd", TORCH_BOX(&finealign::sequence_loss_fwd));
  m.impl("sequence_loss_bwd", TORCH_BOX(&finealign::sequence_loss_bwd));
  m.impl("policy_loss_fwd", TORCH_BOX(&finealign::policy_loss_fwd));
  m.impl("policy_loss_bwd", TORCH_BOX(&finealign::policy_loss_bwd));
  m.impl("reverse_scan", TORCH_BOX(&finealign::reverse_scan));
  m.impl("advantages", TORCH_BOX(&finealign::advantages));
  m.impl("moments", TORCH_BOX(&finealign::moments));
  m.impl("whiten", TORCH_BOX(&finealign::whiten));
  m.impl("whiten_", TORCH_BOX(&finealign::whiten_));
  m.impl("_cu_seqlens_fit", TORCH_BOX(&finealign::cu_seqlens_fit));
}

#ifdef FINEALIGN_CUDA
STABLE_TORCH_LIBRARY_IMPL(finealign, CUDA, m) {
  m.impl("segment_reduce", TORCH_BOX(&finealign::segment_reduce_on_gpu));
  m.impl("segment_spread", TORCH_BOX(&finealign::segment_spread_on_gpu));
  m.impl("sequence_loss_fwd", TORCH_BOX(&finealign::sequence_loss_fwd_on_gpu));
  m.impl("sequence_loss_bwd", TORCH_BOX(&finealign::sequence_loss_bwd_on_gpu));
  m.impl("policy_loss_fwd", TORCH_BOX(&finealign::policy_loss_fwd));
  m.impl("policy_loss_bwd", TORCH_BOX(&finealign::policy_loss_bwd));
  m.impl("reverse_scan", TORCH_BOX(&finealign::reverse_scan));
  m.impl("advantages", TORCH_BOX(&finealign::advantages));
  m.impl("moments", TORCH_BOX(&finealign::moments));
  m.impl("whiten", TORCH_BOX(&finealign::whiten));
  m.impl("whiten_", TORCH_BOX(&finealign::whiten_));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(finealign, CompositeExplicitAutograd, m) {
  m.impl("_cuda_state", TORCH_BOX(&finealign::cuda_state));
  m.impl("_cpu_state", TORCH_BOX(&finealign::cpu_state));
}

#ifndef FINEALIGN_ARCHS
#define FINEALIGN_ARCHS ""  // built without CUDA
#endif

// Importing the module runs the registrations above. Its attributes name the GPUs that it was compiled for, and its sources.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module && (PyModule_AddStringConstant(module, "architectures", FINEALIGN_ARCHS) < 0 ||
                 PyModule_AddStringConstant(module, "sources", FINEALIGN_SOURCES) < 0)) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
