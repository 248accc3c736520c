// Compiled once per instruction set by silu_and_mul_backward.cpp through for_each_isa.h.

template <typename V>
struct SiluAndMulGradients {
  V gate;
  V up;
  V out;  ///< the forward's result, a by-product
};

template <typename V>
ZEXPERT_INLINE SiluAndMulGradients<V> differentiate(V grad_out, V gate, V up) {
  const V one = V::broadcast(1);
  const V denominator = one + exp(V::zero() - gate);
  const V s = one / denominator;
  const V silu = gate / denominator;  // as the forward computes it, to the last bit
  const V slope = s * V::multiply_add(gate, one - s, one);
  return {grad_out * up * slope, grad_out * silu, silu * up};
}

template <typename T>
void silu_and_mul_backward(const SiluAndMulBackwardParams& params) {
  using V = Vec<accumulate_t<T>>;
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 8192;
  const int64_t size = params.intermediate_size;
  parallel_for(0, params.num_rows, std::max<int64_t>(kGrainElements / size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* grad_out = static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
      const T* gate = static_cast<const T*>(params.gate_up) + row * params.gate_up_row_stride;
      const T* up = gate + size;
      T* grad_gate = static_cast<T*>(params.grad_gate_up) + row * params.grad_gate_up_row_stride;
      T* grad_up = grad_gate + size;
      T* out = params.out != nullptr ? static_cast<T*>(params.out) + row * params.out_row_stride : nullptr;
      int64_t i = 0;
      for (; i + V::kWidth <= size; i += V::kWidth) {
        const auto gradients = differentiate(V::load(grad_out + i), V::load(gate + i), V::load(up + i));
        gradients.gate.store(grad_gate + i);
        gradients.up.store(grad_up + i);
        if (out != nullptr) {
          gradients.out.store(out + i);
        }
      }
      if (i < size) {
        const int64_t count = size - i;
        const auto gradients = differentiate(V::load_partial(grad_out + i, count, 0),
                                             V::load_partial(gate + i, count, 0), V::load_partial(up + i, count, 0));
        gradients.gate.store_partial(grad_gate + i, count);
        gradients.up.store_partial(grad_up + i, count);
        if (out != nullptr) {
          gradients.out.store_partial(out + i, count);
        }
      }
    }
  });
}
