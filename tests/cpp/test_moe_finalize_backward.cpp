// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <numeric>

#include "testing.h"
#include "zexpert/moe_finalize.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// The arguments of one call. Slots name rows as a plan does, every fourth names none, and three rows have no slot.
template <typename T>
struct Call {
  using Weight = accumulate_t<T>;

  Call(Random& random, int64_t tokens, int64_t k, int64_t hidden)
      : num_tokens(tokens),
        top_k(k),
        hidden_size(hidden),
        num_rows(tokens * k + 3),
        grad_out(tokens, hidden, hidden + 1),
        rows(num_rows, hidden, hidden + 4),
        hidden_states(tokens, hidden, hidden + 5),
        slot_rows(static_cast<size_t>(tokens * k)),
        topk_weights(random.normal<Weight>(tokens * k)),
        zero_weight(random.normal<Weight>(tokens)),
        grad_rows(num_rows, hidden, hidden),
        grad_topk_weights(tokens, k, k),
        grad_hidden_states(tokens, hidden, hidden),
        grad_zero_weight(tokens, 1, 1),
        workspace(static_cast<size_t>(num_rows), 0x5a) {
    grad_out.randomize(random);
    rows.randomize(random);
    hidden_states.randomize(random);
    std::iota(slot_rows.begin(), slot_rows.end(), 1);
    std::shuffle(slot_rows.begin(), slot_rows.end(), std::mt19937(7));
    for (size_t slot = 1; slot < slot_rows.size(); slot += 4) slot_rows[slot] = -1;
  }

  MoeFinalizeBackwardParams params() {
    MoeFinalizeBackwardParams params;
    params.grad_out = grad_out.data();
    params.rows = rows.data();
    params.slot_rows = slot_rows.data();
    params.topk_weights = topk_weights.data();
    params.hidden_states = hidden_states.data();
    params.zero_weight = zero_weight.data();
    params.grad_rows = grad_rows.data();
    params.grad_topk_weights = grad_topk_weights.data();
    params.grad_hidden_states = grad_hidden_states.data();
    params.grad_zero_weight = grad_zero_weight.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.grad_out_row_stride = grad_out.stride();
    params.rows_row_stride = rows.stride();
    params.hidden_row_stride = hidden_states.stride();
    EXPECT_EQ(moe_finalize_backward_cpu_workspace_bytes(params), static_cast<int64_t>(workspace.size()));
    params.workspace = workspace.data();
    return params;
  }

  bool same_gradients(const Call& other) const {
    return grad_rows == other.grad_rows && grad_topk_weights == other.grad_topk_weights &&
           grad_hidden_states == other.grad_hidden_states && grad_zero_weight == other.grad_zero_weight;
  }

  int64_t num_tokens, top_k, hidden_size, num_rows;
  Rows<T> grad_out, rows, hidden_states;
  std::vector<int32_t> slot_rows;
  std::vector<Weight> topk_weights, zero_weight;
  Rows<T> grad_rows;
  Rows<Weight> grad_topk_weights;
  Rows<T> grad_hidden_states;
  Rows<Weight> grad_zero_weight;
  std::vector<char> workspace;
};

/// target = weight * gradient, and sum = <gradient, row>.
template <typename T>
void expect_scaled_and_dotted(const T* gradient, accumulate_t<T> weight, const T* row, int64_t size, const T* target,
                              accumulate_t<T> sum) {
  double dot = 0;
  double magnitude = 0;
  for (int64_t h = 0; h < size; ++h) {
    const double scaled = static_cast<double>(weight) * static_cast<double>(gradient[h]);
    const double product = static_cast<double>(gradient[h]) * static_cast<double>(row[h]);
    EXPECT_TRUE(is_rounded_sum(target[h], scaled, std::abs(scaled), 1)) << "column " << h << " of " << size;
    dot += product;
    magnitude += std::abs(product);
  }
  EXPECT_TRUE(is_rounded_sum(sum, dot, magnitude, size)) << size << " columns";
}

template <typename T>
class MoeFinalizeBackward : public ::testing::Test {};
TYPED_TEST_SUITE(MoeFinalizeBackward, FloatingTypes);

TYPED_TEST(MoeFinalizeBackward, EverySize) {
  using T = TypeParam;
  Random random;
  for (const int64_t hidden_size : {1, 7, 200, 257, 1024}) {
    for (const int64_t num_tokens : {0, 1, 7}) {
      for (const int64_t top_k : {0, 1, 5}) {
        Call<T> call(random, num_tokens, top_k, hidden_size);
        std::vector<bool> named(static_cast<size_t>(call.num_rows));
        moe_finalize_backward_cpu(call.params());
        for (int64_t t = 0; t < num_tokens; ++t) {
          for (int64_t k = 0; k < top_k; ++k) {
            const auto slot = static_cast<size_t>(t * top_k + k);
            const int32_t row = call.slot_rows[slot];
            if (row < 0) {
              EXPECT_EQ(call.grad_topk_weights.row(t)[k], 0);
              continue;
            }
            named[static_cast<size_t>(row)] = true;
            expect_scaled_and_dotted(call.grad_out.row(t), call.topk_weights[slot], call.rows.row(row), hidden_size,
                                     call.grad_rows.row(row), call.grad_topk_weights.row(t)[k]);
          }
          expect_scaled_and_dotted(call.grad_out.row(t), call.zero_weight[static_cast<size_t>(t)],
                                   call.hidden_states.row(t), hidden_size, call.grad_hidden_states.row(t),
                                   *call.grad_zero_weight.row(t));
        }
        for (int64_t row = 0; row < call.num_rows; ++row) {
          for (int64_t h = 0; h < hidden_size && !named[static_cast<size_t>(row)]; ++h) {
            EXPECT_EQ(static_cast<double>(call.grad_rows.row(row)[h]), 0.0) << "row " << row << " has no slot";
          }
        }
      }
    }
  }
}

TYPED_TEST(MoeFinalizeBackward, ThreadsChangeNoBit) {
  using T = TypeParam;
  Random random;
  Call<T> serial(random, 67, 5, 515);
  Call<T> threaded = serial;
  moe_finalize_backward_cpu(serial.params());
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    moe_finalize_backward_cpu(threaded.params());
    EXPECT_TRUE(threaded.same_gradients(serial)) << threads << " threads";
  }
}

TYPED_TEST(MoeFinalizeBackward, ReadsNoRowWithoutASlot) {
  using T = TypeParam;
  Random random;
  Call<T> clean(random, 7, 3, 19);
  Call<T> poisoned = clean;
  for (const int64_t row : {int64_t{0}, clean.num_rows - 1}) {
    std::fill_n(poisoned.rows.row(row), 19, static_cast<T>(std::numeric_limits<float>::quiet_NaN()));
  }
  moe_finalize_backward_cpu(clean.params());
  moe_finalize_backward_cpu(poisoned.params());
  EXPECT_TRUE(poisoned.same_gradients(clean));
}

TYPED_TEST(MoeFinalizeBackward, TheGradientOfHiddenStatesIsOptional) {
  using T = TypeParam;
  Random random;
  for (const int64_t top_k : {0, 3}) {
    Call<T> whole(random, 7, top_k, 257);
    Call<T> without = whole;
    moe_finalize_backward_cpu(whole.params());
    auto params = without.params();
    params.grad_hidden_states = nullptr;
    params.zero_weight = nullptr;
    moe_finalize_backward_cpu(params);
    EXPECT_TRUE(without.grad_hidden_states.untouched());
    EXPECT_TRUE(without.grad_zero_weight == whole.grad_zero_weight);
    EXPECT_TRUE(without.grad_rows == whole.grad_rows);
    EXPECT_TRUE(without.grad_topk_weights == whole.grad_topk_weights);
  }
}

TYPED_TEST(MoeFinalizeBackward, RefusesBadRowsAndWritesNothing) {
  using T = TypeParam;
  Random random;
  const auto refuses = [&](int32_t row, const std::string& message) {
    Call<T> call(random, 2, 3, 8);
    call.slot_rows = {4, -1, 2, 0, row, 3};
    EXPECT_EQ(error_of([&] { moe_finalize_backward_cpu(call.params()); }), message);
    EXPECT_TRUE(call.grad_rows.untouched() && call.grad_topk_weights.untouched());
    EXPECT_TRUE(call.grad_hidden_states.untouched() && call.grad_zero_weight.untouched());
  };
  refuses(9, "slot_rows must be in [-1, 9), got 9");
  refuses(-2, "slot_rows must be in [-1, 9), got -2");
  refuses(2, "slot_rows must name every row at most once, got 2 twice");
}

}  // namespace
}  // namespace zexpert
