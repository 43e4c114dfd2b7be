// Chooses the recurrences for this processor, once. Both versions round the same. FINEALIGN_CPU=baseline selects the narrow.
#include "recurrence.h"

#include <cstdlib>
#include <cstring>

namespace finealign {

namespace baseline {
extern const Recurrences kRecurrences;
}
#if defined(__x86_64__)
namespace wide {
extern const Recurrences kRecurrences;
}
#endif

const Recurrences& recurrences() {
#if defined(__x86_64__)
  static const char* asked = std::getenv("FINEALIGN_CPU");
  static const bool runs = __builtin_cpu_supports("avx2") && (!asked || std::strcmp(asked, "baseline"));
  if (runs) return wide::kRecurrences;
#endif
  return baseline::kRecurrences;
}

}  // namespace finealign
