// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_idle.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
/// Blocks of one expert, so that all multiprocessors write where few experts are idle.
constexpr int kBlocksPerExpert = 64;

int64_t element_bytes(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
    case ScalarType::kInt64: return 8;
    case ScalarType::kFloat32:
    case ScalarType::kInt32: return 4;
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: return 2;
  }
  return 1;
}

/// Words of memory, whatever they hold.
struct WordsToZero {
  void* data;
  int64_t words_per_row;  ///< of an expert, or of a row
};

template <typename Word>
__device__ __forceinline__ void zero_row(const WordsToZero& words, int64_t row, int64_t first, int64_t step) {
  Word* const begin = static_cast<Word*>(words.data) + row * words.words_per_row;
  for (int64_t i = first; i < words.words_per_row; i += step) begin[i] = Word{};
}

template <typename Word>
__global__ void __launch_bounds__(kThreads)
    zero_idle_experts(const WordsToZero words, const int32_t* expert_offsets, const int blocks_per_expert) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t expert = blockIdx.x / static_cast<unsigned>(blocks_per_expert);
  const int64_t block = blockIdx.x % static_cast<unsigned>(blocks_per_expert);
  if (expert_offsets[expert] < expert_offsets[expert + 1])
    return;
  zero_row<Word>(words, expert, block * kThreads + threadIdx.x, int64_t{blocks_per_expert} * kThreads);
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) zero_idle_rows(const WordsToZero words, const int32_t* last_offset) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  if (does_work(last_offset, row))
    return;
  zero_row<Word>(words, row, threadIdx.x, blockDim.x);
}

/// Calls fn(word, words) with the widest word that rows of `row_bytes` bytes from `data` on are made of.
template <typename Fn>
void visit_words(void* data, int64_t row_bytes, const Fn& fn) {
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) | row_bytes;
  if (misaligned % static_cast<int64_t>(sizeof(uint4)) == 0) {
    fn(uint4{}, WordsToZero{data, row_bytes / static_cast<int64_t>(sizeof(uint4))});
  } else {
    fn(uint16_t{}, WordsToZero{data, row_bytes / static_cast<int64_t>(sizeof(uint16_t))});
  }
}

}  // namespace
}  // namespace cuda

void zero_idle_experts_cuda(const ZeroIdleExpertsParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t bytes = params.expert_size * cuda::element_bytes(params.data_type);
  cuda::visit_words(params.data, bytes, [&](auto word, const cuda::WordsToZero& words) {
    const int64_t blocks = cuda::blocks_for_row<1>(words.words_per_row, cuda::kThreads);
    const int64_t blocks_per_expert = blocks < cuda::kBlocksPerExpert ? blocks : cuda::kBlocksPerExpert;
    cuda::launch("zero_idle_experts", &cuda::zero_idle_experts<decltype(word)>, params.num_experts * blocks_per_expert,
                 cuda::kThreads, 0, stream, words, params.expert_offsets, static_cast<int>(blocks_per_expert));
  });
}

void zero_idle_rows_cuda(const ZeroIdleRowsParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t bytes = params.row_size * cuda::element_bytes(params.data_type);
  cuda::visit_words(params.data, bytes, [&](auto word, const cuda::WordsToZero& words) {
    cuda::launch("zero_idle_rows", &cuda::zero_idle_rows<decltype(word)>, params.num_rows,
                 cuda::threads_for_row<1>(words.words_per_row, cuda::kThreads), 0, stream, words, params.last_offset);
  });
}

}  // namespace zexpert
