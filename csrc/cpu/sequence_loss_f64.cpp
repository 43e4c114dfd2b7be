#include "segments.h"
#define FINEALIGN_DTYPE double
#include "sequence_loss_kernels.h"

namespace finealign {

void sequence_loss_forward_f64(const SequenceLossForward& op, Parallel parallel) { forward<double>(op, parallel); }
void sequence_loss_backward_f64(const SequenceLossBackward& op, Parallel parallel) { backward<double>(op, parallel); }

}  // namespace finealign
