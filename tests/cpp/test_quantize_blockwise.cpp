// SPDX-License-Identifier: Apache-2.0
#include "zexpert/quantize_blockwise.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class QuantizeBlockwise : public ::testing::Test {
 protected:
  static QuantizeBlockwiseParams params_for(Rows<T>& weight, int64_t rows, int64_t columns, int64_t num_matrices,
                                            std::vector<Float8E4M3>& out, std::vector<float>& scale_inv) {
    out.resize(static_cast<size_t>(num_matrices * rows * columns));
    scale_inv.resize(static_cast<size_t>(num_matrices * num_scale_blocks(rows) * num_scale_blocks(columns)));
    QuantizeBlockwiseParams params;
    params.weight = weight.data();
    params.out = out.data();
    params.scale_inv = scale_inv.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_matrices = num_matrices;
    params.num_rows = rows;
    params.num_columns = columns;
    params.weight_matrix_stride = weight.stride();
    return params;
  }
};
TYPED_TEST_SUITE(QuantizeBlockwise, FloatingTypes);

TYPED_TEST(QuantizeBlockwise, EverySize) {
  using T = TypeParam;
  Random random;
  for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 130}, {128, 128}, {300, 7}}) {
    for (const int64_t threads : {1, 3}) {
      const ScopedThreads scope(threads);
      Rows<T> weight(2, rows * columns, rows * columns + 5);
      weight.randomize(random);
      std::vector<Float8E4M3> out;
      std::vector<float> scale_inv;
      quantize_blockwise_cpu(this->params_for(weight, rows, columns, 2, out, scale_inv));

      const int64_t row_blocks = num_scale_blocks(rows);
      const int64_t column_blocks = num_scale_blocks(columns);
      std::vector<float> largest(scale_inv.size(), 0.0F);
      const auto block_of = [&](int64_t m, int64_t r, int64_t c) {
        return static_cast<size_t>((m * row_blocks + r / kScaleBlock) * column_blocks + c / kScaleBlock);
      };
      const auto for_each = [&](const auto& fn) {
        for (int64_t m = 0; m < 2; ++m) {
          for (int64_t i = 0; i < rows * columns; ++i) {
            fn(block_of(m, i / columns, i % columns), static_cast<float>(weight.row(m)[i]),
               out[static_cast<size_t>(m * rows * columns + i)]);
          }
        }
      };
      for_each(
          [&](size_t block, float value, Float8E4M3) { largest[block] = std::max(largest[block], std::abs(value)); });
      for (size_t block = 0; block < scale_inv.size(); ++block) EXPECT_EQ(scale_inv[block], largest[block] / 448);
      for_each([&](size_t block, float value, Float8E4M3 code) {
        EXPECT_EQ(code.bits, Float8E4M3(value / scale_inv[block]).bits);
      });
    }
  }
}

TYPED_TEST(QuantizeBlockwise, RefusesWhatIsNotFiniteAndWritesNothing) {
  using T = TypeParam;
  for (const double value : {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    Rows<T> weight(1, 200, 200);
    std::fill_n(weight.data(), 200, static_cast<T>(1.0));
    weight.data()[60] = static_cast<T>(-value);
    std::vector<Float8E4M3> out;
    std::vector<float> scale_inv;
    const auto params = this->params_for(weight, 2, 100, 1, out, scale_inv);
    EXPECT_EQ(error_of([&] { quantize_blockwise_cpu(params); }),
              std::string("weight must be finite, got ") + (std::isnan(value) ? "nan" : "inf"));
    for (const float scale : scale_inv) EXPECT_EQ(scale, 0);
    for (const Float8E4M3 code : out) EXPECT_EQ(code.bits, 0);
  }
}

TEST(QuantizeBlockwiseParams, BadParams) {
  QuantizeBlockwiseParams params;
  quantize_blockwise_cpu(params);  // nothing to do
  params.num_matrices = params.num_rows = params.num_columns = 1;
  EXPECT_EQ(error_of([&] { quantize_blockwise_cpu(params); }), "weight must not be null");
  params.num_rows = -1;
  EXPECT_EQ(error_of([&] { quantize_blockwise_cpu(params); }), "num_rows must not be negative, got -1");
}

}  // namespace
}  // namespace zexpert
