// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by silu_and_mul.cpp through for_each_isa.h.

// Below this many elements a range costs less than waking a thread.
constexpr int64_t kGrainElements = 8192;

template <typename T>
void silu_and_mul(const SiluAndMulParams& params, int64_t num_rows) {
  using V = Vec<accumulate_t<T>>;
  const auto* gate_up = static_cast<const T*>(params.gate_up);
  auto* out = static_cast<T*>(params.out);
  const int64_t size = params.intermediate_size;
  parallel_for(0, num_rows, std::max<int64_t>(kGrainElements / size, 1), [&](int64_t begin, int64_t end) {
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
template <typename V>
struct SiluAndMulGradients {
  V gate;
  V up;
  V activation;  ///< silu(gate) * up, a by-product
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

/// One row; `out` may be null. Returns <grad_out, activation>.
template <typename T>
ZEXPERT_INLINE accumulate_t<T> differentiate_row(const T* grad_out, const T* gate_up, accumulate_t<T> weight,
                                                 int64_t size, T* grad_gate_up, T* out) {
  using V = Vec<accumulate_t<T>>;
  const V scale = V::broadcast(weight);
  V dot = V::zero();
  int64_t i = 0;
  for (; i + V::kWidth <= size; i += V::kWidth) {
    const V gradient = V::load(grad_out + i);
    const auto result = differentiate(scale * gradient, V::load(gate_up + i), V::load(gate_up + size + i));
    dot = V::multiply_add(gradient, result.activation, dot);
    result.gate.store(grad_gate_up + i);
    result.up.store(grad_gate_up + size + i);
    if (out != nullptr) {
      (scale * result.activation).store(out + i);
    }
  }
  if (i < size) {
    const int64_t count = size - i;
    const V gradient = V::load_partial(grad_out + i, count, 0);
    const auto result = differentiate(scale * gradient, V::load_partial(gate_up + i, count, 0),
                                      V::load_partial(gate_up + size + i, count, 0));
    dot = V::multiply_add(gradient, result.activation, dot);
    result.gate.store_partial(grad_gate_up + i, count);
    result.up.store_partial(grad_gate_up + size + i, count);
    if (out != nullptr) {
      (scale * result.activation).store_partial(out + i, count);
    }
  }
  return dot.sum();
}

template <typename T>
void silu_and_mul_backward(const SiluAndMulBackwardParams& params, int64_t num_rows) {
  using A = accumulate_t<T>;
  const int64_t size = params.intermediate_size;
  const auto* row_weight = static_cast<const A*>(params.row_weight);
  auto* grad_row_weight = static_cast<A*>(params.grad_row_weight);
  parallel_for(0, params.num_rows, std::max<int64_t>(kGrainElements / size, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* grad_gate_up = static_cast<T*>(params.grad_gate_up) + row * params.grad_gate_up_row_stride;
      if (row >= num_rows) {
        std::fill_n(grad_gate_up, 2 * size, T{});
        if (grad_row_weight != nullptr) {
          grad_row_weight[row] = 0;
        }
        continue;
      }
      const T* grad_out = static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
      const T* gate_up = static_cast<const T*>(params.gate_up) + row * params.gate_up_row_stride;
      T* out = params.out != nullptr ? static_cast<T*>(params.out) + row * params.out_row_stride : nullptr;
      const A weight = row_weight != nullptr ? row_weight[row] : A(1);
      const A dot = differentiate_row(grad_out, gate_up, weight, size, grad_gate_up, out);
      if (grad_row_weight != nullptr) {
        grad_row_weight[row] = dot;
      }
    }
  });
}
