// SPDX-License-Identifier: Apache-2.0
// The gradient of weight * row, the step that backward kernels share. A part of their kernel files, compiled once per
// instruction set.

/// target = weight * gradient; returns <gradient, row>. One pass, so that each is read once.
template <typename T>
ZEXPERT_INLINE accumulate_t<T> scale_and_dot(const T* gradient, accumulate_t<T> weight, const T* row, int64_t size,
                                             T* target) {
  using V = Vec<accumulate_t<T>>;
  // 64 sums whatever the register: no addition waits for the one before, and rounding errors stay small.
  constexpr int64_t kVectors = 64 / V::kWidth;
  const V scale = V::broadcast(weight);
  V sums[static_cast<size_t>(kVectors)];
  for (V& sum : sums) sum = V::zero();
  int64_t i = 0;
  for (; i + kVectors * V::kWidth <= size; i += kVectors * V::kWidth) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const V g = V::load(gradient + i + v * V::kWidth);
      sums[v] = V::multiply_add(g, V::load(row + i + v * V::kWidth), sums[v]);
      (scale * g).store(target + i + v * V::kWidth);
    }
  }
  for (; i < size; i += V::kWidth) {
    const int64_t count = std::min(V::kWidth, size - i);
    const V g = V::load_partial(gradient + i, count, 0);
    sums[0] = V::multiply_add(g, V::load_partial(row + i, count, 0), sums[0]);
    (scale * g).store_partial(target + i, count);
  }
  for (int64_t half = kVectors / 2; half > 0; half /= 2) {
    for (int64_t v = 0; v < half; ++v) sums[v] = sums[v] + sums[v + half];
  }
  return sums[0].sum();
}
