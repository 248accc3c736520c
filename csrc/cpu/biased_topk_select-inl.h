// SPDX-License-Identifier: Apache-2.0
// From keys to the experts with the largest keys. A part of biased_topk_kernel-inl.h, compiled once per instruction
// set.
//
// The row is divided into kLanes interleaved parts. The k-th largest of the parts' largest keys is a lower bound of the
// row's k-th key, and few keys reach it (15 of 768 for k = 12). Those few are sorted by counting, for each of them, how
// many are larger. No step branches on the data.

/// Up to this many candidates are sorted by counting. More, for example of rows that are all ties, are sorted by
/// insertion.
constexpr int64_t kMaxCounted = 128;

/// order[r] = index of the r-th largest value, equal values in their order. Both arrays are whole vectors.
template <typename T>
void order_by_counting(const T* values, int64_t num_values, int32_t* order) {
  using V = Vec<T>;
  for (int64_t block = 0; block < num_values; block += V::kWidth) {
    const V own = V::load(values + block);
    for (int64_t lane = 0; lane < V::kWidth; ++lane) {
      const V value = V::broadcast(values[block + lane]);
      const Mask before = (Mask{1} << lane) - 1;
      int64_t rank = __builtin_popcount(V::greater(own, value) | (V::greater_equal(own, value) & before));
      for (int64_t i = 0; i < block; i += V::kWidth) {
        rank += __builtin_popcount(V::greater_equal(V::load(values + i), value));
      }
      for (int64_t i = block + V::kWidth; i < num_values; i += V::kWidth) {
        rank += __builtin_popcount(V::greater(V::load(values + i), value));
      }
      order[rank] = static_cast<int32_t>(block + lane);
    }
  }
}

/// The k-th largest of the largest keys of kLanes interleaved parts of the row; -inf if fewer than k parts have a key
/// that can be chosen.
template <int64_t kLanes, typename T>
T bound_kth_key(const T* keys, int64_t padded_experts, int64_t k) {
  using V = Vec<T>;
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  constexpr int64_t kVectors = std::max(kLanes, kBlock) / V::kWidth;
  V maxima[static_cast<size_t>(kVectors)];
  for (V& lane_maxima : maxima) lane_maxima = V::broadcast(-kInfinity);
  for (int64_t i = 0; i < padded_experts; i += kVectors * V::kWidth) {
    for (int64_t j = 0; j < kVectors; ++j) maxima[j] = V::max(V::load(keys + i + j * V::kWidth), maxima[j]);
  }
  for (int64_t j = kLanes / V::kWidth; j < kVectors; ++j) {
    maxima[j % (kLanes / V::kWidth)] = V::max(maxima[j], maxima[j % (kLanes / V::kWidth)]);
  }
  alignas(64) T values[static_cast<size_t>(kLanes)];
  int32_t order[static_cast<size_t>(kLanes)];
  for (int64_t j = 0; j < kLanes / V::kWidth; ++j) maxima[j].store(values + j * V::kWidth);
  order_by_counting(values, kLanes, order);
  return values[order[k - 1]];
}

/// Lists, in order, the experts whose key is at least `bound`; returns how many.
template <typename T>
int64_t collect_candidates(const T* keys, int64_t padded_experts, T bound, int32_t* candidates) {
  using V = Vec<T>;
  constexpr int64_t kAtOnce = 4;
  static_assert(kAtOnce <= Workspace<T>::kSlack, "writes past the last candidate must stay in the workspace");
  int64_t count = 0;
  for (int64_t block = 0; block < padded_experts; block += kBlock) {
    uint64_t found = 0;
    for (int64_t j = 0; j < kBlock; j += V::kWidth) {
      const Mask mask = V::greater_equal(V::load(keys + block + j), V::broadcast(bound));
      found |= static_cast<uint64_t>(mask) << j;
    }
    // A block seldom has more than kAtOnce. It always writes that many: there is no branch to mispredict.
    const int64_t end = count + __builtin_popcountll(found);
    do {
      for (int64_t j = 0; j < kAtOnce; ++j) {
        const int64_t expert = block + __builtin_ctzll(found | (uint64_t{1} << (kBlock - 1)));
        candidates[count + j] = static_cast<int32_t>(expert);
        __asm__("" : : : "memory");  // prevents joining the stores into a vector, which is slower
        found &= found - 1;
      }
      count += kAtOnce;
    } while (count < end);
    count = end;
  }
  return count;
}

/// The k first of at most kMaxCounted candidates by descending key, equal keys in their order; returns how many. Writes
/// up to a vector's width past the last candidate.
template <typename T>
int64_t sort_by_counting(const T* keys, int32_t* candidates, int64_t num_candidates, int64_t k, int32_t* sorted) {
  using V = Vec<T>;
  static_assert(V::kWidth <= Workspace<T>::kSlack, "writes past the last candidate must stay in the workspace");
  alignas(64) T values[kMaxCounted];
  int32_t order[kMaxCounted];
  // Only whole vectors: the length of a loop that depended on the row would be mispredicted.
  const int64_t last_vector = std::max<int64_t>(num_candidates - 1, 0) / V::kWidth * V::kWidth;
  const int64_t padded = last_vector + V::kWidth;
  std::fill(candidates + num_candidates, candidates + num_candidates + V::kWidth, 0);
  for (int64_t i = 0; i < padded; ++i) values[i] = keys[candidates[i]];
  const Mask is_candidate = (Mask{1} << (num_candidates - last_vector)) - 1;
  const V least = V::broadcast(-std::numeric_limits<T>::infinity());
  V::select(is_candidate, V::load(values + last_vector), least).store(values + last_vector);

  order_by_counting(values, padded, order);
  const int64_t count = std::min(num_candidates, k);
  for (int64_t i = 0; i < count; ++i) sorted[i] = candidates[order[i]];
  return count;
}

/// The k first of the candidates by descending key, equal keys in their order; returns how many.
template <typename T>
int64_t sort_by_insertion(const T* keys, const int32_t* candidates, int64_t num_candidates, int64_t k,
                          int32_t* sorted) {
  int64_t count = 0;
  for (int64_t i = 0; i < num_candidates; ++i) {
    const T key = keys[candidates[i]];
    if (count == k && !(key > keys[sorted[k - 1]])) {
      continue;
    }
    int64_t position = count < k ? count++ : k - 1;
    for (; position > 0 && key > keys[sorted[position - 1]]; --position) sorted[position] = sorted[position - 1];
    sorted[position] = candidates[i];
  }
  return count;
}

/// The experts with the k largest keys, descending, equal keys in expert order; returns how many, fewer than k if fewer
/// can be chosen.
template <typename T>
int64_t select_top_k(const T* keys, int64_t padded_experts, int64_t k, int32_t* candidates, int32_t* chosen) {
  T bound;
  switch (num_lanes(k)) {
    case 32: bound = bound_kth_key<32>(keys, padded_experts, k); break;
    case 64: bound = bound_kth_key<64>(keys, padded_experts, k); break;
    default: bound = bound_kth_key<128>(keys, padded_experts, k); break;
  }
  const int64_t num_candidates = collect_candidates(keys, padded_experts, bound, candidates);
  if (num_candidates > kMaxCounted) {
    return sort_by_insertion(keys, candidates, num_candidates, k, chosen);
  }
  return sort_by_counting(keys, candidates, num_candidates, k, chosen);
}
