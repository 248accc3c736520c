// SPDX-License-Identifier: Apache-2.0
#include "zexpert/grouped_mlp_choice.h"

#include <gtest/gtest.h>

#include <string>

#include "testing.h"

namespace zexpert {
namespace {

using zexpert::testing::error_of;
using Implementation = GroupedMlpImplementation;
using Task = GroupedMlpTask;

/// A call that every implementation of the device serves.
GroupedMlpCall call_on(bool is_cuda, int64_t compute_capability = 90) {
  GroupedMlpCall call;
  call.device = {is_cuda, compute_capability, true};
  call.data_type = ScalarType::kBFloat16;
  call.num_experts = 16;
  call.hidden_size = 128;
  call.intermediate_size = 64;
  return call;
}

template <typename Change>
Implementation chosen(const Change& change, int64_t compute_capability = 90) {
  GroupedMlpCall call = call_on(true, compute_capability);
  change(call);
  return choose_grouped_mlp("auto", call);
}

TEST(GroupedMlpChoice, AutoOnTheCpu) {
  for (const Task task : {Task::kForward, Task::kForwardKeepingGateUp, Task::kBackward}) {
    GroupedMlpCall call = call_on(false);
    call.task = task;
    EXPECT_EQ(choose_grouped_mlp("auto", call), Implementation::kCpu);
  }
}

TEST(GroupedMlpChoice, AutoOnAGpu) {
  EXPECT_EQ(chosen([](auto&) {}), Implementation::kHopper);
  EXPECT_EQ(chosen([](auto& call) { call.data_type = ScalarType::kFloat16; }), Implementation::kHopper);
  EXPECT_EQ(chosen([](auto& call) { call.num_experts = 1024; }), Implementation::kHopper);
  EXPECT_EQ(chosen([](auto&) {}, 80), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto&) {}, 100), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.device.has_hopper_code = false; }), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.task = Task::kForwardKeepingGateUp; }), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.task = Task::kBackward; }), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.hidden_size = 72; }), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.intermediate_size = 72; }), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.hidden_size = 68; }), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.intermediate_size = 68; }), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.num_experts = 1025; }), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.num_experts = 1024; }, 80), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.num_experts = 1023; }, 80), Implementation::kGroupedMm);
  EXPECT_EQ(chosen([](auto& call) { call.data_type = ScalarType::kFloat16; }, 80), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.data_type = ScalarType::kFloat32; }), Implementation::kTorch);
  EXPECT_EQ(chosen([](auto& call) { call.data_type = ScalarType::kFloat64; }), Implementation::kTorch);
}

TEST(GroupedMlpChoice, QuantisedWeights) {
  const auto quantised = [](auto& call) { call.has_fp8_weights = true; };
  EXPECT_EQ(chosen(quantised), Implementation::kHopper);
  EXPECT_EQ(chosen(quantised, 80), Implementation::kTorch);
  const auto quantised_float16 = [](auto& call) {
    call.has_fp8_weights = true;
    call.data_type = ScalarType::kFloat16;
  };
  EXPECT_EQ(chosen(quantised_float16), Implementation::kTorch);
  for (const std::string requested : {"auto", "cpu"}) {
    GroupedMlpCall call = call_on(false);
    call.has_fp8_weights = true;
    EXPECT_EQ(choose_grouped_mlp(requested, call), Implementation::kCpu);
  }

  GroupedMlpCall call = call_on(true);
  call.has_fp8_weights = true;
  EXPECT_EQ(error_of([&] { choose_grouped_mlp("grouped_mm", call); }),
            R"(w13_weight must be bfloat16 for implementation "grouped_mm", got float8_e4m3fn)");
  call.data_type = ScalarType::kFloat16;
  EXPECT_EQ(error_of([&] { choose_grouped_mlp("hopper", call); }),
            R"(rows must be bfloat16 with float8_e4m3fn weights for implementation "hopper", got float16)");
}

TEST(GroupedMlpChoice, AName) {
  EXPECT_EQ(choose_grouped_mlp("cpu", call_on(false)), Implementation::kCpu);
  EXPECT_EQ(choose_grouped_mlp("torch", call_on(false)), Implementation::kTorch);
  for (const Implementation implementation :
       {Implementation::kHopper, Implementation::kGroupedMm, Implementation::kTorch}) {
    EXPECT_EQ(choose_grouped_mlp(name(implementation), call_on(true)), implementation);
  }
}

TEST(GroupedMlpChoice, ANameThatCannotServe) {
  const auto refused = [](const std::string& requested, const GroupedMlpCall& call) {
    return error_of([&] { choose_grouped_mlp(requested, call); });
  };
  EXPECT_EQ(refused("gpu", call_on(true)),
            R"(implementation must be "auto", "cpu", "hopper", "grouped_mm" or "torch", got "gpu")");
  EXPECT_EQ(refused("", call_on(false)),
            R"(implementation must be "auto", "cpu", "hopper", "grouped_mm" or "torch", got "")");
  EXPECT_EQ(refused("cpu", call_on(true)),
            R"(implementation must be "auto", "hopper", "grouped_mm" or "torch" on a GPU, got "cpu")");
  for (const std::string requested : {"hopper", "grouped_mm"}) {
    EXPECT_EQ(refused(requested, call_on(false)),
              R"(implementation must be "auto", "cpu" or "torch" on the CPU, got ")" + requested + '"');
  }

  const auto hopper_with = [&](auto change, int64_t compute_capability = 90) {
    GroupedMlpCall call = call_on(true, compute_capability);
    change(call);
    return refused("hopper", call);
  };
  EXPECT_EQ(hopper_with([](auto&) {}, 80),
            R"(the GPU must be of compute capability 9.0 for implementation "hopper", got 8.0)");
  EXPECT_EQ(
      hopper_with([](auto& call) { call.device.has_hopper_code = false; }),
      R"(zexpert must be compiled for the architecture 9.0a for implementation "hopper", got a build without it)");
  EXPECT_EQ(hopper_with([](auto& call) { call.task = Task::kForwardKeepingGateUp; }),
            R"(keep_gate_up must be False for implementation "hopper", got True)");
  EXPECT_EQ(hopper_with([](auto& call) { call.task = Task::kBackward; }),
            R"(implementation must be "auto", "grouped_mm" or "torch" for gradients, got "hopper")");
  EXPECT_EQ(hopper_with([](auto& call) { call.data_type = ScalarType::kFloat64; }),
            R"(w13_weight must be bfloat16 or float16 for implementation "hopper", got float64)");
  EXPECT_EQ(hopper_with([](auto& call) { call.num_experts = 1025; }),
            R"(the number of experts must be at most 1024 for implementation "hopper", got 1025)");
  EXPECT_EQ(hopper_with([](auto& call) { call.hidden_size = 32; }),
            R"(hidden_size must be a multiple of 64 for implementation "hopper", got 32)");
  EXPECT_EQ(hopper_with([](auto& call) { call.intermediate_size = 72; }),
            R"(intermediate_size must be a multiple of 64 for implementation "hopper", got 72)");

  const auto grouped_mm_with = [&](auto change) {
    GroupedMlpCall call = call_on(true);
    change(call);
    return refused("grouped_mm", call);
  };
  EXPECT_EQ(grouped_mm_with([](auto& call) { call.data_type = ScalarType::kFloat16; }),
            R"(w13_weight must be bfloat16 for implementation "grouped_mm", got float16)");
  EXPECT_EQ(grouped_mm_with([](auto& call) { call.num_experts = 1024; }),
            R"(the number of experts must be at most 1023 for implementation "grouped_mm", got 1024)");
  EXPECT_EQ(grouped_mm_with([](auto& call) { call.hidden_size = 12; }),
            R"(hidden_size must be a multiple of 8 for implementation "grouped_mm", got 12)");
  EXPECT_EQ(grouped_mm_with([](auto& call) { call.intermediate_size = 12; }),
            R"(intermediate_size must be a multiple of 8 for implementation "grouped_mm", got 12)");
}

}  // namespace
}  // namespace zexpert
