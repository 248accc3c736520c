// SPDX-License-Identifier: Apache-2.0
// What the ops that route on CUDA check beside biased_topk.h of any device.
#pragma once

#include "torch/tensor.h"
#include "zexpert/error.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Before there are outputs of a type that no kernel writes.
inline void check_logits_type(const Tensor& logits) {
  ZEXPERT_CHECK(logits.scalar_type() != DType::Double,
                "logits must be float32, bfloat16 or float16 on CUDA, got float64");
}

HIDDEN_NAMESPACE_END(zexpert, ops)
