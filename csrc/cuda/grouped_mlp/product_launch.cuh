// SPDX-License-Identifier: Apache-2.0
// launch_grouped_product for the source files that instantiate it.
#pragma once

#include "cuda/grouped_mlp/product_kernel.cuh"
#include "cuda/grouped_mlp/product_launch.h"
#include "cuda/launch.cuh"
#include "zexpert/grouped_mlp.h"

namespace zexpert::cuda {

template <typename T, Product kProduct, Tiles kTiles, int kMaxRows, int kStages>
void launch_with_tiles(const ProductArguments& arguments, int num_blocks, cudaStream_t stream) {
  constexpr size_t kMemoryBytes = sizeof(ProductMemory<T, kTiles, kMaxRows, kStages>) + kSwizzleBytes;  // to align it
  constexpr size_t kMostMemoryBytes = 227 * 1024;
  static_assert(kMemoryBytes <= kMostMemoryBytes);
  launch("grouped_mlp", &grouped_product<T, kProduct, kTiles, kMaxRows, kStages>, num_blocks, kProductThreads,
         kMemoryBytes, stream, arguments);
}

template <typename T, Product kProduct>
void launch_product(const ProductArguments& arguments, int num_blocks, cudaStream_t stream) {
  if (arguments.max_rows_per_tile <= kHopperFewTileRows) {
    launch_with_tiles<T, kProduct, Tiles::kTall, kHopperFewTileRows, 5>(arguments, num_blocks, stream);
  } else if constexpr (kIsScaled<T>) {
    launch_with_tiles<T, kProduct, Tiles::kTall, kHopperFloat8TileRows, 4>(arguments, num_blocks, stream);
  } else if (arguments.max_rows_per_tile <= kHopperTallTileRows) {
    launch_with_tiles<T, kProduct, Tiles::kTall, kHopperTallTileRows, 4>(arguments, num_blocks, stream);
  } else {
    launch_with_tiles<T, kProduct, Tiles::kWide, kHopperMaxTileRows, 4>(arguments, num_blocks, stream);
  }
}

template <typename T>
void launch_grouped_product(Product product, const ProductArguments& arguments, int num_blocks, cudaStream_t stream) {
  if (product == Product::kGateUp) {
    launch_product<T, Product::kGateUp>(arguments, num_blocks, stream);
  } else {
    launch_product<T, Product::kDown>(arguments, num_blocks, stream);
  }
}

}  // namespace zexpert::cuda
