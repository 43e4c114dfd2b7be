#include "segments.h"
#define FINEALIGN_DTYPE f16
#include "sequence_loss_kernels.h"

namespace finealign {

void sequence_loss_forward_f16(const SequenceLossForward& op, Parallel parallel) { forward<f16>(op, parallel); }
void sequence_loss_backward_f16(const SequenceLossBackward& op, Parallel parallel) { backward<f16>(op, parallel); }

}  // namespace finealign
