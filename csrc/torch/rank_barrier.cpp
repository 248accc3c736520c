// SPDX-License-Identifier: Apache-2.0
#include "zexpert/rank_barrier.h"

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/rank_arrays.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

void rank_barrier(const TensorList& signals, const Tensor& epoch, const Tensor& validity, const Tensor& absent_rank,
                  int64_t rank, int64_t timeout_ms) {
  check_ranks(signals, "signals", rank);
  const CurrentDevice device(signals[0]);
  const auto num_ranks = static_cast<int64_t>(signals.size());
  check_device(epoch, "epoch", signals[0], "signals");
  check_device(validity, "validity", signals[0], "signals");
  check_defined(absent_rank, "absent_rank");
  ZEXPERT_CHECK(absent_rank.device().type() == torch::headeronly::DeviceType::CPU,
                "absent_rank must be on cpu, in pinned memory with signals on CUDA, got ", text(absent_rank.device()));
  check_rank_tensors(signals, "signals", num_ranks, signals[0], "signals", DType::Long, {num_ranks}, "[ranks]");
  check_dtype(epoch, "epoch", DType::Long);
  check_dtype(validity, "validity", DType::Float);
  check_dtype(absent_rank, "absent_rank", DType::Int);
  check_shape(epoch, "epoch", {1}, "[1]");
  check_shape(validity, "validity", {1}, "[1]");
  check_shape(absent_rank, "absent_rank", {1}, "[1]");
  RankBarrierParams params;
  params.signals = rank_arrays(signals);
  params.epoch = epoch.mutable_data_ptr<int64_t>();
  params.validity = validity.mutable_data_ptr<float>();
  params.absent_rank = absent_rank.mutable_data_ptr<int32_t>();
  params.rank = rank;
  params.num_ranks = num_ranks;
  params.timeout_ms = timeout_ms;
  ZEXPERT_LAUNCH(rank_barrier, params, device);
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("rank_barrier", ZEXPERT_BOX(&rank_barrier)); }

ZEXPERT_DEVICE_NAMESPACE_END
