// SPDX-License-Identifier: Apache-2.0
// Where an op's kernels go: the device of its tensors and PyTorch's current stream there.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "torch/tensor.h"
#include "zexpert/cuda_stream.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Makes the device of `tensor` current for as long as it lives.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {}

  /// PyTorch's current stream on the device.
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

/// Where contiguous offsets in device memory hold the number of rows that do work.
inline const int32_t* last_offset_pointer(const Tensor& expert_offsets) {
  return expert_offsets.const_data_ptr<int32_t>() + expert_offsets.size(0) - 1;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
