// SPDX-License-Identifier: Apache-2.0
// The device that an operator's registration file is compiled for. Each file is compiled twice: into the CPU library,
// and with ZEXPERT_FOR_CUDA defined into the CUDA library.
//
//   ZEXPERT_DEVICE_NAMESPACE_BEGIN/END   a namespace for each device, since one library may hold both
//   ZEXPERT_OPERATORS(m) { ... }         registers implementations under the device's dispatch key
//   CurrentDevice                        makes the tensor's device current
//   ZEXPERT_LAUNCH(op, params, device)   calls op_cpu(params) or op_cuda(params, stream)
//   ZEXPERT_WORKSPACE_BYTES(op, params)  calls op_cpu_workspace_bytes(params) or op_cuda_workspace_bytes(params)
#pragma once

#include <torch/csrc/stable/library.h>

#include "torch/tensor.h"

#ifdef ZEXPERT_FOR_CUDA

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "zexpert/cuda_stream.h"

#define ZEXPERT_DEVICE_NAMESPACE_BEGIN HIDDEN_NAMESPACE_BEGIN(zexpert, ops, on_cuda)
#define ZEXPERT_DEVICE_NAMESPACE_END HIDDEN_NAMESPACE_END(zexpert, ops, on_cuda)
#define ZEXPERT_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m)
#define ZEXPERT_LAUNCH(op, params, device) op##_cuda(params, (device).stream())

ZEXPERT_DEVICE_NAMESPACE_BEGIN

inline constexpr bool kIsCuda = true;

/// Makes the device of `tensor` current for as long as this object lives.
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

ZEXPERT_DEVICE_NAMESPACE_END

#define ZEXPERT_WORKSPACE_BYTES(op, params) op##_cuda_workspace_bytes(params)

#else  // CPU

#define ZEXPERT_DEVICE_NAMESPACE_BEGIN HIDDEN_NAMESPACE_BEGIN(zexpert, ops, on_cpu)
#define ZEXPERT_DEVICE_NAMESPACE_END HIDDEN_NAMESPACE_END(zexpert, ops, on_cpu)
#define ZEXPERT_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m)
#define ZEXPERT_LAUNCH(op, params, device) (static_cast<void>(device), op##_cpu(params))

ZEXPERT_DEVICE_NAMESPACE_BEGIN

inline constexpr bool kIsCuda = false;

/// Nothing to make current.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& /*tensor*/) {}
};

ZEXPERT_DEVICE_NAMESPACE_END

#define ZEXPERT_WORKSPACE_BYTES(op, params) op##_cpu_workspace_bytes(params)

#endif
