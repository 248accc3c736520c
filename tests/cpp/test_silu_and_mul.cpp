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

}  // namespace
}  // namespace zexpert
