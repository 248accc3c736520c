// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by quantize_blockwise.cpp through for_each_isa.h.

constexpr float kLargestFloat8 = 448;
constexpr float kSmallestScale = 0x1p-126F;  // the smallest that is not subnormal

/// Calls fn(block, row, row_size) for the block's part of every row of the blocks of a range; `row` points to weights.
template <typename T, typename Fn>
void for_each_block(const QuantizeBlockwiseParams& params, const Fn& fn) {
  const int64_t row_blocks = num_scale_blocks(params.num_rows);
  const int64_t column_blocks = num_scale_blocks(params.num_columns);
  parallel_for(0, params.num_matrices * row_blocks * column_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t matrix = block / (row_blocks * column_blocks);
      const int64_t first_row = block / column_blocks % row_blocks * kScaleBlock;
      const int64_t first_column = block % column_blocks * kScaleBlock;
      const int64_t last_row = std::min(first_row + kScaleBlock, params.num_rows);
      const int64_t row_size = std::min(kScaleBlock, params.num_columns - first_column);
      const T* source = static_cast<const T*>(params.weight) + matrix * params.weight_matrix_stride + first_column;
      for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t place = (matrix * params.num_rows + row) * params.num_columns + first_column;
        fn(block, source + row * params.num_columns, row_size, place);
      }
    }
  });
}

/// largest_bits[B] = the bits of max |weight[B]| of every block. As integers, the bits of magnitudes have the order of
/// their values, and NaN is the largest.
template <typename T>
void find_largest(const QuantizeBlockwiseParams& params, uint32_t* largest_bits) {
  for_each_block<T>(params, [&](int64_t block, const T* row, int64_t row_size, int64_t) {
    uint32_t largest = largest_bits[block];
    for (int64_t i = 0; i < row_size; ++i) {
      const uint32_t magnitude = detail::bit_cast<uint32_t>(static_cast<float>(row[i])) & 0x7fffffffU;
      largest = std::max(largest, magnitude);
    }
    largest_bits[block] = largest;
  });
}

/// The scale of a block; `largest` is its largest magnitude.
inline float scale_of(float largest) {
  return largest == 0 ? 1.0F : std::max(largest / kLargestFloat8, kSmallestScale);
}

template <typename T>
void quantize_blockwise(const QuantizeBlockwiseParams& params, const uint32_t* largest_bits) {
  for_each_block<T>(params, [&](int64_t block, const T* row, int64_t row_size, int64_t place) {
    const float scale = scale_of(detail::bit_cast<float>(largest_bits[block]));
    params.scale_inv[block] = scale;
    Float8E4M3* target = static_cast<Float8E4M3*>(params.out) + place;
    for (int64_t i = 0; i < row_size; ++i) target[i] = Float8E4M3(static_cast<float>(row[i]) / scale);
  });
}
