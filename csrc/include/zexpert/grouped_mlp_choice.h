// SPDX-License-Identifier: Apache-2.0
// Which implementation computes the experts of a call. grouped_mlp and fused_moe choose with this function at every
// call, and kernel_plan prints its answer.
#pragma once

#include <cstdint>
#include <string>

#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

enum class GroupedMlpImplementation {
  kCpu,        ///< grouped_mlp_cpu, and PyTorch's matrix product for experts with many rows
  kHopper,     ///< grouped_mlp_cuda
  kGroupedMm,  ///< PyTorch's grouped matrix product: all experts in one launch
  kTorch,      ///< PyTorch's matrix product, expert by expert; a GPU's offsets are copied to the host. Quantised
               ///< weights are dequantised to the rows' type, expert by expert
};

/// The name that forces an implementation.
inline const char* name(GroupedMlpImplementation implementation) {
  switch (implementation) {
    case GroupedMlpImplementation::kCpu: return "cpu";
    case GroupedMlpImplementation::kHopper: return "hopper";
    case GroupedMlpImplementation::kGroupedMm: return "grouped_mm";
    case GroupedMlpImplementation::kTorch: return "torch";
  }
  return "unknown";
}

/// What a device offers.
struct GroupedMlpDevice {
  bool is_cuda = false;
  int64_t compute_capability = 0;  ///< of a GPU, 10 * major + minor
  bool has_hopper_code = false;    ///< the library was compiled for the architecture 9.0a
};

/// The device that is current in the CUDA library.
GroupedMlpDevice grouped_mlp_cuda_device();

/// What a call asks for.
enum class GroupedMlpTask {
  kForward,
  kForwardKeepingGateUp,  ///< for a backward that does not compute it again
  kBackward,
};

/// What the choice depends on.
struct GroupedMlpCall {
  GroupedMlpDevice device;
  GroupedMlpTask task = GroupedMlpTask::kForward;
  ScalarType data_type = ScalarType::kFloat32;  ///< of the rows
  int64_t num_experts = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  bool has_fp8_weights = false;  ///< float8_e4m3fn with scales; else weights are of data_type
};

// What PyTorch's grouped matrix product accepts.
inline constexpr int64_t kGroupedMmSizeStep = 8;  ///< hidden_size and intermediate_size are multiples of this
inline constexpr int64_t kGroupedMmMaxExperts = 1023;

namespace detail {

/// "a" or "b": what `implementation` may be where `device` computes.
inline const char* implementations_of(const GroupedMlpDevice& device) {
  return device.is_cuda ? "\"auto\", \"hopper\", \"grouped_mm\" or \"torch\" on a GPU"
                        : "\"auto\", \"cpu\" or \"torch\" on the CPU";
}

/// Whether the implementation's sizes and types fit; else calls report(parts...) with the first thing that does not.
template <typename Report>
bool fits_hopper(const GroupedMlpCall& call, const Report& report) {
  constexpr const char* kFor = " for implementation \"hopper\", got ";
  if (call.device.compute_capability != 90) {
    report("the GPU must be of compute capability 9.0", kFor, call.device.compute_capability / 10, ".",
           call.device.compute_capability % 10);
    return false;
  }
  if (!call.device.has_hopper_code) {
    report("zexpert must be compiled for the architecture 9.0a", kFor, "a build without it");
    return false;
  }
  if (call.task == GroupedMlpTask::kForwardKeepingGateUp) {
    report("keep_gate_up must be False", kFor, "True");
    return false;
  }
  if (call.task == GroupedMlpTask::kBackward) {
    report("implementation must be \"auto\", \"grouped_mm\" or \"torch\" for gradients, got \"hopper\"");
    return false;
  }
  if (call.has_fp8_weights && call.data_type != ScalarType::kBFloat16) {
    report("rows must be bfloat16 with float8_e4m3fn weights", kFor, name(call.data_type));
    return false;
  }
  if (call.data_type != ScalarType::kBFloat16 && call.data_type != ScalarType::kFloat16) {
    report("w13_weight must be bfloat16 or float16", kFor, name(call.data_type));
    return false;
  }
  if (call.num_experts > kHopperMaxExperts) {
    report("the number of experts must be at most ", kHopperMaxExperts, kFor, call.num_experts);
    return false;
  }
  if (call.hidden_size % kHopperSizeStep != 0) {
    report("hidden_size must be a multiple of ", kHopperSizeStep, kFor, call.hidden_size);
    return false;
  }
  if (call.intermediate_size % kHopperSizeStep != 0) {
    report("intermediate_size must be a multiple of ", kHopperSizeStep, kFor, call.intermediate_size);
    return false;
  }
  return true;
}

template <typename Report>
bool fits_grouped_mm(const GroupedMlpCall& call, const Report& report) {
  constexpr const char* kFor = " for implementation \"grouped_mm\", got ";
  if (call.has_fp8_weights) {
    report("w13_weight must be bfloat16", kFor, "float8_e4m3fn");
    return false;
  }
  if (call.data_type != ScalarType::kBFloat16) {
    report("w13_weight must be bfloat16", kFor, name(call.data_type));
    return false;
  }
  if (call.num_experts > kGroupedMmMaxExperts) {
    report("the number of experts must be at most ", kGroupedMmMaxExperts, kFor, call.num_experts);
    return false;
  }
  if (call.hidden_size % kGroupedMmSizeStep != 0) {
    report("hidden_size must be a multiple of ", kGroupedMmSizeStep, kFor, call.hidden_size);
    return false;
  }
  if (call.intermediate_size % kGroupedMmSizeStep != 0) {
    report("intermediate_size must be a multiple of ", kGroupedMmSizeStep, kFor, call.intermediate_size);
    return false;
  }
  return true;
}

}  // namespace detail

/// Whether `implementation` can serve the call; else calls report(parts...) with one sentence, without a full stop:
/// the argument, what it must be, what it was.
template <typename Report>
bool can_serve(GroupedMlpImplementation implementation, const GroupedMlpCall& call, const Report& report) {
  const bool is_for_cpu = implementation == GroupedMlpImplementation::kCpu;
  if (implementation != GroupedMlpImplementation::kTorch && is_for_cpu == call.device.is_cuda) {
    report("implementation must be ", detail::implementations_of(call.device), ", got \"", name(implementation), "\"");
    return false;
  }
  switch (implementation) {
    case GroupedMlpImplementation::kHopper: return detail::fits_hopper(call, report);
    case GroupedMlpImplementation::kGroupedMm: return detail::fits_grouped_mm(call, report);
    case GroupedMlpImplementation::kCpu:
    case GroupedMlpImplementation::kTorch: break;
  }
  return true;
}

/// The implementation for a call: the one that `requested` names, or for "auto" the first of "cpu", "hopper",
/// "grouped_mm" and "torch" that can serve. Throws Error for another name and for an implementation that cannot serve.
inline GroupedMlpImplementation choose_grouped_mlp(const std::string& requested, const GroupedMlpCall& call) {
  constexpr GroupedMlpImplementation kBestFirst[] = {GroupedMlpImplementation::kCpu, GroupedMlpImplementation::kHopper,
                                                     GroupedMlpImplementation::kGroupedMm,
                                                     GroupedMlpImplementation::kTorch};
  const bool is_auto = requested == "auto";
  for (const GroupedMlpImplementation implementation : kBestFirst) {
    if (is_auto && can_serve(implementation, call, [](const auto&...) {})) {
      return implementation;
    }
    if (requested == name(implementation)) {
      can_serve(implementation, call, [](const auto&... parts) { detail::throw_error(parts...); });
      return implementation;
    }
  }
  detail::throw_error("implementation must be \"auto\", \"cpu\", \"hopper\", \"grouped_mm\" or \"torch\", got \"",
                      requested, "\"");
}

}  // namespace zexpert
