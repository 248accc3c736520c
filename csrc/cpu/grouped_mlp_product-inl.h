// SPDX-License-Identifier: Apache-2.0
// Products of rows with blocks of weight rows. Part of grouped_mlp_kernel-inl.h, compiled once per instruction set.
//
// A weight's row is contiguous in memory, and so is a token's: each element of a product is the dot product of two of
// them. A panel of kPanel weight rows is multiplied by a group of up to most_rows() rows with all sums in registers, so
// that a weight is read once for the whole group. Rows of a group are interleaved, so that they are one stream.
//
// Every sum has one order of addition: the vectors of a block of depth, the lanes of their sum, then block after block.
// The order does not depend on the group, so a row's result does not depend on the other rows.

/// Weight rows that are multiplied together.
constexpr int64_t kPanel = 4;

/// Most rows and most weight rows that one call of multiply() has: they stay in the second-level cache.
constexpr int64_t kMaxRows = 192;
constexpr int64_t kMaxChannels = 64;

constexpr int64_t kCacheLine = 64;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Rows whose sums with a panel fit in the registers, together with the rows and a weight: 32 registers with AVX-512,
/// else 16.
template <typename A>
constexpr int64_t most_rows() {
  return sizeof(Vec<A>) == 64 ? 6 : 3;
}

/// Elements of a row that are multiplied before the next row: this much of a group and of a panel fits in the
/// first-level cache. Long blocks need few sums across lanes.
template <typename A>
constexpr int64_t kDepthBlock = 4096 / static_cast<int64_t>(sizeof(A));

/// One call of multiply_group.
template <typename T>
struct PanelProduct {
  const accumulate_t<T>* rows;  ///< the group's packed rows from this block of depth on
  const T* weights[kPanel];     ///< from this block of depth on
  const char* ahead[kPanel];    ///< memory that will be needed later, prefetched while the weights are read
  int64_t ahead_step;           ///< elements of depth for each line of a single stream that is prefetched
  int64_t depth;
  bool adds;              ///< to the sums of earlier blocks of depth
  accumulate_t<T>* sums;  ///< [rows of the group, kMaxChannels]
};

/// sums[r, c] = rows[r] . weights[c] for r < kRows. Prefetches the first kAhead of the streams: one at the product's
/// pace, several at the pace of the weights. Not inlined, so that the caller's values do not compete for registers.
template <int64_t kRows, int64_t kAhead, typename T>
__attribute__((noinline)) void multiply_group(const PanelProduct<T>& product) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  constexpr int64_t kLineElements = kCacheLine / static_cast<int64_t>(sizeof(T));
  const T* const w0 = product.weights[0];
  const T* const w1 = product.weights[1];
  const T* const w2 = product.weights[2];
  const T* const w3 = product.weights[3];
  V sums[static_cast<size_t>(kRows)][kPanel];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = V::zero();

  const A* rows = product.rows;
  const char* ahead = product.ahead[0];
  int64_t next_ahead = 0;
  int64_t i = 0;
  for (; i + V::kWidth <= product.depth; i += V::kWidth) {
    if constexpr (kAhead == 1) {
      if (i == next_ahead) {
        __builtin_prefetch(ahead, 0, 2);
        ahead += kCacheLine;
        next_ahead += product.ahead_step;
      }
    } else if (i % kLineElements == 0) {
      const int64_t line = i * static_cast<int64_t>(sizeof(T));
#pragma GCC unroll 8
      for (int64_t k = 0; k < kAhead; ++k) __builtin_prefetch(product.ahead[k] + line, 0, 2);
    }
    // unfused() keeps a loaded value in a register; otherwise the compiler may load it again for each product.
    V x[static_cast<size_t>(kRows)];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) x[r] = unfused(V::load(rows + r * V::kWidth));
    const V a = unfused(V::load(w0 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][0] = V::multiply_add(a, x[r], sums[r][0]);
    const V b = unfused(V::load(w1 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][1] = V::multiply_add(b, x[r], sums[r][1]);
    const V c = unfused(V::load(w2 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][2] = V::multiply_add(c, x[r], sums[r][2]);
    const V d = unfused(V::load(w3 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][3] = V::multiply_add(d, x[r], sums[r][3]);
    rows += kRows * V::kWidth;
  }
  if (i < product.depth) {
    const int64_t count = product.depth - i;
    const V a = V::load_partial(w0 + i, count, 0);
    const V b = V::load_partial(w1 + i, count, 0);
    const V c = V::load_partial(w2 + i, count, 0);
    const V d = V::load_partial(w3 + i, count, 0);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const V x = V::load(rows + r * V::kWidth);
      sums[r][0] = V::multiply_add(a, x, sums[r][0]);
      sums[r][1] = V::multiply_add(b, x, sums[r][1]);
      sums[r][2] = V::multiply_add(c, x, sums[r][2]);
      sums[r][3] = V::multiply_add(d, x, sums[r][3]);
    }
  }

#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    A totals[kPanel];
    V::sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], totals);
    A* target = product.sums + r * kMaxChannels;
    for (int64_t c = 0; c < kPanel; ++c) target[c] = product.adds ? target[c] + totals[c] : totals[c];
  }
}

/// multiply_group for a group of `num_rows` rows, at most kRows.
template <int64_t kRows, int64_t kAhead, typename T>
ZEXPERT_INLINE void multiply_rows(int64_t num_rows, const PanelProduct<T>& product) {
  if constexpr (kRows >= 1) {
    if (num_rows == kRows) {
      multiply_group<kRows, kAhead>(product);
    } else {
      multiply_rows<kRows - 1, kAhead>(num_rows, product);
    }
  }
}

/// The weight rows of a block of output channels: kPanel at a time, short panels padded with repeats.
template <typename T>
struct Channels {
  const T* rows[kMaxChannels];
  int64_t count = 0;
};

/// A group's share of prefetching the next panel. The shares spread the prefetches over all groups: a burst of them
/// would occupy the buffers that the groups' own loads need.
struct ReadAhead {
  ReadAhead(int64_t group, int64_t num_groups, int64_t depth, int64_t line_elements) {
    if (num_groups < kPanel) {
      first_row = (group * kPanel + num_groups - 1) / num_groups;
      num_rows = ((group + 1) * kPanel + num_groups - 1) / num_groups - first_row;
      step = line_elements;
    } else {
      // A piece of one row; the shorter it is, the more slowly it is read.
      first_row = (group * kPanel + kPanel - 1) / num_groups;
      num_rows = 1;
      const int64_t first_group = first_row * num_groups / kPanel;
      const int64_t pieces = (first_row + 1) * num_groups / kPanel - first_group;
      offset = depth * (group - first_group) / pieces;
      step = line_elements * pieces;
    }
  }

  int64_t first_row;
  int64_t num_rows;
  int64_t offset = 0;  ///< of the first element
  int64_t step;        ///< elements of the product's depth from one prefetched line to the next
};

/// sums[r, c] = row r of the groups . channels[c], kMaxChannels apart. Prefetches `next`, the block that is multiplied
/// after this one.
template <typename T>
void multiply(const accumulate_t<T>* packed_rows, const RowGroup* groups, int64_t num_groups,
              const Channels<T>& channels, int64_t depth, const Channels<T>& next, accumulate_t<T>* sums) {
  using A = accumulate_t<T>;
  constexpr int64_t kLineElements = kCacheLine / static_cast<int64_t>(sizeof(T));
  const int64_t padded_depth = round_up(depth, Vec<A>::kWidth);
  // A depth of 0 is one empty block, whose sums are 0.
  const int64_t num_blocks = std::max<int64_t>((depth + kDepthBlock<A> - 1) / kDepthBlock<A>, 1);
  const int64_t block_depth = round_up((depth + num_blocks - 1) / num_blocks, kLineElements);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * block_depth;
    const bool is_last = block + 1 == num_blocks;
    for (int64_t g = 0; g < num_groups; ++g) {
      const RowGroup& group = groups[g];
      const ReadAhead share(g, num_groups, block_depth, kLineElements);
      PanelProduct<T> product;
      product.rows = packed_rows + group.first_packed_row * padded_depth + begin * group.num_rows;
      product.ahead_step = share.step;
      product.depth = std::min(block_depth, depth - begin);
      product.adds = block > 0;
      product.sums = sums + (group.first_row - groups[0].first_row) * kMaxChannels;
      for (int64_t c = 0; c < channels.count; c += kPanel, product.sums += kPanel) {
        for (int64_t k = 0; k < kPanel; ++k) product.weights[k] = channels.rows[c + k] + begin;
        // Without anything to prefetch, prefetch what is in the cache already.
        for (const char*& ahead : product.ahead) ahead = reinterpret_cast<const char*>(product.weights[0]);
        for (int64_t k = 0; k < share.num_rows; ++k) {
          const int64_t row = c + share.first_row + k;
          if (!is_last || row < next.count) {
            const T* next_row = is_last ? next.rows[row] : channels.rows[row] + begin + block_depth;
            product.ahead[k] = reinterpret_cast<const char*>(next_row + share.offset);
          }
        }
        if (num_groups < kPanel) {
          multiply_rows<most_rows<A>(), kPanel>(group.num_rows, product);
        } else {
          multiply_rows<most_rows<A>(), 1>(group.num_rows, product);
        }
      }
    }
  }
}
