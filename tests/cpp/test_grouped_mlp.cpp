// SPDX-License-Identifier: Apache-2.0
#include "zexpert/grouped_mlp.h"

#include <gtest/gtest.h>

#include <numeric>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// The arguments of one call, and the scalar loop that says what it must give.
template <typename T>
struct Call {
  Call(Random& random, const std::vector<int32_t>& segment_sizes, int64_t hidden, int64_t inner)
      : num_experts(static_cast<int64_t>(segment_sizes.size())),
        hidden_size(hidden),
        intermediate_size(inner),
        expert_offsets(1, 0),
        num_rows(std::accumulate(segment_sizes.begin(), segment_sizes.end(), int64_t{0}) + 2),
        rows(num_rows, hidden, hidden + 3),
        w13_weight(num_experts, 2 * inner * hidden, 2 * inner * hidden + 5),
        w2_weight(num_experts, hidden * inner, hidden * inner + 6),
        out(num_rows, hidden, hidden + 1) {
    for (const int32_t size : segment_sizes) expert_offsets.push_back(expert_offsets.back() + size);
    rows.randomize(random);
    w13_weight.randomize(random, 1 / std::sqrt(static_cast<double>(std::max<int64_t>(hidden, 1))));
    w2_weight.randomize(random, 1 / std::sqrt(static_cast<double>(std::max<int64_t>(inner, 1))));
  }

  GroupedMlpParams params() {
    GroupedMlpParams params;
    params.rows = rows.data();
    params.expert_offsets = expert_offsets.data();
    params.w13_weight = w13_weight.data();
    params.w2_weight = w2_weight.data();
    params.out = out.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_rows = num_rows;
    params.num_experts = num_experts;
    params.hidden_size = hidden_size;
    params.intermediate_size = intermediate_size;
    params.rows_row_stride = rows.stride();
    params.out_row_stride = out.stride();
    params.w13_expert_stride = w13_weight.stride();
    params.w2_expert_stride = w2_weight.stride();
    return params;
  }

  /// Row `r` of expert `e` in double precision, with a bound on the rounding errors of each element.
  void expect_row_matches(int64_t e, int64_t r) const {
    constexpr double kHalfUlp = TypeTraits<accumulate_t<T>>::kHalfUlp;
    const T* x = rows.row(r);
    const T* gate = w13_weight.row(e);
    const T* up = gate + intermediate_size * hidden_size;
    const T* down = w2_weight.row(e);
    std::vector<double> activation, activation_error;
    for (int64_t f = 0; f < intermediate_size; ++f) {
      double g = 0, u = 0, g_magnitude = 0, u_magnitude = 0;
      for (int64_t h = 0; h < hidden_size; ++h) {
        const double gate_product = static_cast<double>(x[h]) * static_cast<double>(gate[f * hidden_size + h]);
        const double up_product = static_cast<double>(x[h]) * static_cast<double>(up[f * hidden_size + h]);
        g += gate_product;
        u += up_product;
        g_magnitude += std::abs(gate_product);
        u_magnitude += std::abs(up_product);
      }
      const double silu = g / (1 + std::exp(-g));
      const double sum_error = static_cast<double>(hidden_size + 1) * kHalfUlp;
      activation.push_back(silu * u);
      // |silu'| is at most 1.1; silu itself and the product add a few roundings.
      activation_error.push_back(1.1 * sum_error * g_magnitude * (std::abs(u) + sum_error * u_magnitude) +
                                 std::abs(silu) * sum_error * u_magnitude + 8 * kHalfUlp * std::abs(silu * u));
    }
    for (int64_t h = 0; h < hidden_size; ++h) {
      double expected = 0, error = 0;
      for (int64_t f = 0; f < intermediate_size; ++f) {
        const auto i = static_cast<size_t>(f);
        const double weight = static_cast<double>(down[h * intermediate_size + f]);
        expected += activation[i] * weight;
        error += activation_error[i] * std::abs(weight) +
                 static_cast<double>(intermediate_size + 1) * kHalfUlp * std::abs(activation[i] * weight);
      }
      error = 1.01 * error + TypeTraits<T>::kHalfUlp * (std::abs(expected) + error) + TypeTraits<T>::kSmallest;
      EXPECT_LE(std::abs(static_cast<double>(out.row(r)[h]) - expected), error)
          << "expert " << e << ", row " << r << ", column " << h << " of " << hidden_size << ", inner size "
          << intermediate_size;
    }
  }

  void expect_matches_reference(int64_t max_rows = INT64_MAX) const {
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t first = expert_offsets[static_cast<size_t>(e)];
      const int64_t last = expert_offsets[static_cast<size_t>(e) + 1];
      for (int64_t r = first; r < last && last - first <= max_rows; ++r) expect_row_matches(e, r);
    }
  }

  int64_t num_experts, hidden_size, intermediate_size;
  std::vector<int32_t> expert_offsets;
  int64_t num_rows;
  Rows<T> rows, w13_weight, w2_weight, out;
};

template <typename T>
class GroupedMlp : public ::testing::Test {};
TYPED_TEST_SUITE(GroupedMlp, FloatingTypes);

TYPED_TEST(GroupedMlp, EverySize) {
  Random random;
  // Hidden and inner sizes around a vector, a block of channels and a block of depth.
  const std::vector<std::pair<int64_t, int64_t>> sizes = {{1, 1},    {7, 3},     {16, 16},   {33, 65},
                                                          {200, 70}, {257, 130}, {1024, 40}, {40, 1030}};
  for (const auto& [hidden, inner] : sizes) {
    Call<TypeParam> call(random, {0, 1, 2, 0, 3, 7, 0}, hidden, inner);
    grouped_mlp_cpu(call.params());
    call.expect_matches_reference();
    EXPECT_TRUE(call.out.untouched_outside(0, call.num_rows - 2)) << "rows past the last offset changed";
  }
}

TYPED_TEST(GroupedMlp, EveryNumberOfRows) {
  Random random;
  std::vector<int32_t> segment_sizes(28);
  std::iota(segment_sizes.begin(), segment_sizes.end(), 0);
  Call<TypeParam> call(random, segment_sizes, 70, 45);
  grouped_mlp_cpu(call.params());
  call.expect_matches_reference();
}

TYPED_TEST(GroupedMlp, OneGiantExpert) {
  Random random;
  Call<TypeParam> call(random, {0, 0, 331, 0}, 37, 22);
  grouped_mlp_cpu(call.params());
  call.expect_matches_reference();
}

TYPED_TEST(GroupedMlp, LongSegmentsAreLeftToTheCaller) {
  Random random;
  Call<TypeParam> call(random, {3, 17, 2, 18}, 24, 20);
  grouped_mlp_cpu(call.params(), 3);
  call.expect_matches_reference(3);
  Call<TypeParam> fresh(random, {3, 17, 2, 18}, 24, 20);
  for (int64_t r = 0; r < call.num_rows; ++r) {
    if ((r >= 3 && r < 20) || r >= 22) {
      EXPECT_EQ(std::memcmp(call.out.row(r), fresh.out.row(r), 24 * sizeof(TypeParam)), 0) << "row " << r;
    }
  }
}

/// The tokens that row_slots names, as if they had been gathered.
TYPED_TEST(GroupedMlp, GathersTokens) {
  constexpr int64_t kHidden = 37;
  constexpr int64_t kTopK = 3;
  Random random;
  Call<TypeParam> call(random, {0, 9, 1, 40}, kHidden, 22);
  Rows<TypeParam> tokens(20, kHidden, kHidden + 5);
  tokens.randomize(random);
  std::vector<int32_t> row_slots;
  for (int64_t r = 0; r < call.num_rows - 2; ++r) {
    row_slots.push_back(static_cast<int32_t>(r * 7 % (20 * kTopK)));
    std::copy_n(tokens.row(row_slots.back() / kTopK), kHidden, call.rows.row(r));
  }
  row_slots.resize(static_cast<size_t>(call.num_rows), -1);  // past the last offset
  Call<TypeParam> gathering = call;
  grouped_mlp_cpu(call.params());
  auto params = gathering.params();
  params.rows = tokens.data();
  params.rows_row_stride = tokens.stride();
  params.row_slots = row_slots.data();
  params.num_tokens = 20;
  params.top_k = kTopK;
  grouped_mlp_cpu(params);
  for (int64_t r = 0; r < call.num_rows; ++r) {
    EXPECT_EQ(std::memcmp(gathering.out.row(r), call.out.row(r), kHidden * sizeof(TypeParam)), 0) << "row " << r;
  }

  row_slots[4] = 60;
  Call<TypeParam> refused(random, {0, 9, 1, 40}, kHidden, 22);
  params.out = refused.out.data();
  EXPECT_EQ(error_of([&] { grouped_mlp_cpu(params); }), "row_slots must be in [0, 60) below the last offset, got 60");
  EXPECT_TRUE(refused.out.untouched());
}

TYPED_TEST(GroupedMlp, NothingToDo) {
  Random random;
  Call<TypeParam> no_rows(random, {0, 0, 0}, 24, 20);
  grouped_mlp_cpu(no_rows.params());
  EXPECT_TRUE(no_rows.out.untouched());

  Call<TypeParam> no_experts(random, {}, 24, 20);
  grouped_mlp_cpu(no_experts.params());
  EXPECT_TRUE(no_experts.out.untouched());

  Call<TypeParam> no_columns(random, {2, 1}, 0, 20);
  grouped_mlp_cpu(no_columns.params());
  EXPECT_TRUE(no_columns.out.untouched());

  Call<TypeParam> no_channels(random, {2, 20}, 24, 0);
  grouped_mlp_cpu(no_channels.params());
  no_channels.expect_matches_reference();
}

TYPED_TEST(GroupedMlp, ThreadsAndBatchChangeNoBit) {
  Random random;
  Call<TypeParam> call(random, {1, 0, 5, 64, 9}, 600, 150);
  grouped_mlp_cpu(call.params());
  const auto whole = call.out;
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    Call<TypeParam> again = call;
    std::fill_n(again.out.data(), again.num_rows * again.out.stride(), TypeParam{});
    grouped_mlp_cpu(again.params());
    for (int64_t r = 0; r < call.num_rows - 2; ++r) {
      EXPECT_EQ(std::memcmp(again.out.row(r), whole.row(r), 600 * sizeof(TypeParam)), 0)
          << "row " << r << ", " << threads << " threads";
    }
  }
  // The same row alone, in segments of one row.
  for (int64_t e = 0; e < call.num_experts; ++e) {
    for (int64_t r = call.expert_offsets[static_cast<size_t>(e)]; r < call.expert_offsets[static_cast<size_t>(e) + 1];
         ++r) {
      std::vector<TypeParam> alone(600);
      std::vector<int32_t> offsets(static_cast<size_t>(call.num_experts) + 1, 0);
      std::fill(offsets.begin() + e + 1, offsets.end(), 1);
      auto params = call.params();
      params.expert_offsets = offsets.data();
      params.num_rows = 1;
      params.rows = call.rows.row(r);
      params.out = alone.data();
      grouped_mlp_cpu(params);
      EXPECT_EQ(std::memcmp(alone.data(), whole.row(r), 600 * sizeof(TypeParam)), 0) << "row " << r;
    }
  }
}

/// A call with quantised weights, whose values `values` holds in T: the scales are powers of two.
template <typename T>
struct QuantisedCall {
  QuantisedCall(Random& random, const std::vector<int32_t>& segments, int64_t hidden, int64_t inner)
      : values(random, segments, hidden, inner) {
    const int64_t hidden_blocks = num_scale_blocks(hidden);
    const int64_t inner_blocks = num_scale_blocks(inner);
    w13_scale_inv = scales(random, values.num_experts * 2 * inner_blocks * hidden_blocks);
    w2_scale_inv = scales(random, values.num_experts * inner_blocks * hidden_blocks);
    for (int64_t e = 0; e < values.num_experts; ++e) {
      for (int64_t half = 0; half < 2; ++half) {
        quantise(random, values.w13_weight.row(e) + half * inner * hidden, inner, hidden,
                 &w13_scale_inv[static_cast<size_t>((e * 2 + half) * inner_blocks * hidden_blocks)], w13_weight);
      }
      quantise(random, values.w2_weight.row(e), hidden, inner,
               &w2_scale_inv[static_cast<size_t>(e * inner_blocks * hidden_blocks)], w2_weight);
    }
  }

  GroupedMlpParams params() {
    GroupedMlpParams params = values.params();
    params.w13_weight = w13_weight.data();
    params.w2_weight = w2_weight.data();
    params.w13_scale_inv = w13_scale_inv.data();
    params.w2_scale_inv = w2_scale_inv.data();
    params.w13_expert_stride = 2 * values.intermediate_size * values.hidden_size;
    params.w2_expert_stride = values.intermediate_size * values.hidden_size;
    params.w13_scale_expert_stride = static_cast<int64_t>(w13_scale_inv.size()) / values.num_experts;
    params.w2_scale_expert_stride = static_cast<int64_t>(w2_scale_inv.size()) / values.num_experts;
    return params;
  }

  static std::vector<float> scales(Random& random, int64_t size) {
    std::vector<float> result;
    for (const int32_t exponent : random.integers<int32_t>(size, -8, -5)) result.push_back(std::ldexp(1.0F, exponent));
    return result;
  }

  /// Appends the codes of random weights to `codes` and writes their values.
  static void quantise(Random& random, T* matrix, int64_t rows, int64_t columns, const float* scale_inv,
                       std::vector<Float8E4M3>& codes) {
    const std::vector<float> numbers = random.normal<float>(rows * columns, 4);
    for (int64_t i = 0; i < rows * columns; ++i) {
      const int64_t block = i / columns / kScaleBlock * num_scale_blocks(columns) + i % columns / kScaleBlock;
      codes.push_back(Float8E4M3(numbers[static_cast<size_t>(i)]));
      matrix[i] = static_cast<T>(static_cast<float>(codes.back()) * scale_inv[block]);
    }
  }

  Call<T> values;
  std::vector<Float8E4M3> w13_weight, w2_weight;
  std::vector<float> w13_scale_inv, w2_scale_inv;
};

TYPED_TEST(GroupedMlp, QuantisedWeightsGiveTheBitsOfTheirValues) {
  using T = TypeParam;
  Random random;
  for (const auto& [hidden, inner] :
       std::vector<std::pair<int64_t, int64_t>>{{300, 200}, {128, 256}, {5, 130}, {7, 3}}) {
    QuantisedCall<T> call(random, {1, 0, 2, 7, 40}, hidden, inner);
    grouped_mlp_cpu(call.values.params());
    call.values.expect_matches_reference();
    const Rows<T> expected = call.values.out;
    for (const int64_t threads : {1, 3}) {
      const ScopedThreads scope(threads);
      call.values.out = Rows<T>(call.values.num_rows, hidden, hidden + 1);
      grouped_mlp_cpu(call.params());
      EXPECT_TRUE(call.values.out == expected) << hidden << " by " << inner << ", " << threads << " threads";
    }
  }
}

TYPED_TEST(GroupedMlp, QuantisedWeightsOfSeveralBlocksOfDepth) {
  Random random;
  QuantisedCall<TypeParam> call(random, {3, 14}, 2200, 40);
  grouped_mlp_cpu(call.params());
  call.values.expect_matches_reference();
}

TYPED_TEST(GroupedMlp, RowsTooLargeForTheQuickLoads) {
  if (std::is_same_v<TypeParam, Half>) {
    GTEST_SKIP() << "the results of such rows are infinite in float16";
  }
  Random random;
  QuantisedCall<TypeParam> call(random, {2, 9}, 140, 20);
  for (int64_t r = 0; r < 11; r += 2) call.values.rows.row(r)[r] = static_cast<TypeParam>(60000.0);
  grouped_mlp_cpu(call.params());
  call.values.expect_matches_reference();
}

TYPED_TEST(GroupedMlp, RefusesBadScalesOfExpertsThatHaveRows) {
  Random random;
  const auto error_with = [&](auto change) {
    QuantisedCall<TypeParam> call(random, {2, 0, 1}, 130, 4);
    GroupedMlpParams params = call.params();
    change(call, params);
    const std::string error = error_of([&] { grouped_mlp_cpu(params); });
    EXPECT_TRUE(error == "no error" || call.values.out.untouched());
    return error;
  };
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(error_with([](auto& call, auto&) { call.w13_scale_inv[0] = kNan; }),
            "w13_scale_inv must be finite and not negative, got nan");
  EXPECT_EQ(error_with([](auto& call, auto&) { call.w2_scale_inv.back() = std::numeric_limits<float>::infinity(); }),
            "w2_scale_inv must be finite and not negative, got inf");
  EXPECT_EQ(error_with([](auto& call, auto&) { call.w13_scale_inv.back() = -1; }),
            "w13_scale_inv must be finite and not negative, got -1");
  EXPECT_EQ(error_with([](auto& call, auto&) { call.w13_scale_inv[4] = kNan; }), "no error") << "expert 1 has no rows";
  EXPECT_EQ(error_with([](auto&, auto& params) { params.w2_scale_inv = nullptr; }),
            "w13_scale_inv and w2_scale_inv must be given both or neither, got w13_scale_inv alone");
}

TYPED_TEST(GroupedMlp, RefusesBadOffsetsAndWritesNothing) {
  Random random;
  const auto error_with = [&](const std::vector<int32_t>& offsets) {
    Call<TypeParam> call(random, {2, 3, 1}, 8, 4);
    call.expert_offsets = offsets;
    const std::string error = error_of([&] { grouped_mlp_cpu(call.params()); });
    EXPECT_TRUE(call.out.untouched());
    return error;
  };
  EXPECT_EQ(error_with({1, 2, 5, 6}), "expert_offsets must start at 0, got 1");
  EXPECT_EQ(error_with({-1, 2, 5, 6}), "expert_offsets must start at 0, got -1");
  EXPECT_EQ(error_with({0, 5, 2, 6}), "expert_offsets must ascend, got 2 after 5");
  EXPECT_EQ(error_with({0, 2, 5, 9}), "expert_offsets must be at most the number of rows (8), got 9");
}

TYPED_TEST(GroupedMlp, HugeStrides) {
  using T = TypeParam;
  constexpr int64_t kHidden = 9;
  constexpr int64_t kInner = 5;
  SparseMemory<T> rows(kHugeStride + kHidden);
  SparseMemory<T> out(kHugeStride + kHidden);
  SparseMemory<T> w13_weight(kHugeStride + 2 * kInner * kHidden);
  SparseMemory<T> w2_weight(kHugeStride + kInner * kHidden);
  if (!rows.available() || !out.available() || !w13_weight.available() || !w2_weight.available()) {
    GTEST_SKIP() << "no address space for rows this far apart";
  }
  Random random;
  Call<T> call(random, {1, 1}, kHidden, kInner);
  const auto spread = [](SparseMemory<T>& memory, const Rows<T>& source, int64_t size) {
    for (int64_t r = 0; r < 2; ++r) std::copy_n(source.row(r), size, memory.data() + r * kHugeStride);
  };
  spread(rows, call.rows, kHidden);
  spread(w13_weight, call.w13_weight, 2 * kInner * kHidden);
  spread(w2_weight, call.w2_weight, kInner * kHidden);
  auto params = call.params();
  params.rows = rows.data();
  params.w13_weight = w13_weight.data();
  params.w2_weight = w2_weight.data();
  params.out = out.data();
  params.rows_row_stride = params.out_row_stride = kHugeStride;
  params.w13_expert_stride = params.w2_expert_stride = kHugeStride;
  grouped_mlp_cpu(params);
  for (int64_t r = 0; r < 2; ++r) std::copy_n(out.data() + r * kHugeStride, kHidden, call.out.row(r));
  call.expect_matches_reference();
}

}  // namespace
}  // namespace zexpert
