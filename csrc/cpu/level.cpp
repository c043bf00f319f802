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
                         contrastive_stats,
                         contrastive_grads,
                         contrastive_stats_workspace,
                         contrastive_grads_workspace};

}  // namespace MODEST_ALIGN_LEVEL
}  // namespace modest_align
