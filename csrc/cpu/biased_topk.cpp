#include "zexpert/biased_topk.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <new>

#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// Keys are looked through in blocks of this many, one bit each of a 64-bit word. Rows are padded to whole blocks.
constexpr int64_t kBlock = 64;

/// Memory for `size` numbers on a cache line's boundary, not initialised.
template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Deleter {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Deleter> data_;
};

/// What all rows of a call share.
template <typename T>
struct SharedByRows {
  const BiasedTopKParams& params;
  const T* bias;           ///< [padded_experts], zeros where there is none
  int64_t padded_experts;  ///< num_experts rounded up to whole blocks and to the lanes of the first selection step
};

/// What one thread needs to route a row.
template <typename T>
struct Workspace {
  Workspace(int64_t padded_experts, int64_t num_groups)
      : scores(padded_experts),
        keys(padded_experts),
        candidates(padded_experts + kSlack),
        group_scores(num_groups),
        group_order(num_groups) {}

  /// How far past the last candidate a step may write.
  static constexpr int64_t kSlack = 16;

  AlignedArray<T> scores;            ///< before the row's common factor; NaN where masked
  AlignedArray<T> keys;              ///< NaN where not choosable
  AlignedArray<int32_t> candidates;  ///< experts whose key may be among the largest
  AlignedArray<T> group_scores;
  AlignedArray<int32_t> group_order;
};

/// The first step of selection keeps the largest key of each of this many interleaved parts of a row. At least twice
/// top_k parts keep the candidates few.
int64_t num_lanes(int64_t top_k) { return top_k <= 16 ? 32 : top_k <= 32 ? 64 : 128; }

template <typename T>
void convert_bias(const BiasedTopKParams& params, T* bias, int64_t padded_experts) {
  std::fill(bias, bias + padded_experts, T(0));
  if (params.bias != nullptr) {
    visit_floating(params.bias_type, [&](auto element) {
      const auto* source = static_cast<const decltype(element)*>(params.bias);
      std::transform(source, source + params.spec.num_experts, bias, [](auto value) { return static_cast<T>(value); });
    });
  }
}

}  // namespace
}  // namespace zexpert

#define ZEXPERT_KERNEL_FILE "cpu/biased_topk_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void biased_topk_cpu(const BiasedTopKParams& params) {
  if (params.num_tokens == 0) {
    return;
  }
  visit_floating(params.logits_type, [&](auto logit) {
    using Logit = decltype(logit);
    using T = accumulate_t<Logit>;
    const int64_t multiple = std::max(kBlock, num_lanes(params.spec.top_k));
    const int64_t padded_experts = (params.spec.num_experts + multiple - 1) / multiple * multiple;
    const AlignedArray<T> bias(padded_experts);
    convert_bias(params, bias.get(), padded_experts);
    const SharedByRows<T> shared{params, bias.get(), padded_experts};
    ZEXPERT_DISPATCH(biased_topk<Logit>, shared)
  });
}

}  // namespace zexpert
