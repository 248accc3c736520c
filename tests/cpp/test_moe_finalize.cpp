// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// The arguments of one call, and the scalar loop that says what it must give.
template <typename T>
struct Call {
  using Weight = accumulate_t<T>;

  Call(Random& random, int64_t tokens, int64_t k, int64_t constants, int64_t hidden, bool with_residual)
      : num_tokens(tokens),
        top_k(k),
        num_constants(constants),
        hidden_size(hidden),
        num_rows(tokens * k + 3),
        has_residual(with_residual),
        rows(num_rows, hidden, hidden + 4),
        hidden_states(tokens, hidden, hidden + 5),
        residual(tokens, hidden, hidden + 1),
        constant_vectors(constants, hidden, hidden + 2),
        out(tokens, hidden, hidden),
        slot_rows(random.integers<int32_t>(tokens * k, -1, static_cast<int32_t>(num_rows) - 1)),
        topk_weights(random.normal<Weight>(tokens * k)),
        zero_weight(random.normal<Weight>(tokens)),
        constant_weight(random.normal<Weight>(tokens * constants)) {
    rows.randomize(random);
    hidden_states.randomize(random);
    residual.randomize(random);
    constant_vectors.randomize(random);
  }

  MoeFinalizeParams params() {
    MoeFinalizeParams params;
    params.rows = rows.data();
    params.slot_rows = slot_rows.data();
    params.topk_weights = has_weights ? topk_weights.data() : nullptr;
    params.hidden_states = has_zero_part ? hidden_states.data() : nullptr;
    params.zero_weight = has_zero_part ? zero_weight.data() : nullptr;
    params.residual = has_residual ? residual.data() : nullptr;
    params.constant_weight = num_constants > 0 ? constant_weight.data() : nullptr;
    params.constant_vectors = num_constants > 0 ? constant_vectors.data() : nullptr;
    params.out = out.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.num_constant_experts = num_constants;
    params.hidden_size = hidden_size;
    params.rows_row_stride = rows.stride();
    params.hidden_row_stride = hidden_states.stride();
    params.residual_row_stride = residual.stride();
    params.constant_row_stride = constant_vectors.stride();
    params.out_row_stride = out.stride();
    return params;
  }

  void expect_matches_reference() const {
    EXPECT_TRUE(out.untouched_outside(0, num_tokens));
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t h = 0; h < hidden_size; ++h) {
        double sum = 0;
        double magnitude = 0;
        const auto add = [&](Weight weight, const T* row) {
          const double product = static_cast<double>(weight) * static_cast<double>(row[h]);
          sum += product;
          magnitude += std::abs(product);
        };
        for (int64_t k = 0; k < top_k; ++k) {
          const auto slot = static_cast<size_t>(t * top_k + k);
          if (slot_rows[slot] >= 0) {
            add(has_weights ? topk_weights[slot] : Weight(1), rows.row(slot_rows[slot]));
          }
        }
        if (has_zero_part) {
          add(zero_weight[static_cast<size_t>(t)], hidden_states.row(t));
        }
        for (int64_t c = 0; c < num_constants; ++c) {
          add(constant_weight[static_cast<size_t>(t * num_constants + c)], constant_vectors.row(c));
        }
        if (has_residual) {
          add(1, residual.row(t));
        }
        EXPECT_TRUE(is_rounded_sum(out.row(t)[h], sum, magnitude, top_k + num_constants + 2))
            << "token " << t << ", column " << h << " of " << hidden_size;
      }
    }
  }

  int64_t num_tokens, top_k, num_constants, hidden_size, num_rows;
  bool has_residual;
  bool has_weights = true;
  bool has_zero_part = true;
  Rows<T> rows, hidden_states, residual, constant_vectors, out;
  std::vector<int32_t> slot_rows;
  std::vector<Weight> topk_weights, zero_weight, constant_weight;
};

template <typename T>
class MoeFinalize : public ::testing::Test {};
TYPED_TEST_SUITE(MoeFinalize, FloatingTypes);

TYPED_TEST(MoeFinalize, EverySize) {
  Random random;
  for (const int64_t hidden_size : {1, 7, 200, 257, 1024, 2500}) {
    for (const int64_t num_tokens : {0, 1, 7}) {
      for (const int64_t top_k : {1, 12}) {
        for (const int64_t num_constants : {0, 2}) {
          for (const bool has_residual : {false, true}) {
            Call<TypeParam> call(random, num_tokens, top_k, num_constants, hidden_size, has_residual);
            moe_finalize_cpu(call.params());
            call.expect_matches_reference();
          }
        }
      }
    }
  }
}

TYPED_TEST(MoeFinalize, WithoutWeightsOrZeroPart) {
  Random random;
  for (const int64_t top_k : {0, 1, 5}) {
    for (const bool has_weights : {false, true}) {
      for (const bool has_residual : {false, true}) {
        Call<TypeParam> call(random, 7, top_k, 1, 257, has_residual);
        call.has_weights = has_weights;
        for (const bool has_zero_part : {false, true}) {
          call.has_zero_part = has_zero_part;
          moe_finalize_cpu(call.params());
          call.expect_matches_reference();
        }
      }
    }
  }
}

TYPED_TEST(MoeFinalize, AbsentWeightsAreOnes) {
  using Weight = accumulate_t<TypeParam>;
  Random random;
  Call<TypeParam> call(random, 7, 5, 0, 257, true);
  std::fill(call.topk_weights.begin(), call.topk_weights.end(), Weight(1));
  moe_finalize_cpu(call.params());
  const auto with_ones = call.out;
  call.has_weights = false;
  moe_finalize_cpu(call.params());
  EXPECT_TRUE(call.out == with_ones);
}

TYPED_TEST(MoeFinalize, InPlaceOfHiddenStatesOrResidual) {
  Random random;
  for (const int64_t top_k : {0, 3}) {
    Call<TypeParam> call(random, 7, top_k, 0, 257, true);
    moe_finalize_cpu(call.params());
    for (Rows<TypeParam>* const target : {&call.residual, &call.hidden_states}) {
      const Rows<TypeParam> before = *target;
      auto params = call.params();
      params.out = target->data();
      params.out_row_stride = target->stride();
      moe_finalize_cpu(params);
      for (int64_t t = 0; t < 7; ++t) {
        EXPECT_EQ(std::memcmp(target->row(t), call.out.row(t), 257 * sizeof(TypeParam)), 0) << "token " << t;
      }
      *target = before;
    }
  }
}

TYPED_TEST(MoeFinalize, SkippedSlotsAreNotRead) {
  using Weight = accumulate_t<TypeParam>;
  constexpr Weight kNan = std::numeric_limits<Weight>::quiet_NaN();
  Random random;
  Call<TypeParam> call(random, 3, 4, 0, 33, false);
  for (size_t slot = 0; slot < call.slot_rows.size(); ++slot) {
    call.slot_rows[slot] = -1;
    call.topk_weights[slot] = kNan;
  }
  moe_finalize_cpu(call.params());
  call.expect_matches_reference();
}

TYPED_TEST(MoeFinalize, NoRowsAtAll) {
  Random random;
  Call<TypeParam> call(random, 4, 3, 1, 40, true);
  std::fill(call.slot_rows.begin(), call.slot_rows.end(), -1);
  auto params = call.params();
  params.rows = nullptr;
  params.num_rows = 0;
  moe_finalize_cpu(params);
  call.expect_matches_reference();
}

TYPED_TEST(MoeFinalize, ThreadsAndBatchChangeNoBit) {
  Random random;
  Call<TypeParam> call(random, 23, 12, 2, 3001, true);
  moe_finalize_cpu(call.params());
  const auto whole = call.out;
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    Rows<TypeParam> out(23, 3001, 3001);
    auto params = call.params();
    params.out = out.data();
    moe_finalize_cpu(params);
    EXPECT_TRUE(out == whole) << threads << " threads";
  }
  Rows<TypeParam> one_by_one(23, 3001, 3001);
  for (int64_t t = 0; t < 23; ++t) {
    auto params = call.params();
    params.num_tokens = 1;
    params.slot_rows = call.slot_rows.data() + t * 12;
    params.topk_weights = call.topk_weights.data() + t * 12;
    params.hidden_states = call.hidden_states.row(t);
    params.zero_weight = call.zero_weight.data() + t;
    params.constant_weight = call.constant_weight.data() + t * 2;
    params.residual = call.residual.row(t);
    params.out = one_by_one.row(t);
    moe_finalize_cpu(params);
  }
  EXPECT_TRUE(one_by_one == whole);
}

TYPED_TEST(MoeFinalize, RefusesRowsOutOfRangeAndWritesNothing) {
  Random random;
  for (const int32_t bad : {-2, 15, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()}) {
    Call<TypeParam> call(random, 4, 3, 0, 16, false);
    call.slot_rows.back() = bad;
    EXPECT_EQ(error_of([&] { moe_finalize_cpu(call.params()); }),
              "slot_rows must be in [-1, 15), got " + std::to_string(bad));
    EXPECT_TRUE(call.out.untouched());
  }
}

TYPED_TEST(MoeFinalize, HugeStrides) {
  using T = TypeParam;
  constexpr int64_t kHidden = 9;
  SparseMemory<T> rows(kHugeStride + kHidden);
  SparseMemory<T> hidden_states(kHugeStride + kHidden);
  SparseMemory<T> residual(kHugeStride + kHidden);
  SparseMemory<T> constant_vectors(kHugeStride + kHidden);
  Random random;
  Call<T> call(random, 2, 2, 2, kHidden, true);
  call.num_rows = 2;
  call.slot_rows = {1, 0, -1, 1};
  auto params = call.params();
  const auto spread = [&](SparseMemory<T>& memory, const Rows<T>& source, const void*& pointer, int64_t& stride) {
    if (memory.available()) {
      for (int64_t r = 0; r < 2; ++r) std::copy_n(source.row(r), kHidden, memory.data() + r * kHugeStride);
      pointer = memory.data();
      stride = kHugeStride;
    }
  };
  spread(rows, call.rows, params.rows, params.rows_row_stride);
  spread(hidden_states, call.hidden_states, params.hidden_states, params.hidden_row_stride);
  spread(residual, call.residual, params.residual, params.residual_row_stride);
  spread(constant_vectors, call.constant_vectors, params.constant_vectors, params.constant_row_stride);
  moe_finalize_cpu(params);
  call.expect_matches_reference();
}

}  // namespace
}  // namespace zexpert
