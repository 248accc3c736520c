// SPDX-License-Identifier: Apache-2.0
#include "zexpert/quantize_blockwise.h"

#include <tuple>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& weight) {
  const CurrentDevice device(weight);
  check_floating(weight, "weight");
  check_dims(weight, "weight", 3, "[matrices, rows, columns]");

  const Tensor source = with_contiguous_matrices(weight);
  const Tensor out = empty({weight.size(0), weight.size(1), weight.size(2)}, DType::Float8_e4m3fn, weight);
  const Tensor scale_inv =
      empty({weight.size(0), num_scale_blocks(weight.size(1)), num_scale_blocks(weight.size(2))}, DType::Float, weight);
  QuantizeBlockwiseParams params;
  params.weight = source.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.scale_inv = scale_inv.mutable_data_ptr<float>();
  params.data_type = element_type(source);
  params.num_matrices = source.size(0);
  params.num_rows = source.size(1);
  params.num_columns = source.size(2);
  params.weight_matrix_stride = source.stride(0);
  ZEXPERT_LAUNCH(quantize_blockwise, params, device);
  return {out, scale_inv};
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("quantize_blockwise", ZEXPERT_BOX(&quantize_blockwise)); }

ZEXPERT_DEVICE_NAMESPACE_END
