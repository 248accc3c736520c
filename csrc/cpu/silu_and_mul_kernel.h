// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by silu_and_mul.cpp through for_each_isa.h.

template <typename T>
void silu_and_mul(const SiluAndMulParams& params) {
  using V = Vec<accumulate_t<T>>;
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 8192;
  const auto* gate_up = static_cast<const T*>(params.gate_up);
  auto* out = static_cast<T*>(params.out);
  const int64_t size = params.intermediate_size;
  parallel_for(0, params.num_rows, std::max<int64_t>(kGrainElements / size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* gate = gate_up + row * params.gate_up_row_stride;
      const T* up = gate + size;
      T* target = out + row * params.out_row_stride;
      int64_t i = 0;
      for (; i + V::kWidth <= size; i += V::kWidth) {
        (silu(V::load(gate + i)) * V::load(up + i)).store(target + i);
      }
      if (i < size) {
        const V product = silu(V::load_partial(gate + i, size - i, 0)) * V::load_partial(up + i, size - i, 0);
        product.store_partial(target + i, size - i);
      }
    }
  });
}
