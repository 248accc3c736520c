// SPDX-License-Identifier: Apache-2.0
// What the CUDA library was compiled with, in C so that Python asks without a binding. Answers without touching a GPU.
#include <cuda_runtime_api.h>

#include "zexpert_build_config.h"

extern "C" {

/// Version of the CUDA toolkit, 1000 * major + 10 * minor.
int zexpert_cuda_toolkit_version() { return CUDART_VERSION; }

/// Architectures compiled for, as in TORCH_CUDA_ARCH_LIST: "8.0;9.0a;10.0+PTX".
const char* zexpert_cuda_architectures() { return ZEXPERT_CUDA_ARCHS; }

}  // extern "C"
