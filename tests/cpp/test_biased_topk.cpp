// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs is up to ZEXPERT_CPU_CAPABILITY; `make test` runs this with each.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "biased_topk_reference.h"
#include "zexpert/biased_topk.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

constexpr ScalarType kFloatingTypes[] = {ScalarType::kFloat32, ScalarType::kBFloat16, ScalarType::kFloat16,
                                         ScalarType::kFloat64};
constexpr ScoringFunc kScoringFuncs[] = {ScoringFunc::kSoftmax, ScoringFunc::kSigmoid, ScoringFunc::kSqrtSoftplus};
// Below a vector, below a block of 64, odd, LongCat's and Kimi's widths, and far beyond any model's.
constexpr int64_t kWidths[] = {1, 5, 96, 257, 384, 768, 896, 4096};
constexpr int64_t kTopKs[] = {1, 2, 8, 12, 64};

class Random {
 public:
  Row normal(int64_t size, ScalarType type, double deviation) {
    std::normal_distribution<double> distribution(0, deviation);
    Row row(static_cast<size_t>(size));
    for (double& value : row) value = rounded(distribution(generator_), type);
    return row;
  }

  /// A row for which rounding errors cannot change the choice.
  Row logits(const Call& call, double deviation = 2) {
    for (int attempt = 0; attempt < 100; ++attempt) {
      Row row = normal(call.spec.num_logits, call.logits_type, deviation);
      if (route(call.spec, row, call.bias.value_or(Row{})).is_clear_cut) {
        return row;
      }
    }
    ADD_FAILURE() << "no row with a clear-cut choice: " << describe(call);
    return {};
  }

  void fill(Call& call, int64_t num_tokens, double bias_deviation = 0) {
    if (bias_deviation > 0) {
      call.bias = normal(call.spec.num_logits, call.bias_type, bias_deviation);
    }
    for (int64_t t = 0; t < num_tokens; ++t) call.logits.push_back(logits(call));
  }

 private:
  std::mt19937_64 generator_{20240715};
};

/// 8 + 8 experts in ascending preference, so that the zero experts come first.
Call make_small_call(int64_t identity, int64_t constant, int64_t drop, int64_t top_k) {
  Call call;
  call.spec.num_real_experts = 8;
  call.spec.num_identity_experts = identity;
  call.spec.num_constant_experts = constant;
  call.spec.top_k = top_k;
  call.spec = call.spec.for_width(8 + identity + constant + drop);
  Row row;
  for (int64_t i = 0; i < call.spec.num_logits; ++i) row.push_back(0.25 * static_cast<double>(i));
  call.logits = {row};
  return call;
}

TEST(BiasedTopK, EveryTypeWidthAndTopK) {
  Random random;
  for (ScalarType logits_type : kFloatingTypes) {
    for (int64_t width : kWidths) {
      for (int64_t top_k : kTopKs) {
        for (ScoringFunc scoring_func : kScoringFuncs) {
          Call call;
          call.spec = make_spec(width, top_k);
          call.spec.scoring_func = scoring_func;
          call.logits_type = logits_type;
          random.fill(call, width == 4096 ? 2 : 7, width % 2 == 0 ? 0.01 : 0);
          expect_matches_reference(call);
          ASSERT_FALSE(HasFailure());
        }
      }
    }
  }
}

TEST(BiasedTopK, EveryBiasAndIndexType) {
  Random random;
  for (ScalarType logits_type : kFloatingTypes) {
    for (ScalarType bias_type : kFloatingTypes) {
      for (ScalarType ids_type : {ScalarType::kInt32, ScalarType::kInt64}) {
        Call call;
        call.spec = make_spec(96, 8);
        call.logits_type = logits_type;
        call.bias_type = bias_type;
        call.ids_type = ids_type;
        random.fill(call, 3, 0.02);
        expect_matches_reference(call);
      }
    }
  }
}

TEST(BiasedTopK, NoTokens) {
  BiasedTopKParams params;
  params.spec = make_spec(96, 8);
  biased_topk_cpu(params);  // with null pointers
}

TEST(BiasedTopK, BadParamsAreRefusedBeforeAnythingIsRead) {
  const auto error_of = [](const BiasedTopKParams& params) {
    try {
      biased_topk_cpu(params);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  BiasedTopKParams params;
  params.num_tokens = 2;
  params.spec.num_real_experts = 4;
  EXPECT_EQ(error_of(params), "spec must be resolved by RoutingSpec::for_width, got an open count of experts");
  params.spec.top_k = 0;
  EXPECT_EQ(error_of(params), "top_k must be between 1 and 64, got 0");
  params.spec.top_k = 2;
  params.spec = params.spec.for_width(6);
  EXPECT_EQ(error_of(params), "logits must not be null");
  const float logits[12] = {};
  params.logits = logits;
  EXPECT_EQ(error_of(params), "topk_weights must not be null");
  params.num_tokens = -1;
  EXPECT_EQ(error_of(params), "num_tokens must not be negative, got -1");
  params.num_tokens = 2;
  params.logits_row_stride = -2;
  EXPECT_EQ(error_of(params), "logits_row_stride must not be negative, got -2");
  params.logits_row_stride = 6;
  params.logits_type = ScalarType::kInt32;
  EXPECT_EQ(error_of(params), "data must be of a floating type, got int32");
  params.logits_type = ScalarType::kFloat32;
  params.bias = logits;
  params.bias_type = static_cast<ScalarType>(17);
  EXPECT_EQ(error_of(params), "data must be of a floating type, got unknown");
  params.bias_type = ScalarType::kFloat32;
  params.ids_type = ScalarType::kFloat32;
  EXPECT_EQ(error_of(params), "topk_ids must be int32 or int64, got float32");
}

TEST(BiasedTopK, GivenChoices) {
  const auto result_of = [](const std::vector<int32_t>& choices) {
    const float logits[8] = {0.0F, 0.0F, 0.0F, 0.0F, std::numeric_limits<float>::infinity(), 0.0F, 0.0F, 0.0F};
    float topk_weights[6] = {};
    int32_t topk_ids[6] = {};
    float zero_weight[2] = {};
    BiasedTopKParams params;
    params.num_tokens = 2;
    params.spec.num_real_experts = 3;
    params.spec.top_k = 3;
    params.spec = params.spec.for_width(4);
    params.logits = logits;
    params.choices = choices.data();
    params.topk_weights = topk_weights;
    params.topk_ids = topk_ids;
    params.zero_weight = zero_weight;
    std::string text;
    try {
      biased_topk_cpu(params);
    } catch (const Error& error) {
      text = error.what();
      EXPECT_EQ(topk_ids[0], 0) << "nothing is written";
      return text;
    }
    for (int i = 0; i < 6; ++i) text += std::to_string(topk_ids[i]) + (topk_weights[i] > 0 ? "+ " : " ");
    EXPECT_EQ(zero_weight[0], choices[1] == 3 ? 0.25F : 0.0F);
    return text;
  };
  EXPECT_EQ(result_of({2, 3, 1, 1, -1, 2}), "2+ -1 1+ 1+ -1 2+ ");
  EXPECT_EQ(result_of({-1, -1, 1, 0, 1, -1}), "-1 -1 1+ -1 1+ -1 ") << "the logit of expert 0 is masked";
  EXPECT_EQ(result_of({2, 3, 1, 1, 4, 2}),
            "choices must be experts from 0 to 3, or -1 for an empty slot, got 4 for token 1");
  EXPECT_EQ(result_of({2, 3, 1, 1, -2, 2}),
            "choices must be experts from 0 to 3, or -1 for an empty slot, got -2 for token 1");
  EXPECT_EQ(result_of({2, 3, 2, 1, 3, 2}), "choices must name an expert once per token, got 2 twice for token 0");
}

TEST(BiasedTopK, ChoicesNeedTheirArray) {
  BiasedTopKChoicesParams params;
  params.spec = make_spec(4, 2);
  biased_topk_choices_cpu(params);  // no tokens
  const float logits[4] = {};
  params.logits = logits;
  params.num_tokens = 1;
  EXPECT_THROW(biased_topk_choices_cpu(params), Error);
}

TEST(BiasedTopK, RowsAreDenseUnlessAStrideIsGivenAndOneRowMayServeAllTokens) {
  const std::vector<float> logits = {0, 1, 2, 3, 3, 2, 1, 0, 1, 3, 0, 2};  // 3 rows of 4
  const auto chosen = [&](int64_t row_stride) {
    std::vector<int32_t> ids(3);
    std::vector<float> weights(6);
    BiasedTopKParams params;
    params.spec.num_real_experts = 4;
    params.spec = params.spec.for_width(4);
    params.logits = logits.data();
    if (row_stride != kDenseRows) {
      params.logits_row_stride = row_stride;
    }
    params.topk_weights = weights.data();
    params.topk_ids = ids.data();
    params.zero_weight = weights.data() + 3;
    params.num_tokens = 3;
    biased_topk_cpu(params);
    return ids;
  };
  EXPECT_EQ(chosen(kDenseRows), (std::vector<int32_t>{3, 0, 1}));
  EXPECT_EQ(chosen(4), (std::vector<int32_t>{3, 0, 1}));
  EXPECT_EQ(chosen(2), (std::vector<int32_t>{3, 1, 0}));  // rows may overlap
  EXPECT_EQ(chosen(0), (std::vector<int32_t>{3, 3, 3}));
}

TEST(BiasedTopK, EqualLogitsChooseTheFirst) {
  for (int64_t width : kWidths) {
    for (int64_t top_k : kTopKs) {
      for (ScoringFunc scoring_func : kScoringFuncs) {
        Call call;
        call.spec = make_spec(width, top_k);
        call.spec.scoring_func = scoring_func;
        call.logits = {Row(static_cast<size_t>(width), 0.5)};
        const Result result = expect_matches_reference(call);
        for (int64_t k = 0; k < call.spec.top_k; ++k) EXPECT_EQ(result.topk_ids.id(k), k);
      }
    }
  }
}

TEST(BiasedTopK, TiesAmongFewAndMany) {
  Random random;
  for (int64_t top_k : kTopKs) {
    for (int64_t levels : {2, 3, 10, 100}) {
      Call call;
      call.spec = make_spec(768, top_k);
      Row row = random.normal(768, ScalarType::kFloat32, 1);
      for (double& value : row) value = std::floor(value * static_cast<double>(levels)) / 16;
      call.logits = {row};
      expect_matches_reference(call);
    }
  }
}

TEST(BiasedTopK, LargestKeysInOneLane) {
  // All large logits 128 apart, and a descending and an ascending row: the bounds of the first step are at their worst.
  for (int64_t top_k : kTopKs) {
    Call call;
    call.spec = make_spec(4096, top_k);
    Row strided(4096), descending(4096), ascending(4096);
    for (size_t i = 0; i < 4096; ++i) {
      const double x = static_cast<double>(i) / 512;
      strided[i] = i % 128 == 5 ? x : x / 64 - 8;
      ascending[i] = x;
      descending[4095 - i] = x;
    }
    call.logits = {strided, descending, ascending};
    expect_matches_reference(call);
  }
}

TEST(BiasedTopK, NonFiniteLogitsAreNeverChosen) {
  Random random;
  for (ScalarType logits_type : kFloatingTypes) {
    for (ScoringFunc scoring_func : kScoringFuncs) {
      for (double bad : {kNan, kInfinity, -kInfinity}) {
        Call call;
        call.spec = make_spec(257, 12);
        call.spec.scoring_func = scoring_func;
        call.spec.renormalize = true;
        call.logits_type = logits_type;
        random.fill(call, 3);
        for (size_t i = 0; i < 257; i += 3) call.logits[0][i] = bad;
        for (size_t i = 0; i < 250; ++i) call.logits[1][i] = bad;  // 7 left for 12 slots
        std::fill(call.logits[2].begin(), call.logits[2].end(), bad);
        const Result result = expect_matches_reference(call);
        EXPECT_EQ(result.topk_ids.id(12 + 6) >= 250, true);
        EXPECT_EQ(result.topk_ids.id(12 + 7), -1);
        EXPECT_EQ(result.topk_ids.id(24), -1);
      }
    }
  }
}

TEST(BiasedTopK, ExtremeLogits) {
  const double largest = std::numeric_limits<float>::max();
  for (ScoringFunc scoring_func : kScoringFuncs) {
    for (const Row& row : {Row{-largest, largest, 0, 1}, Row{-80, -85, -30, -86}, Row{80, 90, 100, -largest}}) {
      Call call;
      call.spec = make_spec(4, 4);
      call.spec.scoring_func = scoring_func;
      call.logits = {row};
      const Result result = run(call);
      const Reference expected = route(call.spec, row, {});
      for (int64_t k = 0; k < 4; ++k) {
        const double weight = expected.topk_weights[static_cast<size_t>(k)];
        EXPECT_NEAR(result.topk_weights[k], weight, 2e-6 * weight + 1e-37) << describe(call) << " slot " << k;
      }
    }
  }
}

TEST(BiasedTopK, LargeBiasLeavesWeightsAlone) {
  Random random;
  Call call;
  call.spec = make_spec(768, 12);
  random.fill(call, 7);
  Row bias(768, 0.0);
  for (size_t i = 0; i < 6; ++i) bias[100 * i] = 1e4 + 16 * static_cast<double>(i);
  for (size_t i = 0; i < 6; ++i) bias[100 * i + 1] = -1e4;
  call.bias = bias;
  const Result result = expect_matches_reference(call);
  EXPECT_EQ(result.topk_ids.id(0), 500);
  EXPECT_LT(result.topk_weights[0], 1);
}

TEST(BiasedTopK, NonFiniteBias) {
  for (ScalarType bias_type : kFloatingTypes) {
    Call call;
    call.spec = make_spec(6, 6);
    call.bias_type = bias_type;
    call.logits = {{0, 1, 2, 3, 4, 5}, {5, kNan, 3, 2, 1, 0}};
    call.bias = Row{-kInfinity, kInfinity, 0, kNan, 0, kInfinity};
    const Result result = expect_matches_reference(call);
    const std::vector<int64_t> first{1, 5, 4, 2, 0, -1};
    const std::vector<int64_t> second{5, 2, 4, 0, -1, -1};
    for (int64_t k = 0; k < 6; ++k) {
      EXPECT_EQ(result.topk_ids.id(k), first[static_cast<size_t>(k)]);
      EXPECT_EQ(result.topk_ids.id(6 + k), second[static_cast<size_t>(k)]);
    }
  }
}

TEST(BiasedTopK, KindsOfZeroExperts) {
  Random random;
  struct Kinds {
    int64_t identity, constant, drop;
  };
  for (const Kinds& kinds : {Kinds{32, 0, 0}, Kinds{0, 32, 0}, Kinds{0, 0, 32}, Kinds{10, 20, 2}, Kinds{1, 1, 1}}) {
    for (ScoringFunc scoring_func : kScoringFuncs) {
      for (int renormalisation = 0; renormalisation < (kinds.drop > 0 ? 3 : 2); ++renormalisation) {
        Call call;
        call.spec.num_real_experts = 64;
        call.spec.num_identity_experts = kinds.identity;
        call.spec.num_constant_experts = kinds.constant;
        call.spec.top_k = 12;
        call.spec.scoring_func = scoring_func;
        call.spec.renormalize = renormalisation > 0;
        call.spec.drop_before_renormalize = renormalisation > 1;
        call.spec.routed_scaling_factor = 6;
        call.spec = call.spec.for_width(64 + kinds.identity + kinds.constant + kinds.drop);
        random.fill(call, 7, 0.01);
        expect_matches_reference(call);
      }
    }
  }
}

TEST(BiasedTopK, DropBeforeRenormalize) {
  Call call = make_small_call(1, 1, 2, 4);  // chosen: both drop experts, the constant, the identity
  call.spec.renormalize = true;
  const Result shared = expect_matches_reference(call);
  EXPECT_LT(shared.zero_weight[0] + shared.constant_weight[0], 0.6);
  call.spec.drop_before_renormalize = true;
  const Result dropped = expect_matches_reference(call);
  EXPECT_NEAR(dropped.zero_weight[0] + dropped.constant_weight[0], 1, 1e-6);
}

TEST(BiasedTopK, SumOfZeroGivesZeroWeights) {
  Call drop_only = make_small_call(0, 0, 4, 2);
  drop_only.spec.renormalize = true;
  drop_only.spec.drop_before_renormalize = true;
  expect_matches_reference(drop_only);

  Call underflow = make_small_call(4, 0, 0, 12);
  underflow.spec.scoring_func = ScoringFunc::kSigmoid;
  underflow.spec.renormalize = true;
  underflow.logits = {Row(12, -200.0)};  // scores of 0 in float32
  const Result result = run(underflow);
  EXPECT_EQ(result.topk_ids.id(7), 7);
  EXPECT_EQ(result.topk_weights[7], 0);
  EXPECT_EQ(result.zero_weight[0], 0);
}

TEST(BiasedTopK, Groups) {
  Random random;
  struct Shape {
    int64_t real, zero, groups, topk_group, top_k;
  };
  for (const Shape& shape :
       {Shape{256, 0, 8, 4, 8}, Shape{64, 32, 8, 3, 4}, Shape{60, 5, 20, 1, 8}, Shape{64, 0, 64, 7, 8},
        Shape{64, 8, 2, 1, 12}, Shape{512, 256, 4, 2, 64}, Shape{96, 0, 4, 4, 6}, Shape{768, 0, 768, 700, 64}}) {
    for (ScoringFunc scoring_func : kScoringFuncs) {
      for (ScalarType logits_type : {ScalarType::kFloat32, ScalarType::kFloat64, ScalarType::kFloat16}) {
        Call call;
        call.spec.num_real_experts = shape.real;
        call.spec.top_k = shape.top_k;
        call.spec.scoring_func = scoring_func;
        call.spec.num_expert_group = shape.groups;
        call.spec.topk_group = shape.topk_group;
        call.spec = call.spec.for_width(shape.real + shape.zero);
        call.logits_type = logits_type;
        random.fill(call, 6, 0.05);
        for (size_t i = 0; i < static_cast<size_t>(shape.real); i += 2) call.logits[3][i] = kNan;
        for (size_t i = 0; i < static_cast<size_t>(shape.real); i += 5) call.logits[5][i] = kNan;
        std::fill(call.logits[4].begin(), call.logits[4].begin() + shape.real, -kInfinity);
        expect_matches_reference(call);
      }
    }
  }
}

TEST(BiasedTopK, GroupScoresTieAndLackKeys) {
  Call call;
  call.spec.num_real_experts = 8;
  call.spec.num_expert_group = 4;
  call.spec.top_k = 4;
  call.spec.scoring_func = ScoringFunc::kSigmoid;
  for (int64_t topk_group : {1, 2, 3}) {
    call.spec.topk_group = topk_group;
    call.spec = call.spec.for_width(8);
    call.logits = {Row(8, 0.5),                                            // all groups tie
                   {kNan, kNan, 0, 0, 0, 0, 0, 0},                         // the first has none
                   {kNan, 9, 0, 0.5, -3, -3, -3, -3},                      // the first has one
                   {kNan, kNan, kNan, kNan, kNan, kNan, kNan, kInfinity},  // nobody has any
                   {1, 1, 2, 2, 2, 2, 0, 0}};
    call.bias.reset();
    expect_matches_reference(call);
    call.bias = Row{kInfinity, -kInfinity, 0, 0, -kInfinity, 0, kNan, 0};  // the first sums to NaN
    for (int rotation = 0; rotation < 4; ++rotation) {
      std::rotate(call.bias->begin(), call.bias->begin() + 2, call.bias->end());
      expect_matches_reference(call);
    }
  }
}

TEST(BiasedTopK, RowStrideAndAlignmentDoNotChangeABit) {
  Random random;
  for (ScalarType logits_type : kFloatingTypes) {
    Call call;
    call.spec.num_real_experts = 200;
    call.spec.num_constant_experts = 7;
    call.spec.top_k = 12;
    call.spec = call.spec.for_width(257);
    call.logits_type = logits_type;
    random.fill(call, 7, 0.01);
    const Result plain = run(call);
    for (int64_t offset : {1, 3}) {
      call.offset = offset;
      call.row_padding = 1000 + offset;
      expect_same_bits(plain, expect_matches_reference(call));
    }
  }
}

TEST(BiasedTopK, RowsDoNotDependOnTheBatchOrTheThreads) {
  Random random;
  for (ScoringFunc scoring_func : kScoringFuncs) {
    Call call;
    call.spec.num_real_experts = 512;
    call.spec.top_k = 12;
    call.spec.scoring_func = scoring_func;
    call.spec.renormalize = true;
    call.spec = call.spec.for_width(768);
    random.fill(call, 200, 0.01);
    const Result all = run(call);  // enough for several threads
    set_parallel_for([](int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
      for (int64_t i = end; i-- > begin;) body(i, i + 1, context);
    });
    expect_same_bits(all, run(call));
    set_parallel_for(nullptr);
    for (int64_t t : {0, 7, 199}) {
      Call one = call;
      one.logits = {call.logits[static_cast<size_t>(t)]};
      const Result row = run(one);
      for (int64_t k = 0; k < 12; ++k) {
        EXPECT_EQ(row.topk_ids.id(k), all.topk_ids.id(t * 12 + k));
        EXPECT_EQ(row.topk_weights[k], all.topk_weights[t * 12 + k]);
      }
      EXPECT_EQ(row.zero_weight[0], all.zero_weight[t]);
    }
  }
}

TEST(BiasedTopK, RowStridePastInt32) {
  constexpr int64_t kStride = (int64_t{1} << 31) + 8;
  constexpr size_t kBytes = static_cast<size_t>(kStride + 5) * sizeof(BFloat16);
  void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    GTEST_SKIP() << "no address space for " << kBytes << " bytes";
  }
  for (int64_t i = 0; i < 5; ++i) store(memory, ScalarType::kBFloat16, i, static_cast<double>(i));
  for (int64_t i = 0; i < 5; ++i) store(memory, ScalarType::kBFloat16, kStride + i, static_cast<double>(-i));
  float weights[4], zero_weight[2];
  int32_t ids[4];
  BiasedTopKParams params;
  params.logits = memory;
  params.logits_type = ScalarType::kBFloat16;
  params.logits_row_stride = kStride;
  params.topk_weights = weights;
  params.topk_ids = ids;
  params.zero_weight = zero_weight;
  params.num_tokens = 2;
  params.spec = make_spec(5, 2);
  biased_topk_cpu(params);
  munmap(memory, kBytes);
  EXPECT_EQ(std::vector<int32_t>(ids, ids + 4), (std::vector<int32_t>{4, 3, 0, 1}));
}

}  // namespace
}  // namespace zexpert
