// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels against the CPU kernels, through the same parameters: the data is in memory that both can read.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "../testing.h"
#include "zexpert/biased_topk.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/grouped_mlp_choice.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/moe_permute.h"
#include "zexpert/moe_plan.h"
#include "zexpert/silu_and_mul.h"
#include "zexpert/zero_expert_accumulate.h"
#include "zexpert/zero_idle.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// Managed memory: host and device see the same values once the device is idle.
template <typename T>
class Shared {
 public:
  explicit Shared(int64_t size) : size_(size) {
    if (cudaMallocManaged(&data_, sizeof(T) * static_cast<size_t>(std::max<int64_t>(size, 1))) != cudaSuccess) {
      throw Error("cudaMallocManaged failed");
    }
    std::memset(data_, 0, sizeof(T) * static_cast<size_t>(size));
  }
  explicit Shared(const std::vector<T>& values) : Shared(static_cast<int64_t>(values.size())) {
    std::copy(values.begin(), values.end(), begin());
  }
  Shared(Shared&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Shared& operator=(Shared&&) = delete;
  ~Shared() { cudaFree(data_); }

  T* begin() { return static_cast<T*>(data_); }
  T* end() { return begin() + size_; }
  T* data() { return begin(); }

 private:
  void* data_ = nullptr;
  int64_t size_;
};

void wait() { ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess); }

/// Passes if all values agree to within a few roundings of T, relative to the largest.
template <typename T>
void expect_near(Shared<T>& actual, Shared<T>& expected, double roundings = 16) {
  double largest = 0;
  for (const T value : expected) largest = std::max(largest, std::abs(static_cast<double>(value)));
  const double bound = roundings * TypeTraits<T>::kHalfUlp * std::max(largest, 1.0);
  for (auto a = actual.begin(), e = expected.begin(); e != expected.end(); ++a, ++e) {
    ASSERT_NEAR(static_cast<double>(*a), static_cast<double>(*e), bound) << "element " << (e - expected.begin());
  }
}

template <typename T>
void expect_equal(Shared<T>& actual, Shared<T>& expected) {
  const auto bytes = sizeof(T) * static_cast<size_t>(expected.end() - expected.begin());
  ASSERT_EQ(std::memcmp(actual.data(), expected.data(), bytes), 0);
}

/// Tokens, slots per token, experts, and hidden sizes that make whole vectors or do not.
constexpr int64_t kTokens = 37;
constexpr int64_t kTopK = 5;
constexpr int64_t kExperts = 7;
constexpr int64_t kSlots = kTokens * kTopK;
constexpr int64_t kHiddenSizes[] = {1, 64, 257, 1032};

struct Plan {
  Shared<int32_t> offsets{kExperts + 1};
  Shared<int32_t> row_slots{kSlots};
  Shared<int32_t> slot_rows{kSlots};

  void point(MoePlanParams& params) {
    params.expert_offsets = offsets.data();
    params.row_slots = row_slots.data();
    params.slot_rows = slot_rows.data();
  }
  int32_t num_rows() { return *(offsets.end() - 1); }
};

Plan make_plan(Random& random) {
  Shared<int32_t> ids(random.integers<int32_t>(kSlots, -1, kExperts - 1));
  Plan plan;
  MoePlanParams params;
  params.topk_ids = ids.data();
  params.num_slots = kSlots;
  params.num_experts = kExperts;
  plan.point(params);
  moe_plan_cpu(params);
  return plan;
}

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no CUDA device";
    }
  }
  Random random;
};

template <typename T>
class CudaTyped : public Cuda {};
TYPED_TEST_SUITE(CudaTyped, FloatingTypes);

TEST_F(Cuda, MoePlan) {
  for (const int64_t num_slots : {0, 1, 500, 3000, 40000}) {
    for (const int32_t num_experts : {1, 130, 8192}) {
      Shared<int32_t> ids(random.integers<int32_t>(num_slots, -1, num_experts - 1));
      Shared<int32_t> expected(num_experts + 1 + 2 * num_slots);
      Shared<int32_t> actual(num_experts + 1 + 2 * num_slots);
      MoePlanParams params;
      params.topk_ids = ids.data();
      params.num_slots = num_slots;
      params.num_experts = num_experts;
      Shared<char> workspace(moe_plan_cuda_workspace_bytes(params));
      params.workspace = workspace.data();
      const auto point = [&](Shared<int32_t>& memory) {
        params.expert_offsets = memory.data();
        params.row_slots = params.expert_offsets + num_experts + 1;
        params.slot_rows = params.row_slots + num_slots;
      };
      point(expected);
      moe_plan_cpu(params);
      point(actual);
      moe_plan_cuda(params, nullptr);
      wait();
      expect_equal(actual, expected);
    }
  }
}

TEST_F(Cuda, BiasedTopK) {
  for (const int64_t width : {7, 100, 384, 768, 2000}) {
    RoutingSpec spec;
    spec.top_k = 6;
    spec.num_real_experts = width - 4;
    spec.num_identity_experts = 2;
    spec.num_constant_experts = 1;
    spec.renormalize = width % 2 == 0;
    spec.routed_scaling_factor = 2.5;
    const RoutingSpec resolved = spec.for_width(width);
    Shared<float> logits(random.normal<float>(kTokens * width));
    Shared<float> bias(random.normal<float>(width, 0.01));
    Shared<float> weights[2] = {Shared<float>(kTokens * 8), Shared<float>(kTokens * 8)};
    Shared<int64_t> ids[2] = {Shared<int64_t>(kTokens * 6), Shared<int64_t>(kTokens * 6)};
    for (const bool on_device : {false, true}) {
      BiasedTopKParams params;
      params.logits = logits.data();
      params.logits_row_stride = width;
      params.bias = bias.data();
      params.topk_weights = weights[on_device].data();
      params.zero_weight = weights[on_device].data() + kTokens * 6;
      params.constant_weight = weights[on_device].data() + kTokens * 7;
      params.topk_ids = ids[on_device].data();
      params.ids_type = ScalarType::kInt64;
      params.num_tokens = kTokens;
      params.spec = resolved;
      on_device ? biased_topk_cuda(params, nullptr) : biased_topk_cpu(params);
    }
    wait();
    expect_equal(ids[1], ids[0]);
    expect_near(weights[1], weights[0]);

    Shared<float> upstream(random.normal<float>(kTokens * 8));
    Shared<float> gradients[2] = {Shared<float>(kTokens * width), Shared<float>(kTokens * width)};
    for (const bool on_device : {false, true}) {
      BiasedTopKBackwardParams params;
      params.grad_topk_weights = upstream.data();
      params.grad_zero_weight = upstream.data() + kTokens * 6;
      params.grad_constant_weight = upstream.data() + kTokens * 7;
      params.logits = logits.data();
      params.logits_row_stride = width;
      params.bias = bias.data();
      params.grad_logits = gradients[on_device].data();
      params.num_tokens = kTokens;
      params.spec = resolved;
      on_device ? biased_topk_backward_cuda(params, nullptr) : biased_topk_backward_cpu(params);
    }
    wait();
    expect_near(gradients[1], gradients[0]);
  }
}

TEST_F(Cuda, BiasedTopKAndPlan) {
  // A block, clusters, more than one launch takes.
  for (const int64_t num_tokens : {1, 8, 9, 64, 100, 200, 256, 257}) {
    for (const int64_t width : {7, 384, 1000, 2000}) {
      const int64_t num_slots = num_tokens * 6;
      RoutingSpec spec;
      spec.top_k = 6;
      spec.num_real_experts = width - 3;
      const RoutingSpec resolved = spec.for_width(width);
      const int64_t num_offsets = resolved.num_real_experts + 1;
      Shared<float> logits(random.normal<float>(num_tokens * width));
      Shared<float> bias(random.normal<float>(width, 0.01));
      Shared<float> weights[2] = {Shared<float>(num_tokens * 7), Shared<float>(num_tokens * 7)};
      Shared<int32_t> integers[2] = {Shared<int32_t>(num_offsets + 3 * num_slots),
                                     Shared<int32_t>(num_offsets + 3 * num_slots)};
      for (const bool together : {false, true}) {
        BiasedTopKParams params;
        params.logits = logits.data();
        params.logits_row_stride = width;
        params.bias = bias.data();
        params.topk_weights = weights[together].data();
        params.zero_weight = weights[together].data() + num_slots;
        params.topk_ids = integers[together].data();
        params.num_tokens = num_tokens;
        params.spec = resolved;
        params.row_slots = integers[together].data() + num_slots;
        params.slot_rows = params.row_slots + num_slots;
        params.expert_offsets = params.slot_rows + num_slots;
        Shared<char> workspace(biased_topk_cuda_workspace_bytes(params));
        params.workspace = workspace.data();
        const MoePlanParams plan = params.plan();
        if (!together) {
          params.expert_offsets = params.row_slots = params.slot_rows = nullptr;
        }
        biased_topk_cuda(params, nullptr);
        if (!together) {
          moe_plan_cuda(plan, nullptr);
        }
        wait();
      }
      expect_equal(weights[1], weights[0]);
      expect_equal(integers[1], integers[0]);
    }
  }
}

template <typename Params>
void expect_refuses_integers(void (*op)(const Params&, cudaStream_t)) {
  Params params;
  params.data_type = ScalarType::kInt32;
  EXPECT_EQ(error_of([&] { op(params, nullptr); }), "data must be of a floating type, got int32");
}

TEST_F(Cuda, ChecksParams) {
  expect_refuses_integers(&moe_finalize_cuda);
  expect_refuses_integers(&moe_finalize_backward_cuda);
  expect_refuses_integers(&moe_permute_cuda);
  expect_refuses_integers(&moe_permute_backward_cuda);
  expect_refuses_integers(&silu_and_mul_cuda);
  expect_refuses_integers(&silu_and_mul_backward_cuda);
  expect_refuses_integers(&zero_expert_accumulate_cuda);
  expect_refuses_integers(&zero_expert_accumulate_backward_cuda);
  expect_refuses_integers(&zero_idle_experts_cuda);
  expect_refuses_integers(&zero_idle_rows_cuda);
  MoePermuteParams params;
  params.num_rows = params.num_tokens = params.hidden_size = 1;
  EXPECT_EQ(error_of([&] { moe_permute_cuda(params, nullptr); }), "row_slots must not be null");
}

// Needs no device: bad params are refused before anything is launched.
TEST(CudaParams, Routing) {
  float value = 0.0F;
  int32_t integer = 0;
  BiasedTopKParams params;
  const auto forward = [&] { biased_topk_cuda(params, nullptr); };
  params.num_tokens = 1;
  EXPECT_EQ(error_of(forward), "spec must be resolved by RoutingSpec::for_width, got an open count of experts");
  params.spec = params.spec.for_width(2);
  EXPECT_EQ(error_of(forward), "logits must not be null");
  params.logits = params.topk_weights = params.topk_ids = &value;
  EXPECT_EQ(error_of(forward), "zero_weight must not be null");
  params.zero_weight = &value;
  params.slot_rows = &integer;
  EXPECT_EQ(error_of(forward), "expert_offsets must not be null");
  params.slot_rows = nullptr;
  params.num_tokens = -1;
  EXPECT_EQ(error_of(forward), "num_tokens must not be negative, got -1");
  params.num_tokens = 1;
  params.logits_type = static_cast<ScalarType>(17);
  EXPECT_EQ(error_of(forward), "data must be of a floating type, got unknown");
  params.logits_type = ScalarType::kFloat64;
  EXPECT_EQ(error_of(forward), "logits must be float32, bfloat16 or float16 on CUDA, got float64");
  params.logits_type = ScalarType::kFloat32;
  params.ids_type = ScalarType::kFloat16;
  EXPECT_EQ(error_of(forward), "topk_ids must be int32 or int64, got float16");
  params.ids_type = ScalarType::kInt32;
  params.spec.scoring_func = static_cast<ScoringFunc>(17);
  EXPECT_EQ(error_of(forward), "scoring_func must be a ScoringFunc, got 17");
  params.spec.scoring_func = ScoringFunc::kSoftmax;
  params.num_tokens = 3000;
  params.expert_offsets = params.row_slots = params.slot_rows = &integer;
  EXPECT_EQ(error_of(forward), "workspace must not be null");
  params.spec.num_logits = kMaxExpertsOnCuda + 1;
  EXPECT_EQ(error_of(forward), "logits must have at most 8192 columns on CUDA, got 8193");

  BiasedTopKBackwardParams gradients;
  const auto backward = [&] { biased_topk_backward_cuda(gradients, nullptr); };
  gradients.spec = gradients.spec.for_width(2);
  gradients.num_tokens = 1;
  EXPECT_EQ(error_of(backward), "grad_topk_weights must not be null");
  gradients.num_tokens = -1;
  EXPECT_EQ(error_of(backward), "num_tokens must not be negative, got -1");
}

TEST(CudaParams, MoePlan) {
  int32_t integer = 0;
  MoePlanParams params;
  const auto plan = [&] { moe_plan_cuda(params, nullptr); };
  EXPECT_EQ(error_of(plan), "expert_offsets must not be null");
  params.expert_offsets = params.row_slots = params.slot_rows = &integer;
  params.num_slots = 1;
  EXPECT_EQ(error_of(plan), "topk_ids must not be null");
  params.topk_ids = &integer;
  params.num_slots = -1;
  EXPECT_EQ(error_of(plan), "num_slots must not be negative, got -1");
  params.num_slots = int64_t{1} << 31;
  EXPECT_EQ(error_of(plan), "num_slots must be below 2^31, got 2147483648");
  params.num_slots = 3000;
  params.num_experts = 1;
  EXPECT_EQ(error_of(plan), "workspace must not be null");
  params.ids_type = ScalarType::kFloat32;
  EXPECT_EQ(error_of(plan), "topk_ids must be int32 or int64, got float32");
  params.ids_type = ScalarType::kInt64;
  params.num_experts = kMaxExpertsOnCuda + 1;
  EXPECT_EQ(error_of(plan), "num_experts must be at most 8192 on CUDA, got 8193");
}

TEST(CudaParams, GroupedMlp) {
  alignas(16) uint16_t values[64] = {};
  int32_t integer = 0;
  GroupedMlpParams params;
  const auto run = [&] { grouped_mlp_cuda(params, nullptr); };
  params.data_type = ScalarType::kBFloat16;
  EXPECT_EQ(error_of(run), "expert_offsets must not be null");
  params.expert_offsets = &integer;
  params.num_rows = params.num_experts = 1;
  params.hidden_size = params.intermediate_size = 64;
  EXPECT_EQ(error_of(run), "rows must not be null");
  params.rows = params.out = values;
  EXPECT_EQ(error_of(run), "w13_weight must not be null");
  params.w13_weight = params.w2_weight = values;
  params.num_rows = -1;
  EXPECT_EQ(error_of(run), "num_rows must not be negative, got -1");
  params.num_rows = int64_t{1} << 31;
  EXPECT_EQ(error_of(run), "the number of rows must be below 2^31, got 2147483648");
  params.num_rows = 1;
  params.data_type = static_cast<ScalarType>(17);
  EXPECT_EQ(error_of(run), "data must be of a floating type, got unknown");
  params.data_type = ScalarType::kBFloat16;
  params.row_slots = &integer;
  params.top_k = 0;
  EXPECT_EQ(error_of(run), "top_k must be at least 1, got 0");
  params.row_slots = nullptr;
  params.tile_rows = 12;
  EXPECT_EQ(error_of(run), "tile_rows must be a multiple of 8 from 0 to 288, got 12");
  params.tile_rows = 0;
  params.rows = values + 1;
  EXPECT_EQ(error_of(run), "rows, w13_weight, w2_weight and out must begin at multiples of 16 bytes");
  params.rows = values;
  params.w2_expert_stride = 4;
  EXPECT_EQ(error_of(run), "strides of rows, out and experts must be multiples of 8 elements, got 4");
}

TEST_F(Cuda, GroupedMlp) {
  const GroupedMlpDevice device = grouped_mlp_cuda_device();
  if (device.compute_capability != 90 || !device.has_hopper_code) {
    GTEST_SKIP() << "no GPU of compute capability 9.0, or no code for 9.0a";
  }
  using T = BFloat16;
  constexpr int64_t kHidden = 128;
  constexpr int64_t kInner = 64;
  Plan plan = make_plan(random);
  const int64_t num_rows = plan.num_rows();
  Shared<T> tokens(random.normal<T>(kTokens * kHidden));
  Shared<T> w13(random.normal<T>(kExperts * 2 * kInner * kHidden, 0.1));
  Shared<T> w2(random.normal<T>(kExperts * kHidden * kInner, 0.1));
  Shared<T> rows(kSlots * kHidden);
  for (int64_t r = 0; r < num_rows; ++r) {
    std::copy_n(tokens.begin() + plan.row_slots.begin()[r] / kTopK * kHidden, kHidden, rows.begin() + r * kHidden);
  }
  Shared<T> expected(kSlots * kHidden);
  GroupedMlpParams params;
  params.rows = rows.data();
  params.expert_offsets = plan.offsets.data();
  params.w13_weight = w13.data();
  params.w2_weight = w2.data();
  params.out = expected.data();
  params.data_type = ScalarType::kBFloat16;
  params.num_rows = kSlots;
  params.num_experts = kExperts;
  params.hidden_size = params.rows_row_stride = params.out_row_stride = kHidden;
  params.intermediate_size = kInner;
  params.w13_expert_stride = 2 * kInner * kHidden;
  params.w2_expert_stride = kHidden * kInner;
  grouped_mlp_cpu(params);
  Shared<T> outs[2] = {Shared<T>(kSlots * kHidden), Shared<T>(kSlots * kHidden)};
  for (const bool gathers : {false, true}) {
    params.out = outs[gathers].data();
    if (gathers) {
      params.rows = tokens.data();
      params.row_slots = plan.row_slots.data();
      params.num_tokens = kTokens;
      params.top_k = kTopK;
    }
    params.workspace = nullptr;
    EXPECT_EQ(error_of([&] { grouped_mlp_cuda(params, nullptr); }), "workspace must not be null");
    Shared<char> workspace(grouped_mlp_cuda_workspace_bytes(params));
    params.workspace = workspace.data();
    grouped_mlp_cuda(params, nullptr);
    wait();
  }
  expect_near(outs[0], expected);
  expect_equal(outs[1], outs[0]);
}

TYPED_TEST(CudaTyped, ZeroIdle) {
  using T = TypeParam;
  for (const int64_t size : kHiddenSizes) {
    Plan plan = make_plan(this->random);
    plan.offsets.begin()[3] = plan.offsets.begin()[4];  // expert 3 has no rows
    Shared<T> experts[2] = {Shared<T>(std::vector<T>(kExperts * size, T(2.0F))),
                            Shared<T>(std::vector<T>(kExperts * size, T(2.0F)))};
    Shared<T> rows[2] = {Shared<T>(std::vector<T>(kSlots * size, T(2.0F))),
                         Shared<T>(std::vector<T>(kSlots * size, T(2.0F)))};
    for (const bool on_device : {false, true}) {
      ZeroIdleExpertsParams of_experts;
      of_experts.data = experts[on_device].data();
      of_experts.expert_offsets = plan.offsets.data();
      of_experts.data_type = TypeTraits<T>::kType;
      of_experts.num_experts = kExperts;
      of_experts.expert_size = size;
      on_device ? zero_idle_experts_cuda(of_experts, nullptr) : zero_idle_experts_cpu(of_experts);
      ZeroIdleRowsParams of_rows;
      of_rows.data = rows[on_device].data();
      of_rows.last_offset = plan.offsets.end() - 1;
      of_rows.data_type = TypeTraits<T>::kType;
      of_rows.num_rows = kSlots;
      of_rows.row_size = size;
      on_device ? zero_idle_rows_cuda(of_rows, nullptr) : zero_idle_rows_cpu(of_rows);
    }
    wait();
    expect_equal(experts[1], experts[0]);
    expect_equal(rows[1], rows[0]);
  }
}

TYPED_TEST(CudaTyped, ZeroExpertAccumulate) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  for (const int64_t hidden : kHiddenSizes) {
    Shared<T> tokens(this->random.template normal<T>(kTokens * hidden));
    Shared<T> upstream(this->random.template normal<T>(kTokens * hidden));
    Shared<A> weight(this->random.template normal<A>(kTokens));
    Shared<T> out[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<T> gradients[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<A> dots[2] = {Shared<A>(kTokens), Shared<A>(kTokens)};
    for (const bool on_device : {false, true}) {
      ZeroExpertAccumulateParams params;
      params.hidden_states = tokens.data();
      params.zero_weight = weight.data();
      params.out = out[on_device].data();
      params.data_type = TypeTraits<T>::kType;
      params.num_tokens = kTokens;
      params.hidden_size = params.hidden_row_stride = params.out_row_stride = hidden;
      for (const bool accumulate : {false, true}) {
        params.accumulate = accumulate;
        on_device ? zero_expert_accumulate_cuda(params, nullptr) : zero_expert_accumulate_cpu(params);
      }
      ZeroExpertAccumulateBackwardParams backward;
      backward.grad_out = upstream.data();
      backward.hidden_states = tokens.data();
      backward.zero_weight = weight.data();
      backward.grad_hidden_states = gradients[on_device].data();
      backward.grad_zero_weight = dots[on_device].data();
      backward.data_type = TypeTraits<T>::kType;
      backward.num_tokens = kTokens;
      backward.hidden_size = backward.grad_out_row_stride = backward.hidden_row_stride = hidden;
      on_device ? zero_expert_accumulate_backward_cuda(backward, nullptr)
                : zero_expert_accumulate_backward_cpu(backward);
    }
    wait();
    expect_near(out[1], out[0], 2);
    expect_near(gradients[1], gradients[0], 2);
    expect_near(dots[1], dots[0], 64);
  }
}

TYPED_TEST(CudaTyped, MoePermute) {
  using T = TypeParam;
  for (const int64_t hidden : kHiddenSizes) {
    Plan plan = make_plan(this->random);
    Shared<T> tokens(this->random.template normal<T>(kTokens * hidden));
    Shared<T> rows[2] = {Shared<T>(kSlots * hidden), Shared<T>(kSlots * hidden)};
    Shared<T> rows_by_token(kSlots * hidden);
    Shared<T> gradients[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<T> gradients_by_slot[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<T> repeated_gradients[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<int32_t> repeated_slots(this->random.template integers<int32_t>(kSlots, 0, kSlots - 1));
    Shared<T> upstream(this->random.template normal<T>(kSlots * hidden));
    for (const bool on_device : {false, true}) {
      MoePermuteParams params;
      params.hidden_states = tokens.data();
      params.row_slots = plan.row_slots.data();
      params.rows = rows[on_device].data();
      params.data_type = TypeTraits<T>::kType;
      params.num_rows = kSlots;
      params.num_tokens = kTokens;
      params.top_k = kTopK;
      params.hidden_size = params.hidden_row_stride = hidden;
      params.last_offset = plan.offsets.end() - 1;
      on_device ? moe_permute_cuda(params, nullptr) : moe_permute_cpu(params);
      if (on_device) {
        params.slot_rows = plan.slot_rows.data();
        params.rows = rows_by_token.data();
        moe_permute_cuda(params, nullptr);
      }

      MoePermuteBackwardParams backward;
      backward.grad_rows = upstream.data();
      backward.row_slots = plan.row_slots.data();
      backward.grad_hidden_states = gradients[on_device].data();
      backward.data_type = TypeTraits<T>::kType;
      backward.num_rows = kSlots;
      backward.num_tokens = kTokens;
      backward.top_k = kTopK;
      backward.hidden_size = backward.grad_rows_row_stride = hidden;
      backward.last_offset = params.last_offset;
      Shared<char> workspace(moe_permute_backward_cuda_workspace_bytes(backward));
      backward.workspace = workspace.data();
      const auto differentiate = [&] {
        on_device ? moe_permute_backward_cuda(backward, nullptr) : moe_permute_backward_cpu(backward);
        wait();
      };
      differentiate();
      backward.row_slots = repeated_slots.data();
      backward.last_offset = nullptr;
      backward.grad_hidden_states = repeated_gradients[on_device].data();
      differentiate();
      backward.row_slots = plan.row_slots.data();
      backward.slot_rows = plan.slot_rows.data();
      backward.last_offset = params.last_offset;
      backward.grad_hidden_states = gradients_by_slot[on_device].data();
      differentiate();
    }
    expect_equal(rows[1], rows[0]);
    expect_equal(rows_by_token, rows[0]);
    expect_equal(gradients[1], gradients[0]);
    expect_equal(gradients_by_slot[0], gradients[0]);
    expect_equal(gradients_by_slot[1], gradients[0]);
    expect_equal(repeated_gradients[1], repeated_gradients[0]);
  }
}

TYPED_TEST(CudaTyped, SiluAndMul) {
  using T = TypeParam;
  for (const int64_t inner : kHiddenSizes) {
    constexpr int32_t kWorking = 30;
    Shared<T> gate_up(this->random.template normal<T>(kTokens * 2 * inner, 3));
    Shared<T> upstream(this->random.template normal<T>(kTokens * inner));
    Shared<int32_t> last_offset(std::vector<int32_t>{kWorking});
    Shared<T> out[2] = {Shared<T>(kTokens * inner), Shared<T>(kTokens * inner)};
    Shared<T> gradients[2] = {Shared<T>(kTokens * 2 * inner), Shared<T>(kTokens * 2 * inner)};
    Shared<accumulate_t<T>> row_weight(this->random.template normal<accumulate_t<T>>(kTokens));
    Shared<T> weighted_out[2] = {Shared<T>(kTokens * inner), Shared<T>(kTokens * inner)};
    Shared<T> weighted_gradients[2] = {Shared<T>(kTokens * 2 * inner), Shared<T>(kTokens * 2 * inner)};
    Shared<accumulate_t<T>> grad_row_weight[2] = {Shared<accumulate_t<T>>(kTokens), Shared<accumulate_t<T>>(kTokens)};
    for (const bool on_device : {false, true}) {
      SiluAndMulParams params;
      params.gate_up = gate_up.data();
      params.out = out[on_device].data();
      params.data_type = TypeTraits<T>::kType;
      params.num_rows = kTokens;
      params.intermediate_size = params.out_row_stride = inner;
      params.gate_up_row_stride = 2 * inner;
      params.last_offset = last_offset.data();
      on_device ? silu_and_mul_cuda(params, nullptr) : silu_and_mul_cpu(params);

      SiluAndMulBackwardParams backward;
      backward.grad_out = upstream.data();
      backward.gate_up = gate_up.data();
      backward.grad_gate_up = gradients[on_device].data();
      backward.data_type = TypeTraits<T>::kType;
      backward.num_rows = params.num_rows;
      backward.intermediate_size = backward.grad_out_row_stride = inner;
      backward.gate_up_row_stride = backward.grad_gate_up_row_stride = 2 * inner;
      backward.last_offset = last_offset.data();
      on_device ? silu_and_mul_backward_cuda(backward, nullptr) : silu_and_mul_backward_cpu(backward);
      backward.grad_gate_up = weighted_gradients[on_device].data();
      backward.out = weighted_out[on_device].data();
      backward.out_row_stride = inner;
      backward.row_weight = row_weight.data();
      backward.grad_row_weight = grad_row_weight[on_device].data();
      on_device ? silu_and_mul_backward_cuda(backward, nullptr) : silu_and_mul_backward_cpu(backward);
    }
    wait();
    expect_near(out[1], out[0], 4);
    expect_near(gradients[1], gradients[0], 8);
    expect_near(weighted_gradients[1], weighted_gradients[0], 8);
    expect_near(weighted_out[1], weighted_out[0], 8);
    expect_near(grad_row_weight[1], grad_row_weight[0], static_cast<double>(inner));
  }
}

TYPED_TEST(CudaTyped, MoeFinalize) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  for (const int64_t hidden : kHiddenSizes) {
    Plan plan = make_plan(this->random);
    Shared<T> rows(this->random.template normal<T>(kSlots * hidden));
    Shared<T> tokens(this->random.template normal<T>(kTokens * hidden));
    Shared<T> constants(this->random.template normal<T>(2 * hidden));
    Shared<A> weights(this->random.template normal<A>(kTokens * (kTopK + 3)));
    Shared<T> out[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<T> gradients[2] = {Shared<T>((kTokens + kSlots) * hidden), Shared<T>((kTokens + kSlots) * hidden)};
    Shared<A> dots[2] = {Shared<A>(kTokens * (kTopK + 1)), Shared<A>(kTokens * (kTopK + 1))};
    Shared<A> zero_dots[2] = {Shared<A>(kTokens), Shared<A>(kTokens)};
    Shared<T> unweighted[2] = {Shared<T>(kTokens * hidden), Shared<T>(kTokens * hidden)};
    Shared<T> no_tokens[2] = {Shared<T>(this->random.template normal<T>(kSlots * hidden)),
                              Shared<T>(this->random.template normal<T>(kSlots * hidden))};
    Shared<uint8_t> workspace(kSlots);
    for (const bool on_device : {false, true}) {
      MoeFinalizeParams params;
      params.rows = rows.data();
      params.slot_rows = plan.slot_rows.data();
      params.topk_weights = weights.data();
      params.hidden_states = params.residual = tokens.data();
      params.zero_weight = weights.data() + kSlots;
      params.constant_weight = weights.data() + kSlots + kTokens;
      params.constant_vectors = constants.data();
      params.out = out[on_device].data();
      params.data_type = TypeTraits<T>::kType;
      params.num_rows = kSlots;
      params.num_tokens = kTokens;
      params.top_k = kTopK;
      params.num_constant_experts = 2;
      params.hidden_size = params.rows_row_stride = params.hidden_row_stride = hidden;
      params.residual_row_stride = params.constant_row_stride = params.out_row_stride = hidden;
      on_device ? moe_finalize_cuda(params, nullptr) : moe_finalize_cpu(params);
      params.topk_weights = params.zero_weight = params.hidden_states = nullptr;
      params.out = unweighted[on_device].data();
      on_device ? moe_finalize_cuda(params, nullptr) : moe_finalize_cpu(params);

      MoeFinalizeBackwardParams backward;
      backward.grad_out = tokens.data();
      backward.rows = rows.data();
      backward.slot_rows = plan.slot_rows.data();
      backward.topk_weights = weights.data();
      backward.hidden_states = tokens.data();
      backward.zero_weight = weights.data() + kSlots;
      backward.grad_rows = gradients[on_device].data();
      backward.grad_hidden_states = gradients[on_device].data() + kSlots * hidden;
      backward.grad_topk_weights = dots[on_device].data();
      backward.grad_zero_weight = dots[on_device].data() + kSlots;
      backward.data_type = TypeTraits<T>::kType;
      backward.num_rows = kSlots;
      backward.num_tokens = kTokens;
      backward.top_k = kTopK;
      backward.hidden_size = backward.grad_out_row_stride = hidden;
      backward.rows_row_stride = backward.hidden_row_stride = hidden;
      backward.workspace = workspace.data();
      const auto differentiate = [&] {
        on_device ? moe_finalize_backward_cuda(backward, nullptr) : moe_finalize_backward_cpu(backward);
        wait();
      };
      differentiate();
      backward.grad_rows = no_tokens[on_device].data();
      backward.num_tokens = 0;
      differentiate();
      backward.num_tokens = kTokens;
      backward.num_rows = backward.top_k = 0;
      backward.grad_hidden_states = nullptr;
      backward.zero_weight = nullptr;
      backward.grad_zero_weight = zero_dots[on_device].data();
      differentiate();
    }
    wait();
    for (const bool on_device : {false, true}) {
      for (const T value : no_tokens[on_device]) ASSERT_EQ(static_cast<double>(value), 0.0);
    }
    expect_near(zero_dots[1], zero_dots[0], 64);
    expect_near(unweighted[1], unweighted[0], 4);
    expect_near(out[1], out[0], 4);
    expect_near(gradients[1], gradients[0], 2);
    expect_near(dots[1], dots[0], 64);
  }
}

}  // namespace
}  // namespace zexpert
