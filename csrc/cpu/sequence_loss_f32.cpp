#include "segments.h"
#define FINEALIGN_DTYPE float
#include "sequence_loss_kernels.h"

namespace finealign {

void sequence_loss_forward_f32(const SequenceLossForward& op, Parallel parallel) { forward<float>(op, parallel); }
void sequence_loss_backward_f32(const SequenceLossBackward& op, Parallel parallel) { backward<float>(op, parallel); }

}  // namespace finealign
