// SPDX-License-Identifier: Apache-2.0
// Compiles a kernel file once per instruction set.
//
// A kernel's .cpp defines ZEXPERT_KERNEL_FILE as the name of the kernel file in quotes, includes every header that the
// kernel needs, then includes this file. The kernel's code is compiled in zexpert::isa_avx512, zexpert::isa_avx2 and
// zexpert::isa_default, each with that instruction set's Vec (vec.h). ZEXPERT_DISPATCH calls the best one that this
// machine supports. Do not include a header from a kernel file: its inline functions would be compiled for one
// instruction set and could be linked into code for every machine.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 13
// GCC 12 warns about deliberately undefined registers in its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

#include "zexpert/cpu_capability.h"
#include "zexpert/scalar_types.h"

#define ZEXPERT_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__)

#if defined(__clang__)
#define ZEXPERT_BEGIN_AVX512                                                                                          \
  _Pragma(                                                                                                            \
      "clang attribute "                                                                                              \
      "push(__attribute__((target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt\"))), apply_to " \
      "= function)")
#define ZEXPERT_BEGIN_AVX2 \
  _Pragma("clang attribute push(__attribute__((target(\"avx2,fma,f16c,bmi,bmi2,popcnt\"))), apply_to = function)")
#define ZEXPERT_END_ISA _Pragma("clang attribute pop")
#else
#define ZEXPERT_BEGIN_AVX512           \
  _Pragma("GCC push_options") _Pragma( \
      "GCC target(\"avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2,popcnt,prefer-vector-width=512\")")
#define ZEXPERT_BEGIN_AVX2 _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma,f16c,bmi,bmi2,popcnt\")")
#define ZEXPERT_END_ISA _Pragma("GCC pop_options")
#endif

ZEXPERT_BEGIN_AVX512
#define ZEXPERT_ISA_AVX512
namespace zexpert::isa_avx512 {
namespace {
#include "cpu/simd/vec.h"
#include ZEXPERT_KERNEL_FILE
}  // namespace
}  // namespace zexpert::isa_avx512
#undef ZEXPERT_ISA_AVX512
ZEXPERT_END_ISA

ZEXPERT_BEGIN_AVX2
#define ZEXPERT_ISA_AVX2
namespace zexpert::isa_avx2 {
namespace {
#include "cpu/simd/vec.h"
#include ZEXPERT_KERNEL_FILE
}  // namespace
}  // namespace zexpert::isa_avx2
#undef ZEXPERT_ISA_AVX2
ZEXPERT_END_ISA

#endif  // x86-64

namespace zexpert::isa_default {
namespace {
#include "cpu/simd/vec.h"
#include ZEXPERT_KERNEL_FILE
}  // namespace
}  // namespace zexpert::isa_default

#if defined(__x86_64__)
/// Calls `function` of the namespace for the instruction set in use.
#define ZEXPERT_DISPATCH(function, ...)                                                            \
  switch (::zexpert::cpu_capability()) {                                                           \
    case ::zexpert::CpuCapability::kAvx512: ::zexpert::isa_avx512::function(__VA_ARGS__); break;   \
    case ::zexpert::CpuCapability::kAvx2: ::zexpert::isa_avx2::function(__VA_ARGS__); break;       \
    case ::zexpert::CpuCapability::kDefault: ::zexpert::isa_default::function(__VA_ARGS__); break; \
  }
#else
#define ZEXPERT_DISPATCH(function, ...) ::zexpert::isa_default::function(__VA_ARGS__)
#endif
