// SPDX-License-Identifier: Apache-2.0
// CUDA's stream handle without CUDA's headers, so that zexpert's own serve programs that have no CUDA toolkit.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;  // the same type that cuda_runtime_api.h declares

namespace zexpert {

/// Whether a CUDA graph captures the stream. Throws Error if CUDA cannot say.
bool is_capturing(cudaStream_t stream);

}  // namespace zexpert
