#include "segments.h"
#define FINEALIGN_DTYPE bf16
#include "sequence_loss_kernels.h"

namespace finealign {

void sequence_loss_forward_bf16(const SequenceLossForward& op, Parallel parallel) { forward<bf16>(op, parallel); }
void sequence_loss_backward_bf16(const SequenceLossBackward& op, Parallel parallel) { backward<bf16>(op, parallel); }

}  // namespace finealign
