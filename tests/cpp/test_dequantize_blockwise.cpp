// SPDX-License-Identifier: Apache-2.0
#include "zexpert/dequantize_blockwise.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class DequantizeBlockwise : public ::testing::Test {};
TYPED_TEST_SUITE(DequantizeBlockwise, FloatingTypes);

TYPED_TEST(DequantizeBlockwise, EverySize) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  constexpr int64_t kMatrices = 2;
  Random random;
  for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 147}, {128, 128}, {300, 7}}) {
    for (const int64_t threads : {1, 3}) {
      const ScopedThreads scope(threads);
      const int64_t blocks = num_scale_blocks(rows) * num_scale_blocks(columns);
      const int64_t matrix_stride = rows * columns + 3;
      const int64_t scale_stride = blocks + 1;
      const std::vector<uint8_t> codes = [&] {
        std::vector<uint8_t> result;
        for (const int32_t code : random.integers<int32_t>(kMatrices * matrix_stride, 0, 255)) {
          result.push_back(static_cast<uint8_t>((code & 0x7f) == 0x7f ? 0 : code));
        }
        return result;
      }();
      std::vector<float> scales = random.normal<float>(kMatrices * scale_stride);
      for (float& scale : scales) scale = std::abs(scale);
      Rows<T> out(kMatrices, rows * columns, rows * columns);
      DequantizeBlockwiseParams params;
      params.weight = codes.data();
      params.scale_inv = scales.data();
      params.out = out.data();
      params.data_type = TypeTraits<T>::kType;
      params.num_matrices = kMatrices;
      params.num_rows = rows;
      params.num_columns = columns;
      params.weight_matrix_stride = matrix_stride;
      params.scale_matrix_stride = scale_stride;
      dequantize_blockwise_cpu(params);

      EXPECT_TRUE(out.untouched_outside(0, kMatrices));
      for (int64_t m = 0; m < kMatrices; ++m) {
        for (int64_t i = 0; i < rows * columns; ++i) {
          Float8E4M3 code;
          code.bits = codes[static_cast<size_t>(m * matrix_stride + i)];
          const int64_t block = i / columns / kScaleBlock * num_scale_blocks(columns) + i % columns / kScaleBlock;
          const auto scale = static_cast<A>(scales[static_cast<size_t>(m * scale_stride + block)]);
          EXPECT_EQ(static_cast<double>(out.row(m)[i]),
                    static_cast<double>(static_cast<T>(static_cast<A>(static_cast<float>(code)) * scale)));
        }
      }
    }
  }
}

TEST(DequantizeBlockwiseParams, BadParams) {
  DequantizeBlockwiseParams params;
  dequantize_blockwise_cpu(params);  // nothing to do
  params.num_matrices = params.num_rows = params.num_columns = 1;
  EXPECT_EQ(error_of([&] { dequantize_blockwise_cpu(params); }), "weight must not be null");
  params.num_columns = -1;
  EXPECT_EQ(error_of([&] { dequantize_blockwise_cpu(params); }), "num_columns must not be negative, got -1");
}

}  // namespace
}  // namespace zexpert
