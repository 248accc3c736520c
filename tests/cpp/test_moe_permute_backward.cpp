// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "testing.h"
#include "zexpert/moe_permute.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class MoePermuteBackward : public ::testing::Test {
 protected:
  MoePermuteBackwardParams params_for(Rows<T>& grad_rows, const std::vector<int32_t>& row_slots,
                                      Rows<T>& grad_hidden_states, int64_t num_tokens, int64_t top_k,
                                      int64_t hidden_size, const int32_t* slot_rows = nullptr) {
    MoePermuteBackwardParams params;
    params.grad_rows = grad_rows.data();
    params.row_slots = row_slots.data();
    params.grad_hidden_states = grad_hidden_states.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = static_cast<int64_t>(row_slots.size());
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.grad_rows_row_stride = grad_rows.stride();
    params.slot_rows = slot_rows;
    workspace_.assign(static_cast<size_t>(moe_permute_backward_cpu_workspace_bytes(params)) / sizeof(int32_t),
                      0x5a5a5a5a);
    params.workspace = workspace_.data();
    return params;
  }

 private:
  std::vector<int32_t> workspace_;
};
TYPED_TEST_SUITE(MoePermuteBackward, FloatingTypes);

TYPED_TEST(MoePermuteBackward, SumsEveryTokensRows) {
  using T = TypeParam;
  constexpr int64_t kTopK = 3;
  Random random;
  for (const int64_t hidden_size : {1, 7, 200, 257, 1024}) {
    for (const int64_t num_tokens : {1, 7, 100}) {
      // Slots drawn at random: some tokens have no row, some slots have several.
      const auto num_slots = static_cast<int32_t>(num_tokens * kTopK);
      const auto row_slots = random.integers<int32_t>(num_slots - 2, 0, num_slots - 1);
      Rows<T> grad_rows(num_slots, hidden_size, hidden_size + 5);
      grad_rows.randomize(random);
      for (int64_t row = num_slots - 2; row < num_slots; ++row) {
        std::fill_n(grad_rows.row(row), hidden_size, static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
      }
      Rows<T> serial(num_tokens, hidden_size, hidden_size);
      moe_permute_backward_cpu(this->params_for(grad_rows, row_slots, serial, num_tokens, kTopK, hidden_size));

      EXPECT_TRUE(serial.untouched_outside(0, num_tokens));
      for (int64_t t = 0; t < num_tokens; ++t) {
        for (int64_t h = 0; h < hidden_size; ++h) {
          double sum = 0;
          double magnitude = 0;
          int64_t num_rows = 0;
          for (size_t row = 0; row < row_slots.size(); ++row) {
            if (row_slots[row] / kTopK == t) {
              const auto addend = static_cast<double>(grad_rows.row(static_cast<int64_t>(row))[h]);
              sum += addend;
              magnitude += std::abs(addend);
              ++num_rows;
            }
          }
          EXPECT_TRUE(is_rounded_sum(serial.row(t)[h], sum, magnitude, num_rows)) << "token " << t << ", column " << h;
        }
      }
      for (const int64_t threads : {2, 5}) {
        const ScopedThreads scope(threads);
        Rows<T> threaded(num_tokens, hidden_size, hidden_size);
        moe_permute_backward_cpu(this->params_for(grad_rows, row_slots, threaded, num_tokens, kTopK, hidden_size));
        EXPECT_TRUE(threaded == serial) << threads << " threads";
      }
    }
  }
}

TYPED_TEST(MoePermuteBackward, GivenSlotRowsAreReadInPlaceOfRowSlots) {
  using T = TypeParam;
  constexpr int64_t kTokens = 7;
  constexpr int64_t kTopK = 3;
  constexpr int64_t kHidden = 257;
  Random random;
  const std::vector<int32_t> row_slots = {20, 3, 4, 0, 11, 19, 7, -1, 99};
  const int32_t last_offset = 7;
  std::vector<int32_t> slot_rows(kTokens * kTopK, -1);
  for (int32_t row = 0; row < last_offset; ++row) {
    slot_rows[static_cast<size_t>(row_slots[static_cast<size_t>(row)])] = row;
  }
  Rows<T> grad_rows(9, kHidden, kHidden);
  grad_rows.randomize(random);
  Rows<T> inverted(kTokens, kHidden, kHidden);
  auto params = this->params_for(grad_rows, row_slots, inverted, kTokens, kTopK, kHidden);
  params.last_offset = &last_offset;
  moe_permute_backward_cpu(params);
  Rows<T> given(kTokens, kHidden, kHidden);
  params = this->params_for(grad_rows, row_slots, given, kTokens, kTopK, kHidden, slot_rows.data());
  params.last_offset = &last_offset;
  EXPECT_EQ(moe_permute_backward_cpu_workspace_bytes(params), 0);
  params.workspace = nullptr;
  moe_permute_backward_cpu(params);
  EXPECT_TRUE(given == inverted);

  slot_rows[5] = last_offset;
  Rows<T> untouched(kTokens, kHidden, kHidden);
  params.grad_hidden_states = untouched.data();
  EXPECT_EQ(error_of([&] { moe_permute_backward_cpu(params); }), "slot_rows must be in [-1, 7), got 7");
  EXPECT_TRUE(untouched.untouched());
}

TYPED_TEST(MoePermuteBackward, NoRowsGiveZeros) {
  using T = TypeParam;
  Rows<T> grad_rows(2, 9, 9);
  Rows<T> grad_hidden_states(2, 9, 9);
  moe_permute_backward_cpu(this->params_for(grad_rows, {}, grad_hidden_states, 2, 1, 9));
  for (int64_t i = 0; i < 18; ++i) EXPECT_EQ(static_cast<double>(grad_hidden_states.data()[i]), 0.0);

  Rows<T> nothing(0, 9, 9);
  moe_permute_backward_cpu(this->params_for(nothing, {}, nothing, 0, 1, 9));
  EXPECT_TRUE(nothing.untouched());
}

TYPED_TEST(MoePermuteBackward, RefusesSlotsOutOfRangeAndWritesNothing) {
  using T = TypeParam;
  for (const int32_t bad : {-1, 12, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Rows<T> grad_rows(3, 8, 8);
    Rows<T> grad_hidden_states(4, 8, 8);
    const std::vector<int32_t> row_slots = {0, 11, bad};
    const auto params = this->params_for(grad_rows, row_slots, grad_hidden_states, 4, 3, 8);
    EXPECT_EQ(error_of([&] { moe_permute_backward_cpu(params); }),
              "row_slots must be in [0, 12) below the last offset, got " + std::to_string(bad));
    EXPECT_TRUE(grad_hidden_states.untouched());
  }
}

}  // namespace
}  // namespace zexpert
