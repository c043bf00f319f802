// The functions of one level.
#pragma once

#include "vector.h"

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

void perturb_normalize(const PerturbNormalize& a);
void perturb_normalize_backward(const PerturbNormalizeBackward& a);
void pair_losses(const PairLosses& a);
void contrastive_stats(const ContrastiveStats& a);
void contrastive_grads(const ContrastiveGrads& a);
int64_t perturb_normalize_backward_workspace(const PerturbNormalizeBackward& a);
int64_t pair_losses_workspace(const PairLosses& a);
int64_t contrastive_stats_workspace(const ContrastiveStats& a);
int64_t contrastive_grads_workspace(const ContrastiveGrads& a);

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
