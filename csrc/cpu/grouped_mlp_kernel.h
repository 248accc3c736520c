// Compiled once per instruction set by grouped_mlp.cpp through for_each_isa.h; nothing else is included here.
//
// Two products in turn, each over blocks of every expert's output channels: gate and up of the same channels with the
// activation between them, then down. All blocks of all experts form one list that the threads work through together.
#include "cpu/grouped_mlp_product.h"

/// Weights of a block of channels. Large enough that starting on a block costs little, small enough for the
/// second-level cache, in which later groups of rows find the block again.
constexpr int64_t kBlockBytes = 128 * 1024;

/// Blocks are whole numbers of this many channels, so that blocks of activations are whole vectors.
constexpr int64_t kChannelMultiple = 16;

/// The rows of all segments, cut into groups.
struct RowGroups {
  std::vector<RowGroup> groups;
  std::vector<int64_t> first_group;  ///< per segment, and one past the last

  RowGroups(const std::vector<Segment>& segments, int64_t most_rows_of_a_group) {
    for (const Segment& segment : segments) {
      first_group.push_back(static_cast<int64_t>(groups.size()));
      const int64_t num_groups = (segment.num_rows + most_rows_of_a_group - 1) / most_rows_of_a_group;
      for (int64_t g = 0; g < num_groups; ++g) {
        const int64_t begin = segment.num_rows * g / num_groups;
        const int64_t end = segment.num_rows * (g + 1) / num_groups;
        groups.push_back({segment.first_packed_row + begin, end - begin});
      }
    }
    first_group.push_back(static_cast<int64_t>(groups.size()));
  }
};

/// The state that both products share.
struct Work {
  const std::vector<Segment>& segments;
  const RowGroups& row_groups;
};

/// Copies the segments' rows into their packed places, in the type of the sums, padded with zeros to whole vectors.
template <typename T>
void pack_rows(const GroupedMlpParams& params, const Work& work, accumulate_t<T>* packed_rows) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kGrainElements = 32768;
  const int64_t depth = params.hidden_size;
  const int64_t padded_depth = round_up(depth, V::kWidth);
  const auto num_segments = static_cast<int64_t>(work.segments.size());
  parallel_for(0, num_segments, std::max<int64_t>(kGrainElements / depth, 1), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Segment& segment = work.segments[static_cast<size_t>(s)];
      const auto* rows = static_cast<const T*>(params.rows);
      for (int64_t g = work.row_groups.first_group[static_cast<size_t>(s)];
           g < work.row_groups.first_group[static_cast<size_t>(s) + 1]; ++g) {
        const RowGroup& group = work.row_groups.groups[static_cast<size_t>(g)];
        for (int64_t r = 0; r < group.num_rows; ++r) {
          const int64_t row = segment.first_row + group.first_row - segment.first_packed_row + r;
          const T* source = rows + row * params.rows_row_stride;
          accumulate_t<T>* target = packed_rows + group.first_row * padded_depth + r * V::kWidth;
          int64_t i = 0;
          for (; i + V::kWidth <= depth; i += V::kWidth) V::load(source + i).store(target + i * group.num_rows);
          if (i < depth) {
            V::load_partial(source + i, depth - i, 0).store(target + i * group.num_rows);
          }
        }
      }
    }
  });
}

/// Multiplies every segment's packed rows with blocks of its expert's channels. `find_channels(segment, first, count,
/// channels)` gives a block's weight rows; `consume(segment, group, first, count, sums)` takes a group's products.
template <typename T, typename FindChannels, typename Consume>
void multiply_blocks(const Work& work, const accumulate_t<T>* packed_rows, int64_t depth, int64_t num_channels,
                     int64_t block, const FindChannels& find_channels, const Consume& consume) {
  constexpr int64_t kMaxGroups = kMaxRows / most_rows<accumulate_t<T>>();
  const int64_t blocks = (num_channels + block - 1) / block;
  const int64_t num_items = static_cast<int64_t>(work.segments.size()) * blocks;
  std::atomic<int64_t> next_item{0};
  // Whichever thread is free takes the next block: experts differ in their rows and cores in their speed. A thread
  // takes its next block before it starts on this one, to read ahead.
  parallel_for(0, num_items, 1, [&](int64_t, int64_t) {
    Workspace<T> workspace;
    Channels<T> channels[2];
    const auto find = [&](int64_t item, Channels<T>& target) {
      const int64_t first = item % blocks * block;
      find_channels(work.segments[static_cast<size_t>(item / blocks)], first, std::min(block, num_channels - first),
                    target);
    };
    int64_t item = next_item++;
    if (item < num_items) {
      find(item, channels[0]);
    }
    for (int parity = 0; item < num_items; parity ^= 1) {
      const int64_t following = next_item++;
      find(following < num_items ? following : item, channels[parity ^ 1]);
      const auto s = static_cast<size_t>(item / blocks);
      const int64_t first = item % blocks * block;
      const int64_t count = std::min(block, num_channels - first);
      const int64_t first_group = work.row_groups.first_group[s];
      const int64_t segment_groups = work.row_groups.first_group[s + 1] - first_group;
      const int64_t num_chunks = (segment_groups + kMaxGroups - 1) / kMaxGroups;
      for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t begin = segment_groups * chunk / num_chunks;
        const int64_t num_groups = segment_groups * (chunk + 1) / num_chunks - begin;
        const RowGroup* groups = &work.row_groups.groups[static_cast<size_t>(first_group + begin)];
        multiply(packed_rows, groups, num_groups, channels[parity], depth, channels[parity ^ 1], workspace);
        for (int64_t g = 0; g < num_groups; ++g) {
          consume(work.segments[s], groups[g], first, count,
                  workspace.sums.get() + (groups[g].first_row - groups[0].first_row) * kMaxChannels);
        }
      }
      item = following;
    }
  });
}

/// Channels per block: kBlockBytes of weights, `rows_per_channel` weight rows for each channel.
template <typename T>
int64_t block_channels(int64_t depth, int64_t rows_per_channel) {
  const int64_t channel_bytes = std::max<int64_t>(depth * rows_per_channel * static_cast<int64_t>(sizeof(T)), 1);
  const int64_t channels = kBlockBytes / channel_bytes / kChannelMultiple * kChannelMultiple;
  return std::clamp(channels, kChannelMultiple, kMaxChannels / rows_per_channel);
}

template <typename T>
void grouped_mlp(const GroupedMlpParams& params, const std::vector<Segment>& segments) {
  using A = accumulate_t<T>;
  using V = Vec<A>;
  const int64_t hidden = params.hidden_size;
  const int64_t inner = params.intermediate_size;
  const int64_t padded_inner = round_up(inner, V::kWidth);
  const int64_t num_rows = segments.back().first_packed_row + segments.back().num_rows;
  const RowGroups row_groups(segments, most_rows<A>());
  const Work work{segments, row_groups};
  const AlignedArray<A> rows(num_rows * round_up(hidden, V::kWidth));
  const AlignedArray<A> activations(num_rows * padded_inner);
  pack_rows<T>(params, work, rows.get());

  // activations = silu(rows @ gate.T) * (rows @ up.T), packed like the rows
  const auto gate_and_up = [&](const Segment& segment, int64_t first, int64_t count, Channels<T>& channels) {
    const T* gate = static_cast<const T*>(params.w13_weight) + segment.expert * params.w13_expert_stride;
    const int64_t padded = round_up(count, kPanel);
    for (int64_t c = 0; c < padded; ++c) {
      channels.rows[c] = gate + std::min(first + c, inner - 1) * hidden;
      channels.rows[padded + c] = channels.rows[c] + inner * hidden;
    }
    channels.count = 2 * padded;
  };
  const auto activate = [&](const Segment&, const RowGroup& group, int64_t first, int64_t count, const A* sums) {
    for (int64_t r = 0; r < group.num_rows; ++r) {
      const A* gate = sums + r * kMaxChannels;
      const A* up = gate + round_up(count, kPanel);
      A* target = activations.get() + group.first_row * padded_inner + first * group.num_rows + r * V::kWidth;
      for (int64_t c = 0; c < count; c += V::kWidth) {
        const int64_t width = std::min(V::kWidth, count - c);
        const V x = V::load_partial(gate + c, width, 0);
        (silu(x) * V::load_partial(up + c, width, 0)).store(target + c * group.num_rows);
      }
    }
  };
  multiply_blocks<T>(work, rows.get(), hidden, inner, block_channels<T>(hidden, 2), gate_and_up, activate);

  // out = activations @ down.T
  const auto down = [&](const Segment& segment, int64_t first, int64_t count, Channels<T>& channels) {
    const T* weight = static_cast<const T*>(params.w2_weight) + segment.expert * params.w2_expert_stride;
    channels.count = round_up(count, kPanel);
    for (int64_t c = 0; c < channels.count; ++c) channels.rows[c] = weight + std::min(first + c, hidden - 1) * inner;
  };
  const auto write = [&](const Segment& segment, const RowGroup& group, int64_t first, int64_t count, const A* sums) {
    const int64_t first_row = segment.first_row + group.first_row - segment.first_packed_row;
    for (int64_t r = 0; r < group.num_rows; ++r) {
      T* target = static_cast<T*>(params.out) + (first_row + r) * params.out_row_stride + first;
      for (int64_t c = 0; c < count; c += V::kWidth) {
        const int64_t width = std::min(V::kWidth, count - c);
        V::load_partial(sums + r * kMaxChannels + c, width, 0).store_partial(target + c, width);
      }
    }
  };
  multiply_blocks<T>(work, activations.get(), inner, hidden, block_channels<T>(inner, 1), down, write);
}
