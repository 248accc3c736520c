// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class MoePermute : public ::testing::Test {
 protected:
  static MoePermuteParams params_for(const Rows<T>& hidden_states, const std::vector<int32_t>& row_slots, Rows<T>& rows,
                                     int64_t num_tokens, int64_t top_k, int64_t hidden_size) {
    MoePermuteParams params;
    params.hidden_states = hidden_states.row(0);
    params.row_slots = row_slots.data();
    params.rows = rows.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = static_cast<int64_t>(row_slots.size());
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.hidden_row_stride = hidden_states.stride();
    return params;
  }
};
TYPED_TEST_SUITE(MoePermute, FloatingTypes);

TYPED_TEST(MoePermute, CopiesEveryBit) {
  using T = TypeParam;
  constexpr int64_t kTopK = 3;
  Random random;
  for (const int64_t hidden_size : {1, 7, 200, 257, 1024}) {
    for (const int64_t num_tokens : {1, 7, 300}) {
      for (const int64_t threads : {1, 2, 5}) {
        const ScopedThreads scope(threads);
        const auto num_slots = static_cast<int32_t>(num_tokens * kTopK);
        const auto row_slots = random.integers<int32_t>(num_slots - 2, 0, num_slots - 1);
        const auto num_rows = static_cast<int64_t>(row_slots.size());
        Rows<T> hidden_states(num_tokens, hidden_size, hidden_size + 5);
        Rows<T> rows(num_slots, hidden_size, hidden_size);
        hidden_states.randomize(random);
        std::memset(static_cast<void*>(hidden_states.row(0)), 0xff, sizeof(T));  // a NaN with bits of its own
        moe_permute_cpu(this->params_for(hidden_states, row_slots, rows, num_tokens, kTopK, hidden_size));

        EXPECT_TRUE(rows.untouched_outside(0, num_rows)) << "rows past the last offset changed";
        for (int64_t r = 0; r < num_rows; ++r) {
          const T* source = hidden_states.row(row_slots[static_cast<size_t>(r)] / kTopK);
          EXPECT_EQ(std::memcmp(rows.row(r), source, static_cast<size_t>(hidden_size) * sizeof(T)), 0) << "row " << r;
        }
      }
    }
  }
}

TYPED_TEST(MoePermute, RowsPastTheLastOffsetAreNotWritten) {
  using T = TypeParam;
  Random random;
  Rows<T> hidden_states(4, 9, 9);
  Rows<T> rows(5, 9, 9);
  hidden_states.randomize(random);
  const std::vector<int32_t> row_slots = {11, 0, 5, -1, 99};
  auto params = this->params_for(hidden_states, row_slots, rows, 4, 3, 9);
  for (const int32_t bad : {-1, 6}) {
    params.last_offset = &bad;
    EXPECT_EQ(error_of([&] { moe_permute_cpu(params); }),
              "expert_offsets must end between 0 and the number of rows (5), got " + std::to_string(bad));
    EXPECT_TRUE(rows.untouched());
  }
  const int32_t last_offset = 3;
  params.last_offset = &last_offset;
  moe_permute_cpu(params);
  EXPECT_TRUE(rows.untouched_outside(0, last_offset));
  for (int64_t r = 0; r < last_offset; ++r) {
    const T* source = hidden_states.row(row_slots[static_cast<size_t>(r)] / 3);
    EXPECT_EQ(std::memcmp(rows.row(r), source, 9 * sizeof(T)), 0) << "row " << r;
  }
}

TYPED_TEST(MoePermute, NothingToDo) {
  using T = TypeParam;
  MoePermuteParams params;
  params.data_type = TypeTraits<T>::kType;
  params.hidden_size = 8;
  params.hidden_row_stride = 8;
  moe_permute_cpu(params);

  Rows<T> hidden_states(2, 0, 4);
  Rows<T> rows(2, 0, 0);
  const std::vector<int32_t> row_slots = {0, 1};
  moe_permute_cpu(this->params_for(hidden_states, row_slots, rows, 2, 1, 0));
  EXPECT_TRUE(rows.untouched());
}

TYPED_TEST(MoePermute, RefusesSlotsOutOfRangeAndWritesNothing) {
  using T = TypeParam;
  for (const int32_t bad : {-1, 12, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Rows<T> hidden_states(4, 8, 8);
    Rows<T> rows(3, 8, 8);
    const std::vector<int32_t> row_slots = {0, 11, bad};
    const auto params = this->params_for(hidden_states, row_slots, rows, 4, 3, 8);
    EXPECT_EQ(error_of([&] { moe_permute_cpu(params); }),
              "row_slots must be in [0, 12) below the last offset, got " + std::to_string(bad));
    EXPECT_TRUE(rows.untouched());
  }
}

TYPED_TEST(MoePermute, HugeStride) {
  using T = TypeParam;
  SparseMemory<T> hidden_states(3 * kHugeStride);
  if (!hidden_states.available()) {
    GTEST_SKIP() << "no address space for rows this far apart";
  }
  Random random;
  for (int64_t t = 0; t < 3; ++t) random.fill(hidden_states.data() + t * kHugeStride, 9);
  const std::vector<int32_t> row_slots = {5, 0, 3};
  Rows<T> rows(3, 9, 9);
  MoePermuteParams params;
  params.hidden_states = hidden_states.data();
  params.row_slots = row_slots.data();
  params.rows = rows.data();
  params.data_type = TypeTraits<T>::kType;
  params.num_rows = 3;
  params.num_tokens = 3;
  params.top_k = 2;
  params.hidden_size = 9;
  params.hidden_row_stride = kHugeStride;
  moe_permute_cpu(params);
  for (int64_t r = 0; r < 3; ++r) {
    const T* source = hidden_states.data() + (row_slots[static_cast<size_t>(r)] / 2) * kHugeStride;
    EXPECT_EQ(std::memcmp(rows.row(r), source, 9 * sizeof(T)), 0) << "row " << r;
  }
}

}  // namespace
}  // namespace zexpert
