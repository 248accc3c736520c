// SPDX-License-Identifier: Apache-2.0
#include "cuda/grouped_mlp/product_launch.cuh"

namespace zexpert::cuda {

template void launch_grouped_product<__nv_fp8_e4m3>(Product, const ProductArguments&, int, cudaStream_t);

}  // namespace zexpert::cuda
