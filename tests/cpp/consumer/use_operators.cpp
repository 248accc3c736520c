// SPDX-License-Identifier: Apache-2.0
// The operators in a process without Python: linking zexpert::zexpert registers them with PyTorch's dispatcher.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>

using torch::stable::Tensor;
namespace stack_value = torch::stable::detail;

int main() {
  const std::array<int64_t, 2> shape = {1, 3};
  const Tensor topk_ids = torch::stable::empty(shape, torch::headeronly::ScalarType::Int, std::nullopt,
                                               torch::stable::Device(torch::headeronly::DeviceType::CPU));
  auto* ids = topk_ids.mutable_data_ptr<int32_t>();
  ids[0] = 1;
  ids[1] = -1;
  ids[2] = 0;

  // Arguments going in, results coming out.
  std::array<StableIValue, 3> stack = {stack_value::from(topk_ids), stack_value::from(int64_t{2})};
  if (torch_call_dispatcher("zexpert::moe_plan", "", stack.data(), TORCH_FEATURE_VERSION) != 0) {
    return 1;
  }
  const auto row_slots = stack_value::to<Tensor>(stack[1]);
  const auto* slots = row_slots.const_data_ptr<int32_t>();
  return slots[0] == 2 && slots[1] == 0 && slots[2] == -1 ? 0 : 1;
}
