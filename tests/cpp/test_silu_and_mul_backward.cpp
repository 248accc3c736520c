// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul_backward.h"

#include <gtest/gtest.h>

#include "testing.h"
#include "zexpert/silu_and_mul.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class SiluAndMulBackward : public ::testing::Test {
 protected:
  static SiluAndMulBackwardParams params_for(Rows<T>& grad_out, Rows<T>& gate_up, Rows<T>& grad_gate_up, Rows<T>* out,
                                             int64_t num_rows, int64_t size) {
    SiluAndMulBackwardParams params;
    params.grad_out = grad_out.data();
    params.gate_up = gate_up.data();
    params.grad_gate_up = grad_gate_up.data();
    params.out = out != nullptr ? out->data() : nullptr;
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = num_rows;
    params.intermediate_size = size;
    params.grad_out_row_stride = grad_out.stride();
    params.gate_up_row_stride = gate_up.stride();
    params.grad_gate_up_row_stride = grad_gate_up.stride();
    params.out_row_stride = out != nullptr ? out->stride() : 0;
    return params;
  }
};
TYPED_TEST_SUITE(SiluAndMulBackward, FloatingTypes);

/// Holds a gradient against its exact value: a handful of operations, and an exponential good to two units, in the
/// accumulation type, then one rounding to T.
template <typename T>
void expect_gradient(T actual, double expected, double magnitude) {
  EXPECT_TRUE(is_rounded_sum(actual, expected, magnitude, 8));
}

TYPED_TEST(SiluAndMulBackward, EverySize) {
  using T = TypeParam;
  Random random;
  for (const int64_t size : {1, 7, 100, 129, 512}) {
    for (const int64_t num_rows : {0, 1, 7}) {
      Rows<T> grad_out(num_rows + 1, size, size + 3);
      Rows<T> gate_up(num_rows + 1, 2 * size, 2 * size + 5);
      Rows<T> grad_gate_up(num_rows + 1, 2 * size, 2 * size + 2);
      Rows<T> out(num_rows + 1, size, size + 1);
      grad_out.randomize(random);
      gate_up.randomize(random, 4);
      silu_and_mul_backward_cpu(this->params_for(grad_out, gate_up, grad_gate_up, &out, num_rows, size));

      EXPECT_TRUE(grad_gate_up.untouched_outside(0, num_rows));
      EXPECT_TRUE(out.untouched_outside(0, num_rows));
      for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t i = 0; i < size; ++i) {
          const auto gradient = static_cast<double>(grad_out.row(r)[i]);
          const auto gate = static_cast<double>(gate_up.row(r)[i]);
          const auto up = static_cast<double>(gate_up.row(r)[size + i]);
          const double s = 1 / (1 + std::exp(-gate));
          expect_gradient(grad_gate_up.row(r)[i], gradient * up * s * (1 + gate * (1 - s)),
                          std::abs(gradient * up) * s * (1 + std::abs(gate)));
          expect_gradient(grad_gate_up.row(r)[size + i], gradient * gate * s, std::abs(gradient * gate) * s);
        }
      }
    }
  }
}

TYPED_TEST(SiluAndMulBackward, GivesTheForwardsResultBitForBit) {
  using T = TypeParam;
  constexpr int64_t kRows = 5;
  constexpr int64_t kSize = 133;
  Random random;
  Rows<T> grad_out(kRows, kSize, kSize);
  Rows<T> gate_up(kRows, 2 * kSize, 2 * kSize);
  Rows<T> grad_gate_up(kRows, 2 * kSize, 2 * kSize);
  Rows<T> out(kRows, kSize, kSize);
  Rows<T> forward_out(kRows, kSize, kSize);
  grad_out.randomize(random);
  gate_up.randomize(random, 30);
  silu_and_mul_backward_cpu(this->params_for(grad_out, gate_up, grad_gate_up, &out, kRows, kSize));

  SiluAndMulParams forward;
  forward.gate_up = gate_up.data();
  forward.out = forward_out.data();
  forward.data_type = TypeTraits<T>::kType;
  forward.num_rows = kRows;
  forward.intermediate_size = kSize;
  forward.gate_up_row_stride = gate_up.stride();
  forward.out_row_stride = forward_out.stride();
  silu_and_mul_cpu(forward);
  EXPECT_TRUE(out == forward_out);
}

TYPED_TEST(SiluAndMulBackward, RowWeights) {
  using T = TypeParam;
  constexpr int64_t kRows = 6;
  constexpr int64_t kSize = 133;
  Random random;
  Rows<T> grad_out(kRows, kSize, kSize);
  Rows<T> gate_up(kRows, 2 * kSize, 2 * kSize);
  Rows<T> grad_gate_up(kRows, 2 * kSize, 2 * kSize);
  Rows<T> out(kRows, kSize, kSize);
  Rows<accumulate_t<T>> grad_row_weight(kRows, 1, 1);
  grad_out.randomize(random);
  gate_up.randomize(random, 2);
  auto row_weight = random.normal<accumulate_t<T>>(kRows);
  row_weight[1] = 0;
  auto params = this->params_for(grad_out, gate_up, grad_gate_up, &out, kRows, kSize);
  params.row_weight = row_weight.data();
  params.grad_row_weight = grad_row_weight.data();
  silu_and_mul_backward_cpu(params);
  for (int64_t r = 0; r < kRows; ++r) {
    const auto weight = static_cast<double>(row_weight[static_cast<size_t>(r)]);
    double dot = 0;
    double dot_magnitude = 0;
    for (int64_t i = 0; i < kSize; ++i) {
      const auto gradient = static_cast<double>(grad_out.row(r)[i]);
      const auto gate = static_cast<double>(gate_up.row(r)[i]);
      const auto up = static_cast<double>(gate_up.row(r)[kSize + i]);
      const double s = 1 / (1 + std::exp(-gate));
      const double silu = gate * s;
      dot += gradient * silu * up;
      dot_magnitude += std::abs(gradient * silu * up);
      expect_gradient(grad_gate_up.row(r)[i], weight * gradient * up * s * (1 + gate * (1 - s)),
                      std::abs(weight * gradient * up) * s * (1 + std::abs(gate)));
      expect_gradient(grad_gate_up.row(r)[kSize + i], weight * gradient * silu, std::abs(weight * gradient * silu));
      expect_gradient(out.row(r)[i], weight * silu * up, std::abs(weight * silu * up));
    }
    EXPECT_TRUE(is_rounded_sum(*grad_row_weight.row(r), dot, dot_magnitude, kSize + 8)) << "row " << r;
  }
}

TYPED_TEST(SiluAndMulBackward, InPlaceAndThreadsChangeNoBit) {
  using T = TypeParam;
  constexpr int64_t kRows = 67;
  constexpr int64_t kSize = 515;
  Random random;
  Rows<T> grad_out(kRows, kSize, kSize);
  Rows<T> gate_up(kRows, 2 * kSize, 2 * kSize);
  Rows<T> serial(kRows, 2 * kSize, 2 * kSize);
  grad_out.randomize(random);
  gate_up.randomize(random);
  silu_and_mul_backward_cpu(this->params_for(grad_out, gate_up, serial, nullptr, kRows, kSize));
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    Rows<T> in_place = gate_up;
    silu_and_mul_backward_cpu(this->params_for(grad_out, in_place, in_place, nullptr, kRows, kSize));
    EXPECT_TRUE(in_place == serial) << threads << " threads";
  }
}

TYPED_TEST(SiluAndMulBackward, LargeGatesSaturate) {
  using T = TypeParam;
  Rows<T> grad_out(1, 2, 2);
  Rows<T> gate_up(1, 4, 4);
  Rows<T> grad_gate_up(1, 4, 4);
  grad_out.data()[0] = grad_out.data()[1] = static_cast<T>(1.0F);
  const float values[] = {3000.0F, -3000.0F, 2.0F, 2.0F};
  for (int64_t i = 0; i < 4; ++i) gate_up.data()[i] = static_cast<T>(values[i]);
  silu_and_mul_backward_cpu(this->params_for(grad_out, gate_up, grad_gate_up, nullptr, 1, 2));
  EXPECT_EQ(static_cast<double>(grad_gate_up.data()[0]), 2.0);
  EXPECT_EQ(static_cast<double>(grad_gate_up.data()[1]), 0.0);
  EXPECT_EQ(static_cast<double>(grad_gate_up.data()[2]), static_cast<double>(gate_up.data()[0]));
  EXPECT_EQ(static_cast<double>(grad_gate_up.data()[3]), 0.0);
}

}  // namespace
}  // namespace zexpert
