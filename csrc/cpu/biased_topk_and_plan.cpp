// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk_and_plan.h"

namespace zexpert {

void biased_topk_and_plan_cpu(const BiasedTopKAndPlanParams& params) {
  biased_topk_cpu(params.routing);
  moe_plan_cpu(params.plan());
}

}  // namespace zexpert
