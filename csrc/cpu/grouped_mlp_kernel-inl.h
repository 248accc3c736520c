// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by grouped_mlp.cpp through for_each_isa.h; nothing else is included here.
//
// Two products, each over blocks of every expert's output channels: gate and up of the same channels, followed by the
// activation, then down. The blocks of a run's experts form one list that all threads work through.
#include "cpu/grouped_mlp_product-inl.h"

/// Weights of a block of channels: enough that starting a block costs little, few enough that the groups of rows after
/// the first find them in the second-level cache.
constexpr int64_t kBlockBytes = 128 * 1024;

/// A block has a multiple of this many channels, so that blocks of activations are whole vectors.
constexpr int64_t kChannelMultiple = 16;

/// Channels of a block that reads `rows_per_channel` weight rows for each: a power of two, so that the channels have
/// one block of scales.
template <typename W>
int64_t block_channels(int64_t depth, int64_t rows_per_channel) {
  const int64_t channel_bytes = std::max<int64_t>(depth * rows_per_channel * static_cast<int64_t>(sizeof(W)), 1);
  int64_t channels = kMaxChannels / rows_per_channel;
  while (channels > kChannelMultiple && channels * channel_bytes > kBlockBytes) channels /= 2;
  return channels;
}

/// Copies rows to their packed places in the type of the sums, padded with zeros to whole vectors.
template <typename T>
void pack_rows(const GroupedMlpParams& params, const std::vector<RowGroup>& groups, accumulate_t<T>* packed_rows) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kGrainElements = 32768;
  const int64_t depth = params.hidden_size;
  const int64_t padded_depth = round_up(depth, V::kWidth);
  const int64_t grain_size = std::max<int64_t>(kGrainElements / depth, 1);
  parallel_for(0, static_cast<int64_t>(groups.size()), grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const RowGroup& group = groups[static_cast<size_t>(g)];
      for (int64_t r = 0; r < group.num_rows; ++r) {
        const int64_t row = group.first_row + r;
        const int64_t place = params.row_slots == nullptr ? row : params.row_slots[row] / params.top_k;
        const T* source = static_cast<const T*>(params.rows) + place * params.rows_row_stride;
        accumulate_t<T>* target = packed_rows + group.first_packed_row * padded_depth + r * V::kWidth;
        int64_t i = 0;
        for (; i + V::kWidth <= depth; i += V::kWidth) V::load(source + i).store(target + i * group.num_rows);
        if (i < depth) {
          V::load_partial(source + i, depth - i, 0).store(target + i * group.num_rows);
        }
      }
    }
  });
}

/// One of the two products: every segment's packed rows times `num_channels` channels of its expert's weights.
struct Product {
  const std::vector<Segment>& segments;
  const std::vector<RowGroup>& groups;
  int64_t depth;
  int64_t num_channels;
  int64_t block_channels;
};

/// A block of a segment's output channels.
struct Block {
  Block(const Product& product, int64_t index) {
    const int64_t blocks = (product.num_channels + product.block_channels - 1) / product.block_channels;
    segment = &product.segments[static_cast<size_t>(index / blocks)];
    first_channel = index % blocks * product.block_channels;
    num_channels = std::min(product.block_channels, product.num_channels - first_channel);
  }
  static int64_t count(const Product& product) {
    const int64_t blocks = (product.num_channels + product.block_channels - 1) / product.block_channels;
    return static_cast<int64_t>(product.segments.size()) * blocks;
  }

  const Segment* segment;
  int64_t first_channel;
  int64_t num_channels;
};

/// Multiplies the rows of the block's segment, as many groups at once as stay in the cache.
template <typename A, typename W, typename Consume>
void multiply_block(const Product& product, const Block& block, const A* packed_rows, const Channels<W>& channels,
                    const Channels<W>& next, ScaledRows<A>* scaled_rows, A* sums, const Consume& consume) {
  constexpr int64_t kMaxGroups = kMaxRows / most_rows<A>();
  const int64_t segment_groups = block.segment->num_groups;
  const int64_t chunks = (segment_groups + kMaxGroups - 1) / kMaxGroups;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t begin = segment_groups * chunk / chunks;
    const int64_t num_groups = segment_groups * (chunk + 1) / chunks - begin;
    const RowGroup* groups = &product.groups[static_cast<size_t>(block.segment->first_group + begin)];
    multiply(packed_rows, groups, num_groups, channels, product.depth, next, sums, scaled_rows);
    for (int64_t g = 0; g < num_groups; ++g) {
      consume(block, groups[g], sums + (groups[g].first_row - groups[0].first_row) * kMaxChannels);
    }
  }
}

/// Computes a product on all threads. `find_channels(block, channels)` returns a block's weight rows in `channels`,
/// `consume(block, group, sums)` receives the block's products with a group of rows.
template <typename W, typename A, typename FindChannels, typename Consume>
void multiply_all(const Product& product, const A* packed_rows, const FindChannels& find_channels,
                  const Consume& consume) {
  const int64_t num_blocks = Block::count(product);
  std::atomic<int64_t> next_block{0};
  // A free thread takes the next block: experts differ in their rows and cores in their speed. A thread takes a block
  // while it still works on the one before, to prefetch it.
  parallel_for(0, num_blocks, 1, [&](int64_t, int64_t) {
    const AlignedArray<A> sums(kMaxRows * kMaxChannels);
    [[maybe_unused]] std::optional<KeepSubnormals> keep_subnormals;
    std::optional<ScaledRows<A>> scaled_rows;
    if constexpr (kHasScales<W>) {
      keep_subnormals.emplace();
      scaled_rows.emplace();
    }
    Channels<W> channels;
    Channels<W> next_channels;
    int64_t index = next_block++;
    if (index < num_blocks) {
      find_channels(Block(product, index), channels);
    }
    while (index < num_blocks) {
      const int64_t next_index = next_block++;
      next_channels.count = 0;
      if (next_index < num_blocks) {
        find_channels(Block(product, next_index), next_channels);
      }
      multiply_block(product, Block(product, index), packed_rows, channels, next_channels,
                     scaled_rows ? &*scaled_rows : nullptr, sums.get(), consume);
      std::swap(channels, next_channels);
      index = next_index;
    }
  });
}

/// W is the type of the weights: T, or Float8E4M3 with scales.
template <typename T, typename W = T>
void grouped_mlp(const GroupedMlpParams& params, std::vector<Segment>& segments) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t hidden = params.hidden_size;
  const int64_t inner = params.intermediate_size;
  const int64_t padded_inner = round_up(inner, V::kWidth);
  const std::vector<RowGroup> groups = cut_into_groups(segments, most_rows<A>());
  const int64_t num_rows = groups.back().first_packed_row + groups.back().num_rows;
  const AlignedArray<A> rows(num_rows * round_up(hidden, V::kWidth));
  const AlignedArray<A> activations(num_rows * padded_inner);
  pack_rows<T>(params, groups, rows.get());

  // activations = silu(rows @ gate.T) * (rows @ up.T), packed like the rows
  const auto gate_and_up = [&](const Block& block, Channels<W>& channels) {
    const W* gate = static_cast<const W*>(params.w13_weight) + block.segment->expert * params.w13_expert_stride;
    const int64_t padded = round_up(block.num_channels, kPanel);
    for (int64_t c = 0; c < padded; ++c) {
      channels.rows[c] = gate + std::min(block.first_channel + c, inner - 1) * hidden;
      channels.rows[padded + c] = channels.rows[c] + inner * hidden;
    }
    channels.count = 2 * padded;
    if constexpr (kHasScales<W>) {
      const int64_t row_scales = num_scale_blocks(hidden);
      channels.scales[0] = params.w13_scale_inv + block.segment->expert * params.w13_scale_expert_stride +
                           block.first_channel / kScaleBlock * row_scales;
      channels.scales[1] = channels.scales[0] + num_scale_blocks(inner) * row_scales;
      channels.num_with_one_scale = padded;
    }
  };
  const auto activate = [&](const Block& block, const RowGroup& group, const A* sums) {
    A* target = activations.get() + group.first_packed_row * padded_inner + block.first_channel * group.num_rows;
    for (int64_t r = 0; r < group.num_rows; ++r) {
      const A* gate = sums + r * kMaxChannels;
      const A* up = gate + round_up(block.num_channels, kPanel);
      for (int64_t c = 0; c < block.num_channels; c += V::kWidth) {
        const int64_t count = std::min(V::kWidth, block.num_channels - c);
        const V activation = silu(V::load_partial(gate + c, count, 0)) * V::load_partial(up + c, count, 0);
        activation.store(target + c * group.num_rows + r * V::kWidth);
      }
    }
  };
  multiply_all<W>({segments, groups, hidden, inner, block_channels<W>(hidden, 2)}, rows.get(), gate_and_up, activate);

  // out = activations @ down.T
  const auto down = [&](const Block& block, Channels<W>& channels) {
    const W* weight = static_cast<const W*>(params.w2_weight) + block.segment->expert * params.w2_expert_stride;
    channels.count = round_up(block.num_channels, kPanel);
    for (int64_t c = 0; c < channels.count; ++c) {
      channels.rows[c] = weight + std::min(block.first_channel + c, hidden - 1) * inner;
    }
    if constexpr (kHasScales<W>) {
      channels.scales[0] = params.w2_scale_inv + block.segment->expert * params.w2_scale_expert_stride +
                           block.first_channel / kScaleBlock * num_scale_blocks(inner);
      channels.num_with_one_scale = channels.count;
    }
  };
  const auto write = [&](const Block& block, const RowGroup& group, const A* sums) {
    for (int64_t r = 0; r < group.num_rows; ++r) {
      T* target = static_cast<T*>(params.out) + (group.first_row + r) * params.out_row_stride + block.first_channel;
      for (int64_t c = 0; c < block.num_channels; c += V::kWidth) {
        const int64_t count = std::min(V::kWidth, block.num_channels - c);
        V::load_partial(sums + r * kMaxChannels + c, count, 0).store_partial(target + c, count);
      }
    }
  };
  multiply_all<W>({segments, groups, inner, hidden, block_channels<W>(inner, 1)}, activations.get(), down, write);
}

template <typename T>
void grouped_mlp_with_scales(const GroupedMlpParams& params, std::vector<Segment>& segments) {
  grouped_mlp<T, Float8E4M3>(params, segments);
}
