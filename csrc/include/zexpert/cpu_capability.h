// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use on this machine.
#pragma once

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#include <strings.h>
#endif

namespace zexpert {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

inline const char* name(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kDefault: return "DEFAULT";
    case CpuCapability::kAvx2: return "AVX2";
    case CpuCapability::kAvx512: return "AVX512";
  }
  return "unknown";
}

namespace detail {
inline CpuCapability detect_cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__)
  const char* cap = std::getenv("ZEXPERT_CPU_CAPABILITY");
  const bool allow_avx2 = cap == nullptr || strcasecmp(cap, "default") != 0;
  const bool allow_avx512 = allow_avx2 && (cap == nullptr || strcasecmp(cap, "avx2") != 0);
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && allow_avx512) {
    return CpuCapability::kAvx512;
  }
  if (has_avx2 && allow_avx2) {
    return CpuCapability::kAvx2;
  }
#endif
  return CpuCapability::kDefault;
}
}  // namespace detail

/// The instruction set in use, found once. The environment variable ZEXPERT_CPU_CAPABILITY, read at the first call,
/// lowers it: "default", "avx2" or "avx512", in any case. Other values are ignored.
inline CpuCapability cpu_capability() {
  static const CpuCapability capability = detail::detect_cpu_capability();
  return capability;
}

/// Whether the processor has matrix units for bfloat16 (AMX). Asked once: cpuid is slow on virtual machines.
inline bool has_amx_bf16() {
#if defined(__x86_64__)
  static const bool has = [] {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && ((edx >> 22U) & 1U) != 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace zexpert
