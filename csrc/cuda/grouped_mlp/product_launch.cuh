// SPDX-License-Identifier: Apache-2.0
// launch_grouped_product for the source files that instantiate it.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/grouped_mlp/product_kernel.cuh"
#include "cuda/grouped_mlp/product_launch.h"
#include "cuda/launch.cuh"
#include "zexpert/grouped_mlp.h"

namespace zexpert::cuda {

template <typename T, Product kProduct, Tiles kTiles, int kCluster, int kMaxRows, int kStages>
void launch_with_tiles(const ProductArguments& arguments, int num_blocks, cudaStream_t stream) {
  constexpr size_t kMemoryBytes = sizeof(ProductMemory<T, kTiles, kMaxRows, kStages>) + kSwizzleBytes;  // to align it
  constexpr size_t kMostMemoryBytes = 227 * 1024;
  static_assert(kMemoryBytes <= kMostMemoryBytes);
  const auto kernel = &grouped_product<T, kProduct, kTiles, kCluster, kMaxRows, kStages>;
  int num_clusters = num_blocks;
  if constexpr (kCluster > 1) {  // a cluster that has to wait for another would be late with its part of the work
    num_clusters = max_active_clusters("grouped_mlp", kernel, kCluster, kProductThreads, kMemoryBytes);
    if (getenv("ZX_DEBUG")) printf("active clusters %d\n", num_clusters);
    ZEXPERT_CHECK(num_clusters > 0, "grouped_mlp needs clusters of ", kCluster, " multiprocessors, which this GPU lacks");
    num_clusters = std::min(num_clusters, num_blocks / kCluster);
  }
  launch_clusters("grouped_mlp", kernel, int64_t{num_clusters} * kCluster, kCluster, kProductThreads, kMemoryBytes,
                  stream, arguments);
}

template <typename T, Product kProduct>
void launch_product(const ProductArguments& arguments, int num_blocks, cudaStream_t stream) {
  if (arguments.max_rows_per_tile <= kHopperFewTileRows) {
    launch_with_tiles<T, kProduct, Tiles::kTall, 1, kHopperFewTileRows, 5>(arguments, num_blocks, stream);
  } else if constexpr (kIsScaled<T>) {
    if (arguments.max_rows_per_tile <= kHopperFloat8TileRows) {
      launch_with_tiles<T, kProduct, Tiles::kTall, 1, kHopperFloat8TileRows, 4>(arguments, num_blocks, stream);
    } else {
      launch_with_tiles<T, kProduct, Tiles::kTall, 2, kHopperFloat8TileRows, 4>(arguments, num_blocks, stream);
    }
  } else if (arguments.max_rows_per_tile <= kHopperTallTileRows) {
    launch_with_tiles<T, kProduct, Tiles::kTall, 1, kHopperTallTileRows, 4>(arguments, num_blocks, stream);
  } else if (arguments.max_rows_per_tile <= 288) {
    launch_with_tiles<T, kProduct, Tiles::kWide, 1, 288, 4>(arguments, num_blocks, stream);
  } else {
    launch_with_tiles<T, kProduct, Tiles::kTall, 2, kHopperTallTileRows, 4>(arguments, num_blocks, stream);
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
