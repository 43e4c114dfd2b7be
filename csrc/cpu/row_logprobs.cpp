// Chooses the widest row kernels that this processor runs, once. FINEALIGN_CPU=baseline|avx2|avx512 selects narrower ones.
#include <cstdlib>
#include <cstring>

#include "launch.h"

namespace finealign {

#define FINEALIGN_ROWS(isa)                                             \
  namespace isa {                                                       \
  void row_forward(const RowForward& op, int64_t begin, int64_t end);   \
  void row_backward(const RowBackward& op, int64_t begin, int64_t end); \
  }
FINEALIGN_ROWS(baseline)
#if defined(__x86_64__)
FINEALIGN_ROWS(avx2)
FINEALIGN_ROWS(avx512)
#endif

namespace {

struct Rows {
  const char* name;
  decltype(&baseline::row_forward) forward;
  decltype(&baseline::row_backward) backward;
};

Rows pick() {
#if defined(__x86_64__)
  const char* asked = std::getenv("FINEALIGN_CPU");
  const bool any = !asked || !*asked;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && (any || !std::strcmp(asked, "avx512"))) return {"avx512", avx512::row_forward, avx512::row_backward};
  if (has_avx2 && (any || std::strcmp(asked, "baseline"))) return {"avx2", avx2::row_forward, avx2::row_backward};
#endif
  return {"baseline", baseline::row_forward, baseline::row_backward};
}

const Rows& rows() {
  static const Rows chosen = pick();
  return chosen;
}

}  // namespace

void row_forward(const RowForward& op, int64_t begin, int64_t end) { rows().forward(op, begin, end); }
void row_backward(const RowBackward& op, int64_t begin, int64_t end) { rows().backward(op, begin, end); }
const char* row_instructions() { return rows().name; }

}  // namespace finealign
