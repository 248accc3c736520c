// SPDX-License-Identifier: Apache-2.0
// Routing and epilogue on a GPU with zexpert's CUDA kernels on plain device pointers, compared with the CPU kernels.
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

#include "zexpert/biased_topk.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/moe_plan.h"

namespace {

constexpr int64_t kTokens = 1024, kHidden = 256, kTopK = 12;
constexpr int64_t kRealExperts = 512, kExperts = 768;

void check(cudaError_t status) {
  if (status != cudaSuccess)
    throw std::runtime_error(cudaGetErrorString(status));
}

/// Device memory for `count` values.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) { check(cudaMalloc(&data_, count * sizeof(T))); }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    check(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> to_host() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  void* data_ = nullptr;
  size_t count_;
};

std::vector<float> random_values(int64_t count) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

zexpert::BiasedTopKParams routing_params(const float* logits, float* topk_weights, int32_t* topk_ids,
                                         float* zero_weight) {
  zexpert::RoutingSpec spec;
  spec.top_k = kTopK;
  spec.num_real_experts = kRealExperts;
  spec.routed_scaling_factor = 6.0;
  zexpert::BiasedTopKParams params;
  params.logits = logits;
  params.logits_row_stride = kExperts;
  params.topk_weights = topk_weights;
  params.topk_ids = topk_ids;
  params.zero_weight = zero_weight;
  params.num_tokens = kTokens;
  params.spec = spec.for_width(kExperts);
  return params;
}

zexpert::MoeFinalizeParams finalize_params(const float* rows, const int32_t* slot_rows, const float* topk_weights,
                                           const float* hidden_states, const float* zero_weight, float* out) {
  zexpert::MoeFinalizeParams params;
  params.rows = rows;
  params.slot_rows = slot_rows;
  params.topk_weights = topk_weights;
  params.hidden_states = hidden_states;
  params.zero_weight = zero_weight;
  params.out = out;
  params.num_rows = kTokens * kTopK;
  params.num_tokens = kTokens;
  params.top_k = kTopK;
  params.hidden_size = kHidden;
  params.rows_row_stride = kHidden;
  params.hidden_row_stride = kHidden;
  params.out_row_stride = kHidden;
  return params;
}

bool run() {
  const std::vector<float> logits = random_values(kTokens * kExperts);
  const std::vector<float> hidden_states = random_values(kTokens * kHidden);
  const std::vector<float> rows = random_values(kTokens * kTopK * kHidden);  // what experts would have made

  // On the GPU: the kernels go to the stream one after the other and wait for nothing.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream));
  const DeviceArray<float> device_logits(logits), device_hidden(hidden_states), device_rows(rows);
  const DeviceArray<float> topk_weights(kTokens * kTopK), zero_weight(kTokens), out(kTokens * kHidden);
  const DeviceArray<int32_t> topk_ids(kTokens * kTopK), expert_offsets(kRealExperts + 1);
  const DeviceArray<int32_t> row_slots(kTokens * kTopK), slot_rows(kTokens * kTopK);
  zexpert::biased_topk_cuda(
      routing_params(device_logits.data(), topk_weights.data(), topk_ids.data(), zero_weight.data()), stream);
  zexpert::MoePlanParams plan;
  plan.topk_ids = topk_ids.data();
  plan.expert_offsets = expert_offsets.data();
  plan.row_slots = row_slots.data();
  plan.slot_rows = slot_rows.data();
  plan.num_slots = kTokens * kTopK;
  plan.num_experts = kRealExperts;
  const DeviceArray<char> workspace(static_cast<size_t>(zexpert::moe_plan_cuda_workspace_bytes(plan)));
  plan.workspace = workspace.data();
  zexpert::moe_plan_cuda(plan, stream);
  zexpert::moe_finalize_cuda(finalize_params(device_rows.data(), slot_rows.data(), topk_weights.data(),
                                             device_hidden.data(), zero_weight.data(), out.data()),
                             stream);
  check(cudaStreamSynchronize(stream));

  // On the CPU.
  std::vector<float> cpu_weights(kTokens * kTopK), cpu_zero_weight(kTokens), cpu_out(kTokens * kHidden);
  std::vector<int32_t> cpu_ids(kTokens * kTopK);
  zexpert::biased_topk_cpu(routing_params(logits.data(), cpu_weights.data(), cpu_ids.data(), cpu_zero_weight.data()));
  const std::vector<int32_t> planned = slot_rows.to_host();
  zexpert::moe_finalize_cpu(finalize_params(rows.data(), planned.data(), cpu_weights.data(), hidden_states.data(),
                                            cpu_zero_weight.data(), cpu_out.data()));

  const std::vector<float> gpu_out = out.to_host();
  float worst = 0.0F;
  for (size_t i = 0; i < gpu_out.size(); ++i) worst = std::fmax(worst, std::abs(gpu_out[i] - cpu_out[i]));
  const bool same_choice = topk_ids.to_host() == cpu_ids;
  std::printf(
      "%d of %lld slots chose an expert that does work; the same choice on the CPU: %s; outputs differ by %.1e\n",
      expert_offsets.to_host().back(), static_cast<long long>(kTokens * kTopK), same_choice ? "yes" : "no",
      static_cast<double>(worst));
  check(cudaStreamDestroy(stream));
  return same_choice && worst < 1e-5F;
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device\n");
    return 77;  // "skipped" to test drivers
  }
  try {
    return run() ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return EXIT_FAILURE;
  }
}
