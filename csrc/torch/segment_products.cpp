// SPDX-License-Identifier: Apache-2.0
#include "torch/segment_products.h"

#include "cpu/expert_offsets.h"
#include "torch/device.h"
#include "torch/expert_matrices.h"
#include "zexpert/zero_idle.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// The matrices, or their transposes.
Tensor view_of(const Tensor& matrices, bool transposed) {
  const Tensor view = detached(matrices);
  return transposed ? torch::stable::transpose(view, -2, -1) : view;
}

/// Where the experts' segments end.
Tensor segment_ends(const Tensor& expert_offsets) {
  Tensor offsets = expert_offsets;
  return torch::stable::narrow(offsets, 0, 1, offsets.size(0) - 1);
}

Matrix matrix_of(const MatrixProduct& multiply, const Tensor& tensor, int64_t first, int64_t num_rows) {
  return multiply.matrix(tensor.const_data_ptr(), first * tensor.stride(0), num_rows, tensor.size(1), tensor.stride(0));
}

/// The offsets for the host to read. From a GPU, it waits for them.
Tensor in_host_memory(const Tensor& expert_offsets) {
#ifdef ZEXPERT_FOR_CUDA
  ZEXPERT_CHECK(
      !is_capturing(CurrentDevice(expert_offsets).stream()),
      "implementation must be \"hopper\" or \"grouped_mm\" while a CUDA graph is captured, got \"torch\", which "
      "waits for the device");
  return torch::stable::to(expert_offsets, torch::stable::Device(torch::headeronly::DeviceType::CPU));
#else
  return expert_offsets;
#endif
}

/// Calls fn(expert, first_row, num_rows) for the experts that have rows.
template <typename Fn>
void for_each_segment(const Tensor& host_offsets, const Fn& fn) {
  const auto* offsets = host_offsets.const_data_ptr<int32_t>();
  for (int64_t expert = 0; expert + 1 < host_offsets.size(0); ++expert) {
    if (offsets[expert] < offsets[expert + 1]) {
      fn(expert, int64_t{offsets[expert]}, int64_t{offsets[expert + 1]} - offsets[expert]);
    }
  }
}

}  // namespace

SegmentProducts::SegmentProducts(GroupedMlpImplementation implementation, const Tensor& expert_offsets,
                                 int64_t num_rows)
    : expert_offsets_(expert_offsets) {
  if (implementation != GroupedMlpImplementation::kTorch) {
    return;
  }
  host_offsets_ = in_host_memory(expert_offsets);
  check_expert_offsets(host_offsets_->const_data_ptr<int32_t>(), num_experts(), num_rows);
}

Tensor SegmentProducts::with_transposed(const Tensor& rows, const ExpertWeight& matrices) const {
  return multiply_all(rows, matrices, true);
}

Tensor SegmentProducts::with_matrices(const Tensor& rows, const ExpertWeight& matrices) const {
  return multiply_all(rows, matrices, false);
}

Tensor SegmentProducts::multiply_all(const Tensor& rows, const ExpertWeight& matrices, bool transposed) const {
  if (!host_offsets_) {
    return grouped_mm(view_of(rows, false), view_of(matrices.weight, transposed));
  }
  const Tensor result = empty({rows.size(0), matrices.weight.size(transposed ? 1 : 2)}, rows.scalar_type(), rows);
  const MatrixProduct multiply(rows);
  const ExpertMatrices matrix_of_expert(matrices, rows);
  for_each_segment(*host_offsets_, [&](int64_t expert, int64_t first, int64_t num_rows) {
    const Matrix matrix = matrix_of_expert(expert);
    multiply(matrix_of(multiply, rows, first, num_rows), transposed ? matrix.transposed() : matrix,
             matrix_of(multiply, result, first, num_rows));
  });
  return result;
}

Tensor SegmentProducts::between(const Tensor& left, const Tensor& right) const {
  const auto zero_idle_experts = [&](const Tensor& result) {
    const CurrentDevice device(result);
    ZeroIdleExpertsParams params;
    params.data = result.mutable_data_ptr();
    params.expert_offsets = expert_offsets_.const_data_ptr<int32_t>();
    params.data_type = element_type(result);
    params.num_experts = num_experts();
    params.expert_size = result.size(1) * result.size(2);
    ZEXPERT_LAUNCH(zero_idle_experts, params, device);
    return result;
  };
  if (!host_offsets_) {
    // On some GPUs the product leaves the experts without rows as they are.
    return zero_idle_experts(grouped_mm(view_of(left, true), view_of(right, false)));
  }
  const Tensor result = empty({num_experts(), left.size(1), right.size(1)}, left.scalar_type(), left);
  const MatrixProduct multiply(left);
  for_each_segment(*host_offsets_, [&](int64_t expert, int64_t first, int64_t num_rows) {
    multiply(matrix_of(multiply, left, first, num_rows).transposed(), matrix_of(multiply, right, first, num_rows),
             multiply.matrix(result.const_data_ptr(), expert * result.stride(0), result.size(1), result.size(2),
                             result.size(2)));
  });
  return zero_idle_experts(result);
}

Tensor SegmentProducts::grouped_mm(const Tensor& left, const Tensor& right) const {
  using torch::stable::detail::from;
  std::array<StableIValue, 5> stack{from(left), from(right), from(std::optional<Tensor>(segment_ends(expert_offsets_))),
                                    from(std::optional<Tensor>()), from(std::optional<DType>())};
  const AOTITorchError status = torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION);
  ZEXPERT_CHECK(status == TORCH_SUCCESS, "PyTorch's grouped_mm could not multiply tensors of shapes ",
                text(left.sizes()), " and ", text(right.sizes()), " of ", text(left.scalar_type()), " on ",
                text(left.device()), "; the memory may be full");
  return torch::stable::detail::to<Tensor>(stack[0]);
}

ZEXPERT_DEVICE_NAMESPACE_END
