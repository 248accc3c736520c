// The routing kernel for up to 1024 experts and top_k up to 32: a warp per token, the whole row in registers, no
// barrier.
//
// Selection without sorting the row: the K-th largest of the 32 lanes' own largest keys is a lower bound on the row's
// K-th key. The few keys that reach it (mean 15 of 768 for K = 12) become candidates, one per lane, and are ranked by
// counting. Rows with more than 32 candidates (mass ties) take K exact rounds of argmax.
//
// Masked logits cost nothing where there are none: a row is first routed as if all its logits were ordinary, and routed
// again, carefully, if its sum or one of the candidates shows that they are not.
#pragma once

#include <cstdint>

#include "cuda/biased_topk_common.cuh"

namespace zexpert::cuda {

inline constexpr int kWarpsPerBlock = 4;
/// Enough warps to hide the loads; a ninth block would leave too few registers for a row of 768.
inline constexpr int kBlocksPerMultiprocessor = 8;
inline constexpr int kMaxCandidates = kWarpSize;
inline constexpr int kMaxWarpTopK = kWarpSize;

/// How a row of kWidth logits lies in a warp's registers: element v of load j of a lane is expert
/// (j * 32 + lane) * kVector + v.
template <typename Logit, int kWidth>
struct RowLayout {
  static constexpr int kPerLane = kWidth / kWarpSize;
  static constexpr int kVector = sizeof(Logit) == 2 && kPerLane % 8 == 0 ? 8 : kPerLane % 4 == 0 ? 4 : 2;
  static constexpr int kLoads = kPerLane / kVector;
  static_assert(kLoads * kVector * kWarpSize == kWidth, "a warp's loads must divide the row evenly");
  static_assert(kPerLane <= 32, "a lane's elements must fit the bits of a word");

  __device__ static int expert(int lane, int element) {
    const auto i = static_cast<unsigned>(element);
    return static_cast<int>((i / kVector * kWarpSize + static_cast<unsigned>(lane)) * kVector + i % kVector);
  }
  /// The expert of the place element * 32 + lane.
  __device__ static int expert_of_place(unsigned place) {
    return expert(static_cast<int>(place % kWarpSize), static_cast<int>(place / kWarpSize));
  }
};

/// What a warp keeps in shared memory: a key and an expert for each candidate. Addressed by a number, because a C++
/// pointer to shared memory is put together anew, slowly, at every use.
class WarpScratch {
 public:
  static constexpr int kBytes = kMaxCandidates * 8;

  /// `memory` is shared, kBytes long and on a boundary of 16 bytes.
  __device__ explicit WarpScratch(const void* memory)
      : address_(static_cast<unsigned>(__cvta_generic_to_shared(memory))) {
    asm volatile("" : "+r"(address_));  // known to nobody: kept in a register
  }
  __device__ void set_key(int i, float key) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address_ + 4 * i), "f"(key) : "memory");
  }
  __device__ float key(int i) const {
    float key;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(key) : "r"(address_ + 4 * i) : "memory");
    return key;
  }
  /// Keys 4 * i to 4 * i + 3.
  __device__ float4 four_keys(int i) const {
    float4 keys;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(keys.x), "=f"(keys.y), "=f"(keys.z), "=f"(keys.w)
                 : "r"(address_ + 16 * i)
                 : "memory");
    return keys;
  }
  __device__ void set_expert(int i, int expert) const {
    asm volatile("st.shared.s32 [%0+128], %1;" ::"r"(address_ + 4 * i), "r"(expert) : "memory");
  }
  __device__ int expert(int i) const {
    int expert;
    asm volatile("ld.shared.s32 %0, [%1+128];" : "=r"(expert) : "r"(address_ + 4 * i) : "memory");
    return expert;
  }

 private:
  unsigned address_;
};

/// Which of the lanes' two values each step of warp_sort_descending keeps: a run of 6 bits for each size of sorted
/// runs. Bit log2(stride) of a run is 0 where the lane keeps the larger value.
__device__ __forceinline__ unsigned sort_directions(int lane) {
  const auto i = static_cast<unsigned>(lane);
  constexpr unsigned kFiveRuns = 1U | 1U << 6 | 1U << 12 | 1U << 18 | 1U << 24;
  // Every other run of a size is sorted the other way round: the lane's bit for the size flips the bits for its
  // strides.
  unsigned directions = i * kFiveRuns;
  directions ^= (i & 16U) * (31U << 6 >> 4) + (i & 8U) * (31U << 12 >> 3) + (i & 4U) * (31U << 18 >> 2) +
                (i & 2U) * (31U << 24 >> 1);
  asm volatile("" : "+r"(directions));  // keeps the compiler from deriving every bit on its own
  return directions;
}

/// Descending bitonic sort across the warp; lane k gets the k-th largest.
__device__ __forceinline__ float warp_sort_descending(float value, int lane) {
  const unsigned directions = sort_directions(lane);
  int first_bit = 24;
#pragma unroll
  for (int size = 2; size <= kWarpSize; size *= 2, first_bit -= 6) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const float other = __shfl_xor_sync(kFullMask, value, stride);
      const bool keeps_larger = (directions & (static_cast<unsigned>(stride) << first_bit)) == 0;
      value = (other > value) == keeps_larger ? other : value;
    }
  }
  return value;
}

/// Loads a lane's part of a row; every element of it lies at a constant distance from the first.
template <typename Layout, typename T>
__device__ __forceinline__ void load_vectors(const T* row, int lane, float (&values)[Layout::kPerLane]) {
  constexpr int kVector = Layout::kVector;
  const T* own = row + lane * kVector;
#pragma unroll
  for (int j = 0; j < Layout::kLoads; ++j) {
    float vector[kVector];
    load_vector<kVector>(own + j * kWarpSize * kVector, vector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) values[j * kVector + v] = vector[v];
  }
}

/// Adds a lane's part of a row.
template <typename Layout, typename T>
__device__ __forceinline__ void add_vectors(const T* row, int lane, float (&values)[Layout::kPerLane]) {
  constexpr int kVector = Layout::kVector;
  const T* own = row + lane * kVector;
#pragma unroll
  for (int j = 0; j < Layout::kLoads; ++j) {
    float vector[kVector];
    load_vector<kVector>(own + j * kWarpSize * kVector, vector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) values[j * kVector + v] = __fadd_rn(values[j * kVector + v], vector[v]);
  }
}

/// Loads a lane's part of a row of any alignment; NaN past its end.
template <typename Layout, typename T>
__device__ __forceinline__ void load_row(const T* row, bool fits_vectors, int num_experts, int lane,
                                         float (&values)[Layout::kPerLane]) {
  if (__builtin_expect(fits_vectors, 1)) {
    load_vectors<Layout>(row, lane, values);
  } else {
    const T* own = row + lane * Layout::kVector;
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      values[i] = Layout::expert(lane, i) < num_experts ? to_float(own[Layout::expert(0, i)]) : NAN;
    }
  }
}

/// Makes NaN of the keys of real experts whose group is not among the best topk_group. `row_keys` is the warp's shared
/// memory: the row's keys, then a score per group.
template <typename Layout>
__device__ __forceinline__ void mask_groups(const RoutingArguments& arguments, int lane, float* row_keys,
                                            float (&keys)[Layout::kPerLane]) {
  const int group_size = arguments.num_real_experts / arguments.num_expert_group;
  float* group_scores = row_keys + arguments.num_experts;
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) {
    const int expert = Layout::expert(lane, i);
    if (expert < arguments.num_real_experts)
      row_keys[expert] = keys[i];
  }
  __syncwarp();
  for (int group = 0; group < arguments.num_expert_group; ++group) {
    // Ordered bits of the two largest choosable keys; 0: none.
    unsigned first = 0;
    unsigned second = 0;
    for (int i = lane; i < group_size; i += kWarpSize) {
      const unsigned bits = ordered_bits(row_keys[group * group_size + i]);
      second = max(second, min(first, bits));
      first = max(first, bits);
    }
    const unsigned best = __reduce_max_sync(kFullMask, first);
    const int holder = __ffs(static_cast<int>(__ballot_sync(kFullMask, first == best))) - 1;
    const unsigned next = __reduce_max_sync(kFullMask, lane == holder ? second : first);
    if (lane == 0)
      group_scores[group] = group_score(best, next);
  }
  __syncwarp();
#pragma unroll 1
  for (int group = lane; group < arguments.num_expert_group; group += kWarpSize) {
    if (!is_best_group(group_scores, group, arguments)) {
      for (int i = 0; i < group_size; ++i) row_keys[group * group_size + i] = NAN;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) {
    const int expert = Layout::expert(lane, i);
    if (expert < arguments.num_real_experts)
      keys[i] = row_keys[expert];
  }
  __syncwarp();  // the next token's keys overwrite these
}

/// K rounds in which every lane offers its best key not yet taken. Lane k gets the k-th choice, -1 if there is none.
template <typename Layout>
__device__ __forceinline__ int choose_in_rounds(int top_k, int lane, const float (&keys)[Layout::kPerLane]) {
  unsigned bits[Layout::kPerLane];
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) bits[i] = ordered_bits(keys[i]);
  int chosen = -1;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    unsigned best_bits = 0;
    int best = 0;
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      if (bits[i] > best_bits) {
        best_bits = bits[i];
        best = i;
      }
    }
    const unsigned winner_bits = __reduce_max_sync(kFullMask, best_bits);
    const unsigned expert = static_cast<unsigned>(Layout::expert(lane, best));
    const unsigned winner = __reduce_min_sync(kFullMask, best_bits == winner_bits ? expert : ~0U);
    if (winner_bits == 0)
      break;
    if (lane == k)
      chosen = static_cast<int>(winner);
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      if (winner == expert && i == best)
        bits[i] = 0;
    }
  }
  return chosen;
}

/// Sum of `value` over this lane and those before it.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    asm volatile(
        "{\n"
        "  .reg .s32 before;\n"
        "  .reg .pred exists;\n"
        "  shfl.sync.up.b32 before|exists, %0, %1, 0, 0xffffffff;\n"
        "  @exists add.s32 %0, %0, before;\n"
        "}"
        : "+r"(value)
        : "r"(offset));
  }
  return value;
}

/// The candidates of a warp: bit i of `reached` says that the lane's element i is one, `num_candidates` in all, at most
/// 32. Lane c gets the c-th of them, -1 if there is none.
template <typename Layout>
__device__ __forceinline__ int take_candidate(unsigned reached, int num_before, int num_candidates, int lane,
                                              WarpScratch scratch) {
  while (reached != 0) {
    const int element = kWarpSize - 1 - __clz(static_cast<int>(reached));
    scratch.set_expert(num_before++, element * kWarpSize + lane);
    reached ^= 1U << element;
  }
  __syncwarp();
  const int place = scratch.expert(lane);
  return lane < num_candidates ? Layout::expert_of_place(static_cast<unsigned>(place)) : -1;
}

/// Shifts in a bit that says whether a < b; false if one is NaN, or both the same infinity.
__device__ __forceinline__ unsigned push_less(unsigned bits, float a, float b) {
  return __funnelshift_l(__float_as_uint(__fadd_rn(a, -b)), bits, 1);
}

/// How many candidates come before this lane's: larger key, or equal key and lower expert. No candidate: its key is
/// NaN.
__device__ __forceinline__ int rank_candidate(float key, int expert, int num_candidates, int lane,
                                              WarpScratch scratch) {
  scratch.set_key(lane, key);
  __syncwarp();
  unsigned larger = 0;
  const auto compare_half = [&](int half) {
#pragma unroll
    for (int i = 0; i < kMaxCandidates / 8; ++i) {
      const float4 others = scratch.four_keys(half * kMaxCandidates / 8 + i);
      larger = push_less(larger, key, others.x);
      larger = push_less(larger, key, others.y);
      larger = push_less(larger, key, others.z);
      larger = push_less(larger, key, others.w);
    }
  };
  compare_half(0);
  if (num_candidates > kMaxCandidates / 2)
    compare_half(1);
  int rank = __popc(larger);
  // Equal keys share a rank and leave another one free.
  const unsigned ranks = __reduce_or_sync(kFullMask, lane < num_candidates ? 1U << rank : 0U);
  if (__builtin_expect(__popc(ranks) != num_candidates, 0)) {
    scratch.set_expert(lane, expert);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < num_candidates; ++i) {
      if (scratch.key(i) == key && scratch.expert(i) < expert)
        ++rank;
    }
  }
  return rank;
}

/// The bias as the kernel reads it: float32, aligned. Other biases are converted into shared memory, by the whole
/// block.
__device__ __forceinline__ const float* prepare_bias(const RoutingArguments& arguments, int width, float* staged) {
  if (arguments.bias == nullptr || arguments.bias_fits_vectors)
    return static_cast<const float*>(arguments.bias);
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    staged[i] = i < arguments.num_experts ? load_as_float(arguments.bias, arguments.bias_type, i) : 0.0F;
  }
  __syncthreads();
  return staged;
}

/// Routes one token. A careful call is right for every row; any other finds out whether the row needs one, and then
/// returns false and writes nothing. `row_keys` is the warp's shared memory for groups.
template <bool kCareful, typename Layout, typename Logit>
__device__ __forceinline__ bool route_token(const RoutingArguments& arguments, const float* bias, int64_t token,
                                            int lane, WarpScratch scratch, float* row_keys) {
  constexpr int kPerLane = Layout::kPerLane;
  // Above this the rounding of largest * log2(e) would spoil the softmax's terms.
  constexpr float kLargestOrdinary = 16777216.0F;
  const Logit* row = static_cast<const Logit*>(arguments.logits) + token * arguments.logits_row_stride;
  float values[kPerLane];  // logits, then terms of the softmax or scores, then keys
  load_row<Layout>(row, arguments.logits_fit_vectors, arguments.num_experts, lane, values);
  unsigned masked = 0;
  if (kCareful) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!is_finite(values[i])) {
        values[i] = -INFINITY;
        masked |= 1U << i;
      }
    }
  }

  // Scores
  RowScale scale{0.0F, 1.0F};
  if (arguments.scoring_func == ScoringFunc::kSoftmax) {
    float largest = values[0];
#pragma unroll
    for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, values[i]);
    scale.largest = warp_max(largest);
    float sum = 0.0F;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      values[i] = softmax_term<kCareful>(values[i], scale.largest);
      sum = __fadd_rn(sum, values[i]);
    }
    sum = warp_sum(sum);
    if (!kCareful && (!(fabsf(scale.largest) < kLargestOrdinary) || isnan(sum)))
      return false;
    scale.inverse = reciprocal(sum);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = __fmul_rn(values[i], scale.inverse);
  } else if (arguments.scoring_func == ScoringFunc::kSigmoid) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = sigmoid(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = sqrt_softplus(values[i]);
  }

  // Keys
  if (bias != nullptr)
    add_vectors<Layout>(bias, lane, values);
  if (kCareful) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if ((masked >> i & 1U) != 0)
        values[i] = NAN;
    }
    if (arguments.topk_group < arguments.num_expert_group)
      mask_groups<Layout>(arguments, lane, row_keys, values);
  }

  // Candidates. A bound of -inf, where fewer than top_k lanes have a choosable key, is reached by none.
  float largest_key = -INFINITY;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) largest_key = fmaxf(largest_key, values[i]);
  const float bound = __shfl_sync(kFullMask, warp_sort_descending(largest_key, lane), arguments.top_k - 1);
  const float just_below = from_ordered_bits(ordered_bits(bound) - 1);
  unsigned reached = 0;
#pragma unroll
  for (int i = kPerLane - 1; i >= 0; --i) reached = push_less(reached, just_below, values[i]);
  const int num_reached = __popc(reached);
  const int num_until = warp_inclusive_sum(num_reached);
  const int num_candidates = __shfl_sync(kFullMask, num_until, kWarpSize - 1);

  Slot slot{lane, -1, 0.0F};
  const bool few = num_candidates >= arguments.top_k && num_candidates <= kMaxCandidates;
  if (__builtin_expect(few, 1)) {
    slot.expert = take_candidate<Layout>(reached, num_until - num_reached, num_candidates, lane, scratch);
  } else {
    slot.expert = choose_in_rounds<Layout>(arguments.top_k, lane, values);
  }
  float key = NAN;
  bool is_unsure = false;
  if (slot.expert >= 0) {
    const float logit = to_float(row[slot.expert]);
    is_unsure = !is_finite(logit);
    slot.score = score_of<kCareful>(arguments.scoring_func, logit, scale);
    key = bias == nullptr ? slot.score : __fadd_rn(slot.score, bias[slot.expert]);
  }
  if (!kCareful && __any_sync(kFullMask, is_unsure))
    return false;
  if (__builtin_expect(few, 1)) {
    const int rank = rank_candidate(key, slot.expert, num_candidates, lane, scratch);
    if (lane < num_candidates)
      slot.index = rank;
  }
  const Slot slots[1] = {slot};
  write_routing(arguments, token, lane, slots);
  return true;
}

template <typename Logit, int kWidth>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, kBlocksPerMultiprocessor)
    biased_topk_warp(const RoutingArguments arguments) {
  using Layout = RowLayout<Logit, kWidth>;
  __shared__ float4 scratch_memory[kWarpsPerBlock][WarpScratch::kBytes / sizeof(float4)];
  extern __shared__ float4
      dynamic_memory[];  // a converted bias; with groups, per warp, the row's keys and group scores
  wait_for_previous_kernels();
  let_next_kernel_start();

  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const unsigned warp = threadIdx.x / kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  auto* dynamic_floats = reinterpret_cast<float*>(dynamic_memory);
  const float* bias = prepare_bias(arguments, kWidth, dynamic_floats);
  if (token >= arguments.num_tokens)
    return;

  const WarpScratch scratch(scratch_memory[warp]);
  if (arguments.num_experts == kWidth && arguments.topk_group == arguments.num_expert_group) {
    if (__builtin_expect(route_token<false, Layout, Logit>(arguments, bias, token, lane, scratch, nullptr), 1))
      return;
    __syncwarp();
  }
  float* row_keys =
      dynamic_floats + kWidth + static_cast<int>(warp) * (arguments.num_experts + arguments.num_expert_group);
  route_token<true, Layout, Logit>(arguments, bias, token, lane, scratch, row_keys);
}

template <typename Logit, int kWidth>
void launch_biased_topk_warp(const RoutingArguments& arguments, cudaStream_t stream) {
  const bool has_groups = arguments.topk_group < arguments.num_expert_group;
  const bool converts_bias = arguments.bias != nullptr && !arguments.bias_fits_vectors;
  int64_t dynamic_floats = converts_bias || has_groups ? kWidth : 0;
  if (has_groups) {
    dynamic_floats += int64_t{kWarpsPerBlock} * (arguments.num_experts + arguments.num_expert_group);
  }
  launch("biased_topk", &biased_topk_warp<Logit, kWidth>, (arguments.num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock,
         kWarpsPerBlock * kWarpSize, sizeof(float) * static_cast<size_t>(dynamic_floats), stream, arguments);
}

/// Defined by the file of the width, which instantiates the kernel for every type of logits.
template <int kWidth>
void launch_biased_topk_width(const RoutingArguments& arguments, cudaStream_t stream);

#define ZEXPERT_DEFINE_BIASED_TOPK_WIDTH(width)                                                            \
  namespace zexpert::cuda {                                                                                \
  template <>                                                                                              \
  void launch_biased_topk_width<width>(const RoutingArguments& arguments, cudaStream_t stream) {           \
    switch (arguments.logits_type) {                                                                       \
      case ScalarType::kBFloat16: return launch_biased_topk_warp<__nv_bfloat16, width>(arguments, stream); \
      case ScalarType::kFloat16: return launch_biased_topk_warp<__half, width>(arguments, stream);         \
      default: return launch_biased_topk_warp<float, width>(arguments, stream);                            \
    }                                                                                                      \
  }                                                                                                        \
  }

}  // namespace zexpert::cuda
