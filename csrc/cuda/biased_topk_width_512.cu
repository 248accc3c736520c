#include "cuda/biased_topk_warp.cuh"

ZEXPERT_DEFINE_BIASED_TOPK_WIDTH(512)
