// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_idle.h"

#include <gtest/gtest.h>

#include <vector>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class ZeroIdle : public ::testing::Test {};
TYPED_TEST_SUITE(ZeroIdle, FloatingTypes);

TYPED_TEST(ZeroIdle, ExpertsWithoutRows) {
  const std::vector<int32_t> offsets{0, 0, 3, 3, 4};
  std::vector<TypeParam> data(4 * 5, TypeParam(2.0F));
  ZeroIdleExpertsParams params;
  params.data = data.data();
  params.expert_offsets = offsets.data();
  params.data_type = TypeTraits<TypeParam>::kType;
  params.num_experts = 4;
  params.expert_size = 5;
  zero_idle_experts_cpu(params);
  for (size_t i = 0; i < data.size(); ++i) {
    const size_t expert = i / 5;
    EXPECT_EQ(static_cast<double>(data[i]), expert % 2 == 0 ? 0.0 : 2.0) << "element " << i;
  }
}

TYPED_TEST(ZeroIdle, RowsPastTheLastOffset) {
  for (const int32_t last : {-3, 0, 2, 4, 9}) {
    std::vector<TypeParam> data(4 * 3, TypeParam(2.0F));
    ZeroIdleRowsParams params;
    params.data = data.data();
    params.last_offset = &last;
    params.data_type = TypeTraits<TypeParam>::kType;
    params.num_rows = 4;
    params.row_size = 3;
    zero_idle_rows_cpu(params);
    for (size_t i = 0; i < data.size(); ++i) {
      EXPECT_EQ(static_cast<double>(data[i]), static_cast<int32_t>(i / 3) < last ? 2.0 : 0.0) << "element " << i;
    }
  }
}

}  // namespace
}  // namespace zexpert
