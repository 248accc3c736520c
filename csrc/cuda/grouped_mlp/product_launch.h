// SPDX-License-Identifier: Apache-2.0
// The launches of the grouped products, a source file for each element type.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/grouped_mlp/layout.h"

namespace zexpert::cuda {

struct ProductArguments;

/// Starts the kernel of one product of elements T on `num_blocks` multiprocessors, for tiles of `max_rows_per_tile`
/// rows.
template <typename T>
void launch_grouped_product(Product product, const ProductArguments& arguments, int num_blocks, cudaStream_t stream);

}  // namespace zexpert::cuda
