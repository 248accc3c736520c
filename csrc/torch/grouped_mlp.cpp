// grouped_mlp on the CPU: experts with few rows in one call of zexpert's kernel, which streams their weights; experts
// with many rows one by one through torch's matrix product, which packs them.
#include "torch/grouped_mlp.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>

#include "zexpert/silu_and_mul.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

/// A [num_rows, num_columns] matrix somewhere in memory that its owner keeps alive.
struct Matrix {
  const void* data;
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;
};

/// Views of memory that belongs to the tensors of a call, so no autograd graph hangs on them.
class Views {
 public:
  explicit Views(const Tensor& like) : device_(like.device()), dtype_(like.scalar_type()) {}

  Tensor of(const Matrix& matrix) const {
    return view(matrix, {matrix.num_rows, matrix.num_columns}, {matrix.row_stride, 1});
  }

  Tensor transposed(const Matrix& matrix) const {
    return view(matrix, {matrix.num_columns, matrix.num_rows}, {1, matrix.row_stride});
  }

 private:
  Tensor view(const Matrix& matrix, std::array<int64_t, 2> sizes, std::array<int64_t, 2> strides) const {
    return torch::stable::from_blob(const_cast<void*>(matrix.data), sizes, strides, device_, dtype_);
  }

  torch::stable::Device device_;
  DType dtype_;
};

/// out = a @ b.T through torch's matrix product.
void multiply_by_transposed(const Views& views, const Matrix& a, const Matrix& b, const Matrix& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(views.of(a)), from(views.transposed(b)), from(views.of(out))};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // the result is a reference to out that is ours to release
}

/// The element at `offset` of an array of elements `element_size` bytes each.
const void* at(const void* data, int64_t offset, int64_t element_size) {
  return static_cast<const char*>(data) + offset * element_size;
}

/// Every segment of more than kFewRows rows.
void long_segments(const GroupedMlpParams& params, const Tensor& out) {
  int64_t longest = 0;
  for (int64_t expert = 0; expert < params.num_experts; ++expert) {
    longest = std::max<int64_t>(longest, params.expert_offsets[expert + 1] - params.expert_offsets[expert]);
  }
  if (longest <= kFewRows) {
    return;
  }

  const Views views(out);
  const auto element_size = static_cast<int64_t>(out.element_size());
  const int64_t hidden_size = params.hidden_size;
  const int64_t intermediate_size = params.intermediate_size;
  const Tensor gate_up_scratch = empty({longest, 2 * intermediate_size}, out.scalar_type(), out);
  const Tensor activation_scratch = empty({longest, intermediate_size}, out.scalar_type(), out);
  void* const gate_up_data = gate_up_scratch.mutable_data_ptr();
  void* const activation_data = activation_scratch.mutable_data_ptr();

  for (int64_t expert = 0; expert < params.num_experts; ++expert) {
    const int64_t first = params.expert_offsets[expert];
    const int64_t num_rows = params.expert_offsets[expert + 1] - first;
    if (num_rows <= kFewRows) {
      continue;
    }
    const Matrix rows{at(params.rows, first * params.rows_row_stride, element_size), num_rows, hidden_size,
                      params.rows_row_stride};
    const Matrix w13{at(params.w13_weight, expert * params.w13_expert_stride, element_size), 2 * intermediate_size,
                     hidden_size, hidden_size};
    const Matrix gate_up{gate_up_data, num_rows, 2 * intermediate_size, 2 * intermediate_size};
    multiply_by_transposed(views, rows, w13, gate_up);

    SiluAndMulParams activation_params;
    activation_params.gate_up = gate_up_data;
    activation_params.out = activation_data;
    activation_params.data_type = params.data_type;
    activation_params.num_rows = num_rows;
    activation_params.intermediate_size = intermediate_size;
    activation_params.gate_up_row_stride = 2 * intermediate_size;
    activation_params.out_row_stride = intermediate_size;
    silu_and_mul_cpu(activation_params);

    const Matrix activation{activation_data, num_rows, intermediate_size, intermediate_size};
    const Matrix w2{at(params.w2_weight, expert * params.w2_expert_stride, element_size), hidden_size,
                    intermediate_size, intermediate_size};
    const Matrix out_rows{at(params.out, first * params.out_row_stride, element_size), num_rows, hidden_size,
                          params.out_row_stride};
    multiply_by_transposed(views, activation, w2, out_rows);
  }
}

Tensor grouped_mlp_on_cpu(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight,
                          const Tensor& w2_weight) {
  return grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, [](GroupedMlpParams params, const Tensor& out) {
    // An empty matrix may have no address to make a view of.
    const bool streams_all = params.intermediate_size == 0;
    params.max_rows = streams_all ? params.num_rows : kFewRows;
    grouped_mlp_cpu(params);
    if (!streams_all) {
      long_segments(params, out);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("grouped_mlp", TORCH_BOX(&grouped_mlp_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
