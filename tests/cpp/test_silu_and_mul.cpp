// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

double silu(double x) { return x / (1 + std::exp(-x)); }

template <typename T>
class SiluAndMul : public ::testing::Test {
 protected:
  static SiluAndMulParams params_for(const Rows<T>& gate_up, Rows<T>& out, int64_t num_rows, int64_t size) {
    SiluAndMulParams params;
    params.gate_up = gate_up.row(0);
    params.out = out.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = num_rows;
    params.intermediate_size = size;
    params.gate_up_row_stride = gate_up.stride();
    params.out_row_stride = out.stride();
    return params;
  }
};
TYPED_TEST_SUITE(SiluAndMul, FloatingTypes);

TYPED_TEST(SiluAndMul, EverySize) {
  using T = TypeParam;
  Random random;
  for (const int64_t size : {1, 7, 200, 257, 1024}) {
    for (const int64_t num_rows : {0, 1, 7}) {
      Rows<T> gate_up(num_rows + 2, 2 * size, 2 * size + 3);
      Rows<T> out(num_rows + 2, size, size + 1);
      gate_up.randomize(random, 3);
      silu_and_mul_cpu(this->params_for(gate_up, out, num_rows, size));

      EXPECT_TRUE(out.untouched_outside(0, num_rows));
      for (int64_t r = 0; r < num_rows; ++r) {
        for (int64_t f = 0; f < size; ++f) {
          const double expected =
              silu(static_cast<double>(gate_up.row(r)[f])) * static_cast<double>(gate_up.row(r)[size + f]);
          // The exponential is within two units in the last place, the operations around it within half of one each.
          EXPECT_TRUE(is_rounded_sum(out.row(r)[f], expected, std::abs(expected), 4))
              << "row " << r << ", column " << f;
        }
      }
    }
  }
}

TYPED_TEST(SiluAndMul, ExtremeGates) {
  using T = TypeParam;
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> gates = {0.0, -0.0, 60000, -60000, 87.5, -87.5, -100, -104, kInfinity, kNan, -kInfinity};
  const auto size = static_cast<int64_t>(gates.size());
  Rows<T> gate_up(1, 2 * size, 2 * size);
  Rows<T> out(1, size, size);
  for (int64_t f = 0; f < size; ++f) {
    gate_up.row(0)[f] = static_cast<T>(gates[static_cast<size_t>(f)]);
    gate_up.row(0)[size + f] = static_cast<T>(1.0);
  }
  silu_and_mul_cpu(this->params_for(gate_up, out, 1, size));

  const auto result = [&](int64_t f) { return static_cast<double>(out.row(0)[f]); };
  EXPECT_EQ(result(0), 0);
  EXPECT_EQ(result(1), 0);
  EXPECT_EQ(result(2), static_cast<double>(static_cast<T>(60000.0)));
  EXPECT_EQ(result(3), 0);
  EXPECT_EQ(result(4), 87.5);
  for (const int64_t f : {5, 6, 7}) {
    EXPECT_LE(result(f), 0);
    EXPECT_GE(result(f), -1e-35);
  }
  EXPECT_EQ(result(8), kInfinity);
  EXPECT_TRUE(std::isnan(result(9)));
  EXPECT_TRUE(std::isnan(result(10))) << "silu(-inf) is NaN, as torch.nn.functional.silu has it";
}

TYPED_TEST(SiluAndMul, ThreadsAndBatchChangeNoBit) {
  using T = TypeParam;
  constexpr int64_t kRows = 61;
  constexpr int64_t kSize = 517;
  Random random;
  Rows<T> gate_up(kRows, 2 * kSize, 2 * kSize);
  gate_up.randomize(random);
  Rows<T> one_by_one(kRows, kSize, kSize);
  for (int64_t r = 0; r < kRows; ++r) {
    auto params = this->params_for(gate_up, one_by_one, 1, kSize);
    params.gate_up = gate_up.row(r);
    params.out = one_by_one.row(r);
    silu_and_mul_cpu(params);
  }
  for (const int64_t threads : {1, 2, 5}) {
    const ScopedThreads scope(threads);
    Rows<T> out(kRows, kSize, kSize);
    silu_and_mul_cpu(this->params_for(gate_up, out, kRows, kSize));
    EXPECT_TRUE(out == one_by_one) << threads << " threads";
  }
}

TYPED_TEST(SiluAndMul, HugeStrides) {
  using T = TypeParam;
  SparseMemory<T> gate_up(kHugeStride + 10);
  SparseMemory<T> out(kHugeStride + 5);
  if (!gate_up.available() || !out.available()) {
    GTEST_SKIP() << "no address space for rows this far apart";
  }
  Random random;
  random.fill(gate_up.data() + kHugeStride, 10);
  SiluAndMulParams params;
  params.gate_up = gate_up.data();
  params.out = out.data();
  params.data_type = TypeTraits<T>::kType;
  params.num_rows = 2;
  params.intermediate_size = 5;
  params.gate_up_row_stride = kHugeStride;
  params.out_row_stride = kHugeStride;
  silu_and_mul_cpu(params);
  for (int64_t f = 0; f < 5; ++f) {
    const T* row = gate_up.data() + kHugeStride;
    const double expected = silu(static_cast<double>(row[f])) * static_cast<double>(row[5 + f]);
    EXPECT_TRUE(is_rounded_sum(out.data()[kHugeStride + f], expected, std::abs(expected), 4));
  }
}

TYPED_TEST(SiluAndMul, RowsPastTheLastOffset) {
  using T = TypeParam;
  Random random;
  Rows<T> gate_up(7, 40, 40);
  Rows<T> out(7, 20, 20);
  gate_up.randomize(random);
  for (const int32_t last_offset : {0, 3, 7}) {
    Rows<T> all(7, 20, 20);
    silu_and_mul_cpu(this->params_for(gate_up, all, 7, 20));
    Rows<T> some(7, 20, 20);
    auto params = this->params_for(gate_up, some, 7, 20);
    params.last_offset = &last_offset;
    silu_and_mul_cpu(params);
    EXPECT_TRUE(some.untouched_outside(0, last_offset));
    for (int64_t i = 0; i < last_offset * 20; ++i) {
      EXPECT_EQ(static_cast<double>(some.data()[i]), static_cast<double>(all.data()[i]));
    }
  }
  for (const int32_t last_offset : {-1, 8}) {
    auto params = this->params_for(gate_up, out, 7, 20);
    params.last_offset = &last_offset;
    EXPECT_THROW(silu_and_mul_cpu(params), Error);
    EXPECT_TRUE(out.untouched_outside(0, 0));
  }
}

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

TYPED_TEST(SiluAndMulBackward, RowsPastTheLastOffsetHaveNoGradient) {
  using T = TypeParam;
  Random random;
  Rows<T> grad_out(7, 20, 20);
  Rows<T> gate_up(7, 40, 40);
  Rows<T> grad_gate_up(7, 40, 40);
  Rows<T> out(7, 20, 20);
  Rows<accumulate_t<T>> grad_row_weight(7, 1, 1);
  grad_out.randomize(random);
  gate_up.randomize(random);
  const int32_t last_offset = 3;
  auto params = this->params_for(grad_out, gate_up, grad_gate_up, &out, 7, 20);
  params.grad_row_weight = grad_row_weight.data();
  params.last_offset = &last_offset;
  silu_and_mul_backward_cpu(params);
  EXPECT_TRUE(out.untouched_outside(0, last_offset));
  for (int64_t r = last_offset; r < 7; ++r) {
    EXPECT_EQ(*grad_row_weight.row(r), 0);
    for (int64_t i = 0; i < 40; ++i) EXPECT_EQ(static_cast<double>(grad_gate_up.row(r)[i]), 0.0);
  }
}

}  // namespace
}  // namespace zexpert
