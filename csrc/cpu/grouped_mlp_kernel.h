// Compiled once per instruction set by grouped_mlp.cpp through for_each_isa.h.

/// Sum of a[i] * b[i].
template <typename T>
ZEXPERT_INLINE accumulate_t<T> dot(const accumulate_t<T>* a, const T* b, int64_t size) {
  using V = Vec<accumulate_t<T>>;
  V sum = V::zero();
  int64_t i = 0;
  for (; i + V::kWidth <= size; i += V::kWidth) sum = V::multiply_add(V::load(a + i), V::load(b + i), sum);
  if (i < size) {
    sum = V::multiply_add(V::load_partial(a + i, size - i, 0), V::load_partial(b + i, size - i, 0), sum);
  }
  return sum.sum();
}

template <typename T>
void grouped_mlp(const GroupedMlpParams& params, const std::vector<Segment>& segments) {
  using A = accumulate_t<T>;
  const int64_t hidden = params.hidden_size;
  const int64_t inner = params.intermediate_size;
  const int64_t num_rows = segments.back().first_activation_row + segments.back().num_rows;
  const std::unique_ptr<A[]> inputs(new A[static_cast<size_t>(num_rows * hidden)]);
  const std::unique_ptr<A[]> activations(new A[static_cast<size_t>(num_rows * inner)]);
  const auto num_segments = static_cast<int64_t>(segments.size());
  parallel_for(0, num_segments, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Segment& segment = segments[static_cast<size_t>(s)];
      const T* rows = static_cast<const T*>(params.rows) + segment.first_row * params.rows_row_stride;
      const T* gate = static_cast<const T*>(params.w13_weight) + segment.expert * params.w13_expert_stride;
      const T* up = gate + inner * hidden;
      const T* down = static_cast<const T*>(params.w2_weight) + segment.expert * params.w2_expert_stride;
      T* out = static_cast<T*>(params.out) + segment.first_row * params.out_row_stride;
      for (int64_t r = 0; r < segment.num_rows; ++r) {
        A* input = inputs.get() + (segment.first_activation_row + r) * hidden;
        A* activation = activations.get() + (segment.first_activation_row + r) * inner;
        for (int64_t h = 0; h < hidden; ++h) input[h] = static_cast<A>(rows[r * params.rows_row_stride + h]);
        for (int64_t f = 0; f < inner; ++f) {
          const A x = dot(input, gate + f * hidden, hidden);
          activation[f] = x / (A(1) + std::exp(-x)) * dot(input, up + f * hidden, hidden);
        }
        for (int64_t h = 0; h < hidden; ++h) {
          out[r * params.out_row_stride + h] = static_cast<T>(dot(activation, down + h * inner, inner));
        }
      }
    }
  });
}
