// SPDX-License-Identifier: Apache-2.0
#include "cuda/biased_topk/widths.cuh"

ZEXPERT_DEFINE_BIASED_TOPK_WIDTH(896)
