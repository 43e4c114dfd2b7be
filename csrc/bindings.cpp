// Every op's signature and registration. The only file that sees torch, and only its stable ABI.
#include <Python.h>
#include <dlfcn.h>

#include <algorithm>
#include <optional>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launch.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace finealign {
namespace {

// ---- what every op uses --------------------------------------------------------------------------------------------

// A stable shim (2.9+), but it lives in libtorch_cuda.so, which a CPU build of torch does not have. Looked up in the
// library torch itself has loaded, so this file links against libtorch_cpu.so alone and loads under both.
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

// Small inputs stay on one thread: waking the pool costs more than 32k elements of work.
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
                  double softcap, double inv_temperature, int64_t want, Tensor part, Tensor first, Tensor zlabel,
                  const std::optional<Tensor>& e, bool in_place) {
  check_tile(x, "x");
  check_tile(part, "part");
  const int64_t rows = x.size(0), columns = x.size(1);
  STD_TORCH_CHECK(target.numel() == rows && part.size(0) == rows && part.size(1) == kParts && first.numel() == rows &&
                      zlabel.numel() == rows && (!bias || bias->numel() == columns) &&
                      (!e || (e->size(0) == rows && e->size(1) == columns)),
                  "row_tile_fwd: shapes do not fit x");
  const DType dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(dtype != DType::f64 && (!in_place || dtype == DType::f32), "row_tile_fwd: dtype of x");
  RowForward op{const_cast<void*>(x.const_data_ptr()), dtype, x.stride(0), columns, col0,
                make_head(bias, scale, softcap, inv_temperature), static_cast<int32_t>(want),
                target.const_data_ptr<int64_t>(), part.mutable_data_ptr<float>(), part.stride(0),
                first.mutable_data_ptr<int64_t>(), first.stride(0), zlabel.mutable_data_ptr<float>(),
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
  STD_TORCH_CHECK(target.numel() == rows && coef.dim() == 2 && coef.size(0) == 7 && coef.size(1) == rows &&
                      coef.is_contiguous() && from.size(1) == columns && (index || from.size(0) == rows) &&
                      (!index || index->numel() == rows) && (!e_max || e_max->numel() == rows) &&
                      (!bias || bias->numel() == columns),
                  "row_tile_bwd: shapes do not fit out");
  const RowBackward op{out.mutable_data_ptr(), dtype_of(out, "out"), out.stride(0), from.const_data_ptr(),
                       dtype_of(from, "src"), from.stride(0), columns, col0,
                       index ? index->const_data_ptr<int64_t>() : nullptr, e_max ? e_max->const_data_ptr<float>() : nullptr,
                       make_head(bias, scale, softcap, inv_temperature), target.const_data_ptr<int64_t>(),
                       coef.const_data_ptr<float>(), rows};
  STD_TORCH_CHECK(op.out_dtype != DType::f64 && op.dtype != DType::f64, "row_tile_bwd: float64 has no native kernel");
  torch::stable::parallel_for(0, rows, grain(columns), [&](int64_t begin, int64_t end) { row_backward(op, begin, end); });
}

// ---- segments ------------------------------------------------------------------------------------------------------

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
        "int want, Tensor(b!) part, Tensor(c!) first, Tensor(d!) zlabel, Tensor(e!)? e, bool in_place) -> ()");
  m.def("row_tile_bwd(Tensor(a!) out, Tensor? src, Tensor? index, Tensor? e_max, Tensor? bias, Tensor target, Tensor coef, "
        "int col0, float scale, float softcap, float inv_temperature) -> ()");
  m.def("_cuda_state() -> int");
  m.def("_cpu_state() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(finealign, CPU, m) {
  m.impl("row_tile_fwd", TORCH_BOX(&finealign::row_tile_fwd));
  m.impl("row_tile_bwd", TORCH_BOX(&finealign::row_tile_bwd));
}

#ifdef FINEALIGN_CUDA
STABLE_TORCH_LIBRARY_IMPL(finealign, CUDA, m) {
}
#endif

STABLE_TORCH_LIBRARY_IMPL(finealign, CompositeExplicitAutograd, m) {
  m.impl("_cuda_state", TORCH_BOX(&finealign::cuda_state));
  m.impl("_cpu_state", TORCH_BOX(&finealign::cpu_state));
}

// Importing the module is what runs the registrations above.
PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
