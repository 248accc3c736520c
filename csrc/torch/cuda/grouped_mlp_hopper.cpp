// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/library.h>

#include "torch/cuda/stream.h"
#include "torch/grouped_mlp.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor grouped_mlp_hopper_on_cuda(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight,
                                  const Tensor& w2_weight, int64_t tile_rows) {
  const CurrentDevice device(rows);
  return grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, [&](const GroupedMlpParams& mlp, const Tensor& out) {
    GroupedMlpHopperParams params;
    params.mlp = mlp;
    params.tile_rows = tile_rows;
    const Tensor workspace = empty({grouped_mlp_hopper_workspace_bytes(params)}, DType::Byte, out);
    params.workspace = workspace.mutable_data_ptr();
    grouped_mlp_hopper(params, device.stream());
  });
}

bool is_hopper(const Tensor& tensor) {
  const CurrentDevice device(tensor);
  return runs_grouped_mlp_hopper();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("grouped_mlp_hopper", TORCH_BOX(&grouped_mlp_hopper_on_cuda));
  m.impl("is_hopper", TORCH_BOX(&is_hopper));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
