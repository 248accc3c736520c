// SPDX-License-Identifier: Apache-2.0
#include "zexpert/cuda_stream.h"

#include "cuda/launch.cuh"

namespace zexpert {

bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  cuda::check(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

}  // namespace zexpert
