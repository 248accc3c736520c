// SPDX-License-Identifier: Apache-2.0
#include "zexpert/dequantize_blockwise.h"

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

Tensor dequantize_blockwise(const Tensor& weight, const Tensor& scale_inv, DType dtype) {
  const CurrentDevice device(weight);
  check_device(scale_inv, "scale_inv", weight, "weight");
  check_memory(weight, "weight");
  check_dtype(weight, "weight", DType::Float8_e4m3fn);
  check_dtype(scale_inv, "scale_inv", DType::Float);
  ZEXPERT_CHECK(is_floating(dtype), "dtype must be float32, float64, bfloat16 or float16, got ", text(dtype));
  check_dims(weight, "weight", 3, "[matrices, rows, columns]");
  check_shape(scale_inv, "scale_inv",
              {weight.size(0), num_scale_blocks(weight.size(1)), num_scale_blocks(weight.size(2))},
              "[matrices, ceil(rows / 128), ceil(columns / 128)]");

  const Tensor source = with_contiguous_matrices(weight);
  const Tensor scales = with_contiguous_matrices(scale_inv);
  const Tensor out = empty({weight.size(0), weight.size(1), weight.size(2)}, dtype, weight);
  DequantizeBlockwiseParams params;
  params.weight = source.const_data_ptr();
  params.scale_inv = scales.const_data_ptr<float>();
  params.out = out.mutable_data_ptr();
  params.data_type = element_type(out);
  params.num_matrices = source.size(0);
  params.num_rows = source.size(1);
  params.num_columns = source.size(2);
  params.weight_matrix_stride = source.stride(0);
  params.scale_matrix_stride = scales.stride(0);
  ZEXPERT_LAUNCH(dequantize_blockwise, params, device);
  return out;
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("dequantize_blockwise", ZEXPERT_BOX(&dequantize_blockwise)); }

ZEXPERT_DEVICE_NAMESPACE_END
