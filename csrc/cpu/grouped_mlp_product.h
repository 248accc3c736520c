// Products of rows with blocks of weight rows. Part of grouped_mlp_kernel.h, compiled once per instruction set.
//
// A weight's row lies contiguous in memory, and so does a token's: each element of a product is the dot product of two
// of them. A panel of kPanel weight rows meets a group of up to most_rows() rows with all their sums in registers, so
// that a weight is read once for the whole group; rows of a group lie interleaved, so that they come from one stream.
//
// Every sum has one order of addition: vectors within a block of depth, the lanes of the block's sum, then the blocks.
// It does not depend on the group, so that a row's result does not depend on the rows beside it.

/// Weight rows that are multiplied together.
constexpr int64_t kPanel = 4;

/// Elements of a row that are multiplied before the next row's turn. Two groups' rows and a panel of that depth fit in
/// the first-level cache together.
constexpr int64_t kDepthBlock = 512;
constexpr int64_t kGroupsInCache = 2;

/// Most rows and most weight rows that multiply() takes at once: their sums and the rows stay in the second-level
/// cache.
constexpr int64_t kMaxRows = 48;
constexpr int64_t kMaxChannels = 64;

/// From this many groups on, 16-bit weights are converted once per block instead of once per group.
constexpr int64_t kConvertGroups = 4;

constexpr int64_t kCacheLine = 64;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/// Rows whose sums with a panel fit in the registers: 24 of AVX-512's 32, 8 of the others' 16.
template <typename A>
constexpr int64_t most_rows() {
  return sizeof(Vec<A>) == 64 ? 6 : 2;
}

/// Rows of a segment that are multiplied together. Among the packed rows, element `i` of the group's row `r` lies at
/// first_row * padded depth + round down(i, kWidth) * num_rows + r * kWidth + i % kWidth.
struct RowGroup {
  int64_t first_row;
  int64_t num_rows;
};

/// One call of multiply_group.
template <typename W, typename A>
struct PanelProduct {
  const A* rows;              ///< the group's packed rows from this block of depth on
  const W* weights[kPanel];   ///< from this block of depth on
  const char* ahead[kPanel];  ///< memory that will be needed soon, read alongside
  int64_t depth;
  bool adds;  ///< to the sums of earlier blocks of depth
  A* sums;    ///< [rows of the group, kMaxChannels]
};

/// sums[r, c] = rows[r] . weights[c] for r < kRows. A step along the depth takes kStride vectors of weights and brings
/// kAhead of the four streams ahead nearer by ahead_step bytes.
template <int64_t kRows, int64_t kStride, int64_t kAhead, typename W, typename A>
void multiply_group(const PanelProduct<W, A>& product, int64_t ahead_step) {
  using V = Vec<A>;
  constexpr int64_t kLineElements = kCacheLine / static_cast<int64_t>(sizeof(W));
  const W* const w0 = product.weights[0];
  const W* const w1 = product.weights[1];
  const W* const w2 = product.weights[2];
  const W* const w3 = product.weights[3];
  V sums[static_cast<size_t>(kRows)][kPanel];
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = sums[r][2] = sums[r][3] = V::zero();

  const A* rows = product.rows;
  int64_t i = 0;
  int64_t ahead = 0;
  for (; i + V::kWidth <= product.depth; i += V::kWidth) {
    if (i % kLineElements == 0) {
      __builtin_prefetch(product.ahead[0] + ahead, 0, 2);
      if constexpr (kAhead == kPanel) {
        __builtin_prefetch(product.ahead[1] + ahead, 0, 2);
        __builtin_prefetch(product.ahead[2] + ahead, 0, 2);
        __builtin_prefetch(product.ahead[3] + ahead, 0, 2);
      }
      ahead += ahead_step;
    }
    // unfused() also keeps the compiler from loading a weight anew for each of its products.
    const V a = unfused(V::load(w0 + i * kStride));
    const V b = unfused(V::load(w1 + i * kStride));
    const V c = unfused(V::load(w2 + i * kStride));
    const V d = unfused(V::load(w3 + i * kStride));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const V x = unfused(V::load(rows + r * V::kWidth));
      sums[r][0] = V::multiply_add(a, x, sums[r][0]);
      sums[r][1] = V::multiply_add(b, x, sums[r][1]);
      sums[r][2] = V::multiply_add(c, x, sums[r][2]);
      sums[r][3] = V::multiply_add(d, x, sums[r][3]);
    }
    rows += kRows * V::kWidth;
  }
  if (i < product.depth) {
    const int64_t count = product.depth - i;
    const V a = V::load_partial(w0 + i * kStride, count, 0);
    const V b = V::load_partial(w1 + i * kStride, count, 0);
    const V c = V::load_partial(w2 + i * kStride, count, 0);
    const V d = V::load_partial(w3 + i * kStride, count, 0);
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
template <int64_t kRows, int64_t kStride, int64_t kAhead, typename W, typename A>
ZEXPERT_INLINE void multiply_rows(int64_t num_rows, const PanelProduct<W, A>& product, int64_t ahead_step) {
  if constexpr (kRows >= 1) {
    if (num_rows == kRows) {
      multiply_group<kRows, kStride, kAhead>(product, ahead_step);
    } else {
      multiply_rows<kRows - 1, kStride, kAhead>(num_rows, product, ahead_step);
    }
  }
}

/// The weight rows of a block of output channels: kPanel at a time, short panels filled up by repeats.
template <typename T>
struct Channels {
  const T* rows[kMaxChannels];
  int64_t count = 0;
};

/// What a thread needs to multiply.
template <typename T>
struct Workspace {
  using A = accumulate_t<T>;
  static constexpr bool kConverts = !std::is_same_v<A, T>;
  AlignedArray<A> sums{kMaxRows * kMaxChannels};
  AlignedArray<A> converted{kConverts ? kMaxChannels * kDepthBlock : 1};  ///< panels, their rows interleaved
};

/// Converts channels' elements [begin, begin + depth), padded with zeros to whole vectors.
template <typename T>
void convert_channels(const Channels<T>& channels, int64_t begin, int64_t depth, accumulate_t<T>* converted) {
  using V = Vec<accumulate_t<T>>;
  for (int64_t c = 0; c < channels.count; ++c) {
    const T* source = channels.rows[c] + begin;
    accumulate_t<T>* target = converted + c / kPanel * kPanel * kDepthBlock + c % kPanel * V::kWidth;
    int64_t i = 0;
    for (; i + V::kWidth <= depth; i += V::kWidth) V::load(source + i).store(target + i * kPanel);
    if (i < depth) {
      V::load_partial(source + i, depth - i, 0).store(target + i * kPanel);
    }
  }
}

/// workspace.sums[r, c] = row r of the groups . channels[c]. Meanwhile brings the block `next` nearer, which will be
/// multiplied after this one.
template <typename T>
void multiply(const accumulate_t<T>* packed_rows, const RowGroup* groups, int64_t num_groups,
              const Channels<T>& channels, int64_t depth, const Channels<T>& next, Workspace<T>& workspace) {
  using A = accumulate_t<T>;
  constexpr int64_t kWidth = Vec<A>::kWidth;
  const int64_t padded_depth = round_up(depth, kWidth);
  const bool converts = Workspace<T>::kConverts && num_groups >= kConvertGroups;

  for (int64_t begin = 0; begin < std::max<int64_t>(depth, 1); begin += kDepthBlock) {
    const int64_t block_depth = std::min(kDepthBlock, depth - begin);
    const bool is_last = begin + kDepthBlock >= depth;
    if (converts) {
      convert_channels(channels, begin, block_depth, workspace.converted.get());
    }
    for (int64_t tile = 0; tile < num_groups; tile += kGroupsInCache) {
      for (int64_t c = 0; c < channels.count; c += kPanel) {
        for (int64_t g = tile; g < std::min(tile + kGroupsInCache, num_groups); ++g) {
          const RowGroup& group = groups[g];
          const auto fill = [&](auto& product) {
            product.rows = packed_rows + group.first_row * padded_depth + begin * group.num_rows;
            product.adds = begin > 0;
            product.sums = workspace.sums.get() + (group.first_row - groups[0].first_row) * kMaxChannels + c;
            // The groups share the panel's successor among them, so that memory is read all the time.
            int64_t streams = 0;
            for (int64_t k = 0; k < kPanel; ++k) {
              if (k * num_groups / kPanel == g && (!is_last || c < next.count)) {
                const T* successor = is_last ? next.rows[c + k] : channels.rows[c + k] + begin + kDepthBlock;
                product.ahead[streams++] = reinterpret_cast<const char*>(successor);
              }
            }
            for (; streams < kPanel; ++streams) {
              product.ahead[streams] = reinterpret_cast<const char*>(channels.rows[c] + begin);
            }
          };
          if (converts) {
            PanelProduct<A, A> product;
            for (int64_t k = 0; k < kPanel; ++k) {
              product.weights[k] = workspace.converted.get() + c * kDepthBlock + k * kWidth;
            }
            fill(product);
            product.depth = round_up(block_depth, kWidth);
            constexpr int64_t kStep = kCacheLine / static_cast<int64_t>(sizeof(A) / sizeof(T));
            multiply_rows<most_rows<A>(), kPanel, 1>(group.num_rows, product, kStep);
          } else {
            PanelProduct<T, A> product;
            for (int64_t k = 0; k < kPanel; ++k) product.weights[k] = channels.rows[c + k] + begin;
            fill(product);
            product.depth = block_depth;
            if (num_groups < kPanel) {
              multiply_rows<most_rows<A>(), 1, kPanel>(group.num_rows, product, kCacheLine);
            } else {
              multiply_rows<most_rows<A>(), 1, 1>(group.num_rows, product, kCacheLine);
            }
          }
        }
      }
    }
  }
}
