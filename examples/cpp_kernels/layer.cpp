// SPDX-License-Identifier: Apache-2.0
// A mixture-of-experts layer with zero experts, made of zexpert's CPU kernels on plain pointers: no PyTorch, no Python.
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "zexpert/biased_topk.h"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/moe_permute.h"
#include "zexpert/moe_plan.h"

namespace {

// Sizes: LongCat-Flash's proportions, much smaller.
constexpr int64_t kTokens = 64, kHidden = 96, kIntermediate = 32, kTopK = 12;
constexpr int64_t kRealExperts = 64, kZeroExperts = 32, kExperts = kRealExperts + kZeroExperts;

std::vector<float> random_values(int64_t count, float scale) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal(0.0F, scale);
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

struct Weights {
  std::vector<float> w13 = random_values(kRealExperts * 2 * kIntermediate * kHidden, 0.1F);  // gate rows, up rows
  std::vector<float> w2 = random_values(kRealExperts * kHidden * kIntermediate, 0.1F);
  std::vector<float> bias = random_values(kExperts, 0.01F);  // for selection only
};

/// What the kernels write; an engine would keep it from call to call.
struct Buffers {
  std::vector<float> topk_weights = std::vector<float>(kTokens * kTopK);
  std::vector<int32_t> topk_ids = std::vector<int32_t>(kTokens * kTopK);
  std::vector<float> zero_weight = std::vector<float>(kTokens);
  std::vector<int32_t> expert_offsets = std::vector<int32_t>(kRealExperts + 1);
  std::vector<int32_t> row_slots = std::vector<int32_t>(kTokens * kTopK);
  std::vector<int32_t> slot_rows = std::vector<int32_t>(kTokens * kTopK);
  std::vector<float> rows = std::vector<float>(kTokens * kTopK * kHidden);
  std::vector<float> expert_rows = std::vector<float>(kTokens * kTopK * kHidden);
  std::vector<float> out = std::vector<float>(kTokens * kHidden);
};

void run_layer(const std::vector<float>& hidden_states, const std::vector<float>& logits, const Weights& weights,
               Buffers& buffers) {
  // Routing: weights, ids (-1 for a slot that chose a zero expert) and the zero experts' summed weight.
  zexpert::RoutingSpec spec;
  spec.top_k = kTopK;
  spec.num_real_experts = kRealExperts;
  spec.routed_scaling_factor = 6.0;
  zexpert::BiasedTopKParams routing;
  routing.logits = logits.data();
  routing.logits_row_stride = kExperts;
  routing.bias = weights.bias.data();
  routing.topk_weights = buffers.topk_weights.data();
  routing.topk_ids = buffers.topk_ids.data();
  routing.zero_weight = buffers.zero_weight.data();
  routing.num_tokens = kTokens;
  routing.spec = spec.for_width(kExperts);
  zexpert::biased_topk_cpu(routing);

  // Plan: the slots that do work, sorted by expert.
  zexpert::MoePlanParams plan;
  plan.topk_ids = buffers.topk_ids.data();
  plan.expert_offsets = buffers.expert_offsets.data();
  plan.row_slots = buffers.row_slots.data();
  plan.slot_rows = buffers.slot_rows.data();
  plan.num_slots = kTokens * kTopK;
  plan.num_experts = kRealExperts;
  zexpert::moe_plan_cpu(plan);
  const int64_t num_rows = buffers.expert_offsets.back();

  // Experts: gather the rows of each expert's tokens, then run each expert's network over its rows.
  zexpert::MoePermuteParams permute;
  permute.hidden_states = hidden_states.data();
  permute.row_slots = buffers.row_slots.data();
  permute.rows = buffers.rows.data();
  permute.num_rows = num_rows;
  permute.num_tokens = kTokens;
  permute.top_k = kTopK;
  permute.hidden_size = kHidden;
  permute.hidden_row_stride = kHidden;
  zexpert::moe_permute_cpu(permute);

  zexpert::GroupedMlpParams experts;
  experts.rows = buffers.rows.data();
  experts.expert_offsets = buffers.expert_offsets.data();
  experts.w13_weight = weights.w13.data();
  experts.w2_weight = weights.w2.data();
  experts.out = buffers.expert_rows.data();
  experts.num_rows = num_rows;
  experts.num_experts = kRealExperts;
  experts.hidden_size = kHidden;
  experts.intermediate_size = kIntermediate;
  experts.rows_row_stride = kHidden;
  experts.out_row_stride = kHidden;
  experts.w13_expert_stride = 2 * kIntermediate * kHidden;
  experts.w2_expert_stride = kHidden * kIntermediate;
  zexpert::grouped_mlp_cpu(experts);

  // Epilogue: the weighted sum of a token's rows and its zero experts' part, in one pass.
  zexpert::MoeFinalizeParams finalize;
  finalize.rows = buffers.expert_rows.data();
  finalize.slot_rows = buffers.slot_rows.data();
  finalize.topk_weights = buffers.topk_weights.data();
  finalize.hidden_states = hidden_states.data();
  finalize.zero_weight = buffers.zero_weight.data();
  finalize.out = buffers.out.data();
  finalize.num_rows = num_rows;
  finalize.num_tokens = kTokens;
  finalize.top_k = kTopK;
  finalize.hidden_size = kHidden;
  finalize.rows_row_stride = kHidden;
  finalize.hidden_row_stride = kHidden;
  finalize.out_row_stride = kHidden;
  zexpert::moe_finalize_cpu(finalize);
}

/// One element of the layer's output by its formula, in double.
double expected_output(int64_t token, int64_t channel, const std::vector<float>& hidden_states, const Weights& weights,
                       const Buffers& buffers) {
  const float* x = &hidden_states[static_cast<size_t>(token * kHidden)];
  double sum = static_cast<double>(buffers.zero_weight[static_cast<size_t>(token)]) * x[channel];
  for (int64_t slot = token * kTopK; slot < (token + 1) * kTopK; ++slot) {
    const int64_t expert = buffers.topk_ids[static_cast<size_t>(slot)];
    if (expert < 0)
      continue;
    double output = 0.0;
    for (int64_t f = 0; f < kIntermediate; ++f) {
      const float* gate = &weights.w13[static_cast<size_t>((expert * 2 * kIntermediate + f) * kHidden)];
      const float* up = gate + kIntermediate * kHidden;
      double g = 0.0, u = 0.0;
      for (int64_t h = 0; h < kHidden; ++h) {
        g += static_cast<double>(gate[h]) * x[h];
        u += static_cast<double>(up[h]) * x[h];
      }
      const float down = weights.w2[static_cast<size_t>((expert * kHidden + channel) * kIntermediate + f)];
      output += g / (1.0 + std::exp(-g)) * u * down;
    }
    sum += static_cast<double>(buffers.topk_weights[static_cast<size_t>(slot)]) * output;
  }
  return sum;
}

}  // namespace

int main() {
  const std::vector<float> hidden_states = random_values(kTokens * kHidden, 1.0F);
  const std::vector<float> logits = random_values(kTokens * kExperts, 1.0F);
  const Weights weights;
  Buffers buffers;
  try {
    double fastest = HUGE_VAL;  // microseconds
    for (int repeat = 0; repeat < 20; ++repeat) {
      const auto begin = std::chrono::steady_clock::now();
      run_layer(hidden_states, logits, weights, buffers);
      const std::chrono::duration<double, std::micro> time = std::chrono::steady_clock::now() - begin;
      fastest = std::fmin(fastest, time.count());
    }
    std::printf("%d of %lld slots chose an expert that does work; the layer took %.0f us\n",
                buffers.expert_offsets.back(), static_cast<long long>(kTokens * kTopK), fastest);
  } catch (const zexpert::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return EXIT_FAILURE;
  }

  double worst = 0.0;
  for (int64_t token = 0; token < kTokens; ++token) {
    for (int64_t channel = 0; channel < kHidden; ++channel) {
      const double expected = expected_output(token, channel, hidden_states, weights, buffers);
      worst = std::fmax(worst, std::abs(buffers.out[static_cast<size_t>(token * kHidden + channel)] - expected));
    }
  }
  std::printf("largest difference from the formula in double: %.1e\n", worst);
  return worst < 1e-5 ? EXIT_SUCCESS : EXIT_FAILURE;
}
