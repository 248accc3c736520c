// SPDX-License-Identifier: Apache-2.0
// Products of rows with blocks of weight rows. Part of grouped_mlp_kernel-inl.h, compiled once per instruction set.
//
// A weight's row is contiguous in memory, and so is a token's: each element of a product is the dot product of two of
// them. A panel of kPanel weight rows is multiplied by a group of up to most_rows() rows with all sums in registers, so
// that a weight is read once for the whole group. Rows of a group are interleaved, so that they are one stream.
//
// Every sum has one order of addition: the vectors of a block of depth, the lanes of their sum, then block after block.
// The order does not depend on the group, so a row's result does not depend on the other rows.
//
// Quantised weights are converted where they are loaded. Their scales are applied to the rows: a block of depth of a
// group is multiplied once by the scales of the weight rows that follow, which are all of one block.

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

/// How weights of type W become numbers of type A.
template <typename A, typename W>
struct Weights {
  static ZEXPERT_INLINE Vec<A> load(const W* source) { return Vec<A>::load(source); }
  static ZEXPERT_INLINE Vec<A> load_partial(const W* source, int64_t count) {
    return Vec<A>::load_partial(source, count, 0);
  }
  /// Nothing: these loads serve for every weight.
  ZEXPERT_INLINE void check_line(const W* const (&)[kPanel], int64_t) {}
  ZEXPERT_INLINE void check_rest(const W* const (&)[kPanel], int64_t, int64_t) {}
  static constexpr bool served() { return true; }
};

/// Quantised weights times kTinyFloat8, which costs the fewest instructions. They are multiplied by rows that are as
/// much larger: the products, and so the sums, have the same bits. They do not serve for NaN, nor where the processor
/// flushes subnormal numbers.
template <typename A>
struct TinyWeights {
  static ZEXPERT_INLINE Vec<A> load(const Float8E4M3* source) { return Vec<A>::load_tiny(source); }
  static ZEXPERT_INLINE Vec<A> load_partial(const Float8E4M3* source, int64_t count) {
    Float8E4M3 buffer[Vec<A>::kWidth];
    for (int64_t i = 0; i < count; ++i) buffer[i] = source[i];
    return load(buffer);
  }
  /// Looks for NaN in a cache line of each of the panel's rows.
  ZEXPERT_INLINE void check_line(const Float8E4M3* const (&rows)[kPanel], int64_t begin) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kPanel; ++k) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kCacheLine; i += static_cast<int64_t>(sizeof(Bytes))) {
        Bytes magnitudes;
        std::memcpy(&magnitudes, rows[k] + begin + i, sizeof(Bytes));
        magnitudes &= kNan;
        largest_ = magnitudes > largest_ ? magnitudes : largest_;
      }
    }
  }
  /// Looks for NaN in the last elements of the rows, which fill no line.
  ZEXPERT_INLINE void check_rest(const Float8E4M3* const (&rows)[kPanel], int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (const Float8E4M3* row : rows) has_nan_ |= (row[i].bits & kNan) == kNan;
    }
  }
  ZEXPERT_INLINE bool served() const {
    const auto is_nan = largest_ == kNan;
    uint64_t words[sizeof(Bytes) / sizeof(uint64_t)];
    std::memcpy(words, &is_nan, sizeof(Bytes));
    uint64_t any = 0;
    for (const uint64_t word : words) any |= word;
    return any == 0 && !has_nan_;
  }

 private:
  static constexpr uint8_t kNan = 0x7f;
  typedef uint8_t Bytes __attribute__((vector_size(sizeof(Vec<float>))));
  Bytes largest_{};  ///< without signs
  bool has_nan_ = false;
};

template <typename W>
constexpr bool kHasScales = std::is_same_v<W, Float8E4M3>;

/// Whether TinyWeights serve.
#if defined(__x86_64__)
template <typename A>
constexpr bool kHasTinyWeights = std::is_same_v<A, float>;
#else
template <typename A>
constexpr bool kHasTinyWeights = false;
#endif

/// For as long as it lives, this thread's arithmetic does not take subnormal numbers for 0.
class KeepSubnormals {
 public:
#if defined(__x86_64__)
  KeepSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ & ~kFlush); }
  ~KeepSubnormals() { _mm_setcsr(before_); }

 private:
  static constexpr unsigned kFlush = 0x8040;  // flush to zero, denormals are zero
  unsigned before_;
#endif
};

/// One call of multiply_group. A is the type of the sums, W that of the weights.
template <typename A, typename W>
struct PanelProduct {
  const A* rows;              ///< the group's packed rows from this block of depth on
  const W* weights[kPanel];   ///< from this block of depth on
  const char* ahead[kPanel];  ///< memory that will be needed later, prefetched while the weights are read
  int64_t ahead_step;         ///< elements of depth for each line of a single stream that is prefetched
  int64_t depth;
  bool adds;  ///< to the sums of earlier blocks of depth
  A* sums;    ///< [rows of the group, kMaxChannels]
};

/// sums[r, c] = rows[r] . weights[c] for r < kRows. Returns whether Load served; otherwise sums stay as they were.
/// Prefetches the first kAhead of the streams: one at the product's pace, several at the pace of the weights. Not
/// inlined, so that the caller's values do not compete for registers.
template <int64_t kRows, int64_t kAhead, typename Load, typename A, typename W>
__attribute__((noinline)) bool multiply_group(const PanelProduct<A, W>& product) {
  using V = Vec<A>;
  Load loads;
  constexpr int64_t kLineElements = kCacheLine / static_cast<int64_t>(sizeof(W));
  const W* const w0 = product.weights[0];
  const W* const w1 = product.weights[1];
  const W* const w2 = product.weights[2];
  const W* const w3 = product.weights[3];
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
      const int64_t line = i * static_cast<int64_t>(sizeof(W));
#pragma GCC unroll 8
      for (int64_t k = 0; k < kAhead; ++k) __builtin_prefetch(product.ahead[k] + line, 0, 2);
    }
    if (i % kLineElements == 0 && i + kLineElements <= product.depth) {
      loads.check_line({w0, w1, w2, w3}, i);
    }
    // unfused() keeps a loaded value in a register; otherwise the compiler may load it again for each product.
    V x[static_cast<size_t>(kRows)];
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) x[r] = unfused(V::load(rows + r * V::kWidth));
    const V a = unfused(Load::load(w0 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][0] = V::multiply_add(a, x[r], sums[r][0]);
    const V b = unfused(Load::load(w1 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][1] = V::multiply_add(b, x[r], sums[r][1]);
    const V c = unfused(Load::load(w2 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][2] = V::multiply_add(c, x[r], sums[r][2]);
    const V d = unfused(Load::load(w3 + i));
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) sums[r][3] = V::multiply_add(d, x[r], sums[r][3]);
    rows += kRows * V::kWidth;
  }
  if (i < product.depth) {
    const int64_t count = product.depth - i;
    const V a = Load::load_partial(w0 + i, count);
    const V b = Load::load_partial(w1 + i, count);
    const V c = Load::load_partial(w2 + i, count);
    const V d = Load::load_partial(w3 + i, count);
#pragma GCC unroll 8
    for (int64_t r = 0; r < kRows; ++r) {
      const V x = V::load(rows + r * V::kWidth);
      sums[r][0] = V::multiply_add(a, x, sums[r][0]);
      sums[r][1] = V::multiply_add(b, x, sums[r][1]);
      sums[r][2] = V::multiply_add(c, x, sums[r][2]);
      sums[r][3] = V::multiply_add(d, x, sums[r][3]);
    }
  }

  loads.check_rest({w0, w1, w2, w3}, product.depth / kLineElements * kLineElements, product.depth);
  if (!loads.served()) {
    return false;
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < kRows; ++r) {
    A totals[kPanel];
    V::sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], totals);
    A* target = product.sums + r * kMaxChannels;
    for (int64_t c = 0; c < kPanel; ++c) target[c] = product.adds ? target[c] + totals[c] : totals[c];
  }
  return true;
}

/// multiply_group for a group of `num_rows` rows, at most kRows.
template <int64_t kRows, int64_t kAhead, typename Load, typename A, typename W>
ZEXPERT_INLINE bool multiply_rows(int64_t num_rows, const PanelProduct<A, W>& product) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return multiply_rows<kRows - 1, kAhead, Load>(num_rows, product);
    }
  }
  return multiply_group<kRows, kAhead, Load>(product);
}

/// The weight rows of a block of output channels: kPanel at a time, short panels padded with repeats.
template <typename W>
struct Channels {
  const W* rows[kMaxChannels];
  int64_t count = 0;
  const float* scales[2];      ///< of quantised weights, one for each kScaleBlock of depth
  int64_t num_with_one_scale;  ///< scales[0] are of this many rows, scales[1] of the others
};

/// target = rows * scales * factor for a group's packed rows, scales[i] for the elements of depth from i * kScaleBlock
/// on; factor is a power of two. Returns whether all rows * scales are below 1 / kTinyFloat8 of the largest number.
template <typename A>
bool scale_rows(const A* rows, int64_t num_rows, int64_t depth, const float* scales, A factor, A* target) {
  using V = Vec<A>;
  constexpr Mask kAllLanes = (Mask{1} << V::kWidth) - 1;
  const V bound = V::broadcast(static_cast<A>(256));  // 2^128 * kTinyFloat8
  Mask fits = kAllLanes;
  for (int64_t begin = 0; begin < depth; begin += kScaleBlock, ++scales) {
    const V scale = V::broadcast(static_cast<A>(*scales));
    const int64_t end = round_up(std::min(begin + kScaleBlock, depth), V::kWidth) * num_rows;
    for (int64_t i = begin * num_rows; i < end; i += V::kWidth) {
      const V scaled = V::load(rows + i) * scale;
      fits &= V::greater(bound, V::abs(scaled));
      (scaled * V::broadcast(factor)).store(target + i);
    }
  }
  return fits == kAllLanes;
}

/// A block of depth of a group's rows, times the scales of the weight rows that multiply it.
template <typename A>
class ScaledRows {
 public:
  ScaledRows() : large_(kElements), plain_(kElements) {}

  void set(const A* rows, int64_t num_rows, int64_t depth, const float* scales) {
    rows_ = rows;
    num_rows_ = num_rows;
    depth_ = depth;
    scales_ = scales;
    has_plain_ = false;
    if constexpr (kHasTinyWeights<A>) {
      fits_tiny_weights_ = scale_rows(rows, num_rows, depth, scales, 1 / kTinyFloat8, large_.get());
    }
  }
  bool fits_tiny_weights() const { return fits_tiny_weights_; }
  const A* for_tiny_weights() const { return large_.get(); }
  const A* for_weights() {
    if (!has_plain_) {
      scale_rows(rows_, num_rows_, depth_, scales_, A(1), plain_.get());
      has_plain_ = true;
    }
    return plain_.get();
  }

 private:
  static constexpr int64_t kElements = most_rows<A>() * kDepthBlock<A>;
  AlignedArray<A> large_;
  AlignedArray<A> plain_;
  const A* rows_ = nullptr;
  int64_t num_rows_ = 0;
  int64_t depth_ = 0;
  const float* scales_ = nullptr;
  bool has_plain_ = false;
  bool fits_tiny_weights_ = false;
};

/// multiply_rows by the quickest loads that serve. `rows` has the group's rows times the weights' scales.
template <int64_t kAhead, typename A>
void multiply_scaled(int64_t num_rows, ScaledRows<A>& rows, PanelProduct<A, Float8E4M3>& product) {
  if constexpr (kHasTinyWeights<A>) {
    product.rows = rows.for_tiny_weights();
    if (rows.fits_tiny_weights() && multiply_rows<most_rows<A>(), kAhead, TinyWeights<A>>(num_rows, product)) {
      return;
    }
  }
  product.rows = rows.for_weights();
  multiply_rows<most_rows<A>(), kAhead, Weights<A, Float8E4M3>>(num_rows, product);
}

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
/// after this one. `scaled_rows` is scratch, which only scales need.
template <typename A, typename W>
void multiply(const A* packed_rows, const RowGroup* groups, int64_t num_groups, const Channels<W>& channels,
              int64_t depth, const Channels<W>& next, A* sums, [[maybe_unused]] ScaledRows<A>* scaled_rows = nullptr) {
  constexpr int64_t kLineElements = kCacheLine / static_cast<int64_t>(sizeof(W));
  const int64_t padded_depth = round_up(depth, Vec<A>::kWidth);
  // A depth of 0 is one empty block, whose sums are 0.
  const int64_t num_blocks = std::max<int64_t>((depth + kDepthBlock<A> - 1) / kDepthBlock<A>, 1);
  const int64_t block_depth =
      round_up((depth + num_blocks - 1) / num_blocks, kHasScales<W> ? kScaleBlock : kLineElements);
  for (int64_t block = 0; block < num_blocks; ++block) {
    const int64_t begin = block * block_depth;
    const bool is_last = block + 1 == num_blocks;
    for (int64_t g = 0; g < num_groups; ++g) {
      const RowGroup& group = groups[g];
      const ReadAhead share(g, num_groups, block_depth, kLineElements);
      PanelProduct<A, W> product;
      product.rows = packed_rows + group.first_packed_row * padded_depth + begin * group.num_rows;
      product.ahead_step = share.step;
      product.depth = std::min(block_depth, depth - begin);
      product.adds = block > 0;
      product.sums = sums + (group.first_row - groups[0].first_row) * kMaxChannels;
      [[maybe_unused]] const A* const rows = product.rows;
      for (int64_t c = 0; c < channels.count; c += kPanel, product.sums += kPanel) {
        for (int64_t k = 0; k < kPanel; ++k) product.weights[k] = channels.rows[c + k] + begin;
        if constexpr (kHasScales<W>) {
          if (c == 0 || c == channels.num_with_one_scale) {
            const float* const scales = channels.scales[c == 0 ? 0 : 1] + begin / kScaleBlock;
            scaled_rows->set(rows, group.num_rows, product.depth, scales);
          }
        }
        // Without anything to prefetch, prefetch what is in the cache already.
        for (const char*& ahead : product.ahead) ahead = reinterpret_cast<const char*>(product.weights[0]);
        for (int64_t k = 0; k < share.num_rows; ++k) {
          const int64_t row = c + share.first_row + k;
          if (!is_last || row < next.count) {
            const W* next_row = is_last ? next.rows[row] : channels.rows[row] + begin + block_depth;
            product.ahead[k] = reinterpret_cast<const char*>(next_row + share.offset);
          }
        }
        const auto multiply_panel = [&](auto ahead) {
          if constexpr (kHasScales<W>) {
            multiply_scaled<ahead.value>(group.num_rows, *scaled_rows, product);
          } else {
            multiply_rows<most_rows<A>(), ahead.value, Weights<A, W>>(group.num_rows, product);
          }
        };
        if (num_groups < kPanel) {
          multiply_panel(std::integral_constant<int64_t, kPanel>());
        } else {
          multiply_panel(std::integral_constant<int64_t, 1>());
        }
      }
    }
  }
}
