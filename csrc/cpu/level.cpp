#include "level.h"

#define MODEST_ALIGN_STRING_OF(name) #name
#define MODEST_ALIGN_STRING(name) MODEST_ALIGN_STRING_OF(name)

namespace modest_align {
namespace MODEST_ALIGN_LEVEL {

extern const CpuKernels kernels;
const CpuKernels kernels{MODEST_ALIGN_STRING(MODEST_ALIGN_LEVEL),
                         kBFloat16,
                         perturb_normalize,
                         perturb_normalize_backward,
                         pair_losses,
                         contrastive_stats,
                         contrastive_grads,
                         perturb_normalize_backward_workspace,
                         pair_losses_workspace,
                         contrastive_stats_workspace,
                         contrastive_grads_workspace};

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
