// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by dequantize_blockwise.cpp through for_each_isa.h.

// Below this many elements a range costs less than waking a thread.
constexpr int64_t kGrainElements = 32768;

template <typename T>
void dequantize_blockwise(const DequantizeBlockwiseParams& params) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t num_rows = params.num_rows;
  const int64_t size = params.num_columns;
  const int64_t scales_per_row = num_scale_blocks(size);
  const int64_t grain_size = std::max<int64_t>(kGrainElements / size, 1);
  parallel_for(0, params.num_matrices * num_rows, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t matrix = index / num_rows;
      const int64_t row = index % num_rows;
      const Float8E4M3* source =
          static_cast<const Float8E4M3*>(params.weight) + matrix * params.weight_matrix_stride + row * size;
      const float* scales = params.scale_inv + matrix * params.scale_matrix_stride + row / kScaleBlock * scales_per_row;
      T* target = static_cast<T*>(params.out) + index * size;
      for (int64_t block = 0; block < scales_per_row; ++block) {
        const V scale = V::broadcast(static_cast<A>(scales[block]));
        const int64_t block_end = std::min((block + 1) * kScaleBlock, size);
        int64_t i = block * kScaleBlock;
        for (; i + V::kWidth <= block_end; i += V::kWidth) (V::load(source + i) * scale).store(target + i);
        if (i < block_end) {
          (V::load_partial(source + i, block_end - i, 0) * scale).store_partial(target + i, block_end - i);
        }
      }
    }
  });
}
