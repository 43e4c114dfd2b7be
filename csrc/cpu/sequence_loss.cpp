// Losses of whole sequences on a CPU: from scores to losses, and the choice of the dtype.

#include "sequence_loss.h"

#include "formulas.cuh"

namespace finealign {
namespace {

template <Phi phi>
FINEALIGN_INLINE void phis(int64_t n, const double* __restrict m, const double* __restrict a, double* __restrict value,
                           double* __restrict slope) {
  for (int64_t i = 0; i < n; ++i) {
    const Item item = margin_loss(phi, m[i], a[i]);
    value[i] = item.value, slope[i] = item.slope;
  }
}

FINEALIGN_WIDE void evaluate(Phi phi, int64_t n, const double* m, const double* a, double* value, double* slope) {
  switch (phi) {
    case Phi::logistic: return phis<Phi::logistic>(n, m, a, value, slope);
    case Phi::squared: return phis<Phi::squared>(n, m, a, value, slope);
    case Phi::hinge: return phis<Phi::hinge>(n, m, a, value, slope);
    case Phi::smoothed: return phis<Phi::smoothed>(n, m, a, value, slope);
    case Phi::robust: return phis<Phi::robust>(n, m, a, value, slope);
    case Phi::bounded: return phis<Phi::bounded>(n, m, a, value, slope);
    case Phi::linear: return phis<Phi::linear>(n, m, a, value, slope);
    case Phi::exo: return phis<Phi::exo>(n, m, a, value, slope);
    case Phi::discovered: return phis<Phi::discovered>(n, m, a, value, slope);
    case Phi::rising: return phis<Phi::rising>(n, m, a, value, slope);
    case Phi::anchored: return phis<Phi::anchored>(n, m, a, value, slope);
  }
}

template <Form form, bool paired>
FINEALIGN_INLINE void losses_of(const SequenceLossForward& op, int64_t n, Items& at) {
  for (int64_t i = 0; i < n; ++i) {
    const Margins m = margins_of(form, paired, op.beta, at.shift[i], at.sign[i], at.chosen[i], at.rejected[i]);
    at.margin[i] = m.phi, at.other_margin[i] = m.first;
  }
  evaluate(op.phi, n, at.margin, at.hyper, at.value, at.slope);
  if (form != Form::margin) evaluate(op.first, n, at.other_margin, at.hyper, at.first_value, at.first_slope);
  for (int64_t i = 0; i < n; ++i) {
    const Item phi{at.value[i], at.slope[i]}, first{at.first_value[i], at.first_slope[i]};
    const Outcome out = outcome_of(form, paired, op.beta, op.scale, at.sign[i], phi, first);
    at.value[i] = out.loss, at.chosen[i] = out.chosen, at.rejected[i] = out.rejected;
  }
}

FINEALIGN_WIDE void losses_wide(const SequenceLossForward& op, int64_t n, Items& at) {
  const bool paired = op.pairs != Pairs::none;
  if (op.form == Form::margin) return paired ? losses_of<Form::margin, true>(op, n, at) : losses_of<Form::margin, false>(op, n, at);
  if (op.form == Form::beside) return losses_of<Form::beside, true>(op, n, at);
  return paired ? losses_of<Form::sides, true>(op, n, at) : losses_of<Form::sides, false>(op, n, at);
}

}  // namespace

void losses_of_items(const SequenceLossForward& op, int64_t n, Items& at) { losses_wide(op, n, at); }

void sequence_loss_forward_cpu(const SequenceLossForward& op, Parallel parallel) {
  switch (op.dtype) {
    case DType::f32: return sequence_loss_forward_f32(op, parallel);
    case DType::bf16: return sequence_loss_forward_bf16(op, parallel);
    case DType::f16: return sequence_loss_forward_f16(op, parallel);
    case DType::f64: return sequence_loss_forward_f64(op, parallel);
  }
}

void sequence_loss_backward_cpu(const SequenceLossBackward& op, Parallel parallel) {
  switch (op.dtype) {
    case DType::f32: return sequence_loss_backward_f32(op, parallel);
    case DType::bf16: return sequence_loss_backward_bf16(op, parallel);
    case DType::f16: return sequence_loss_backward_f16(op, parallel);
    case DType::f64: return sequence_loss_backward_f64(op, parallel);
  }
}

}  // namespace finealign
