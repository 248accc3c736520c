// SPDX-License-Identifier: Apache-2.0
#include "zexpert/router_logits.h"

#include <cstdint>
#include <vector>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/router_logits.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

constexpr int64_t kAlignment = 16;  // bytes, of rows that the GPU's copy engine reads

/// A matrix of rows that do not overlap, each with unit inner stride, on CUDA at multiples of kAlignment where its size
/// allows that: how a matrix is laid out must not change how it is multiplied.
struct Rows {
  Tensor tensor;
  int64_t num_rows = 0;
  int64_t stride = 0;

  explicit Rows(const Tensor& given) : tensor(given) {
    const int64_t size = given.size(given.dim() - 1);
    num_rows = size == 0 ? 0 : given.numel() / size;
    if (!find_stride(size)) {
      tensor = dense_copy(given);
      find_stride(size);
    }
  }

 private:
  bool find_stride(int64_t size) {
    const bool is_matrix = tensor.dim() == 2 && num_rows > 1;
    stride = is_matrix ? tensor.stride(0) : size;
    const auto element_size = static_cast<int64_t>(tensor.element_size());
    const bool is_aligned = !kIsCuda || size * element_size % kAlignment != 0 ||
                            (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % kAlignment == 0 &&
                             stride * element_size % kAlignment == 0);
    const bool has_rows = is_matrix ? has_unit_inner_stride(tensor) && stride >= size : tensor.is_contiguous();
    return has_rows && is_aligned;
  }
};

void check_dtypes(const Tensor& hidden_states, const Tensor& weight) {
  const DType data = hidden_states.scalar_type();
  if (kIsCuda) {
    check_memory(hidden_states, "hidden_states");
    ZEXPERT_CHECK(is_floating(data) && data != DType::Double,
                  "hidden_states must be float32, bfloat16 or float16 on CUDA, got ", text(data));
  }
  check_floating(hidden_states, "hidden_states");
  const DType dtype = weight.scalar_type();
  ZEXPERT_CHECK(is_floating(dtype) && (dtype != DType::Double || data == DType::Double), "weight must be float32, ",
                data == DType::Double ? "float64, " : "", "bfloat16 or float16 with ", text(data),
                " hidden_states, got ", text(dtype));
}

}  // namespace

Tensor router_logits(const Tensor& hidden_states, const Tensor& weight) {
  const CurrentDevice device(hidden_states);
  check_device(weight, "weight", hidden_states, "hidden_states");
  check_dtypes(hidden_states, weight);
  ZEXPERT_CHECK(hidden_states.dim() >= 1, "hidden_states must have at least 1 dimension [..., hidden_size], got shape ",
                text(hidden_states.sizes()));
  check_dims(weight, "weight", 2, "[experts, hidden_size]");
  const int64_t hidden_size = hidden_states.size(hidden_states.dim() - 1);
  check_shape(weight, "weight", {weight.size(0), hidden_size}, "[experts, hidden_size]");

  const DType logits_dtype = weight_dtype(hidden_states.scalar_type());
  std::vector<int64_t> sizes(hidden_states.sizes().begin(), hidden_states.sizes().end());
  sizes.back() = weight.size(0);
  const Tensor logits = torch::stable::new_empty(hidden_states, sizes, logits_dtype);
  const Rows tokens(hidden_states);
  const Rows experts(weight.scalar_type() == logits_dtype ? weight : dense_copy(weight, logits_dtype));
  RouterLogitsParams params;
  params.hidden_states = tokens.tensor.const_data_ptr();
  params.weight = experts.tensor.const_data_ptr();
  params.logits = logits.mutable_data_ptr();
  params.data_type = element_type(hidden_states);
  params.num_tokens = weight.size(0) == 0 ? 0 : logits.numel() / weight.size(0);
  params.hidden_size = hidden_size;
  params.num_experts = weight.size(0);
  params.hidden_row_stride = tokens.stride;
  params.weight_row_stride = experts.stride;
  const int64_t workspace_bytes = ZEXPERT_WORKSPACE_BYTES(router_logits, params);
  const Tensor workspace = empty({workspace_bytes}, DType::Byte, hidden_states);
  params.workspace = workspace_bytes == 0 ? nullptr : workspace.mutable_data_ptr();
  ZEXPERT_LAUNCH(router_logits, params, device);
  return logits;
}

ZEXPERT_OPERATORS(m) { m.impl("router_logits", ZEXPERT_BOX(&router_logits)); }

ZEXPERT_DEVICE_NAMESPACE_END
