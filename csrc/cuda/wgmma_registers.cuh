// SPDX-License-Identifier: Apache-2.0
// The matrix instruction wgmma.m64nNk16 with its first operand in registers: sums[64, N] += a[64, 16] @ b[N, 16].T,
// float32 sums of bfloat16 or float16; b in shared memory with its depth contiguous. Only for code compiled for sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace zexpert::cuda {

/// Starts the instruction. Lane l of warp w of the warpgroup gives, in a[2 * d + h], the elements of row 16 * w + 8 * h
/// + l / 4 and depth 8 * d + 2 * (l % 4) and the next, and holds N / 2 of the sums: sums[4 * j + 2 * h + i] is that of
/// the same row and column 8 * j + 2 * (l % 4) + i. If `adds` is 0, the sums before count as 0. `b` is
/// matrix_descriptor's. `a` and `sums` must not be touched before the instruction is over.
template <typename T, int N>
struct WgmmaRegisters;

// clang-format off
// Registers %0 .. %(N / 2 - 1), and the sums that they are.
#define ZEXPERT_REGISTERS_8 "%0, %1, %2, %3"
#define ZEXPERT_REGISTERS_16 ZEXPERT_REGISTERS_8 ", %4, %5, %6, %7"
#define ZEXPERT_REGISTERS_32 ZEXPERT_REGISTERS_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define ZEXPERT_REGISTERS_64 ZEXPERT_REGISTERS_32 ", %16, %17, %18, %19, %20, %21, %22, %23, " \
                                                  "%24, %25, %26, %27, %28, %29, %30, %31"
#define ZEXPERT_REGISTERS_128 ZEXPERT_REGISTERS_64 ", %32, %33, %34, %35, %36, %37, %38, %39, " \
                                                   "%40, %41, %42, %43, %44, %45, %46, %47, " \
                                                   "%48, %49, %50, %51, %52, %53, %54, %55, " \
                                                   "%56, %57, %58, %59, %60, %61, %62, %63"
#define ZEXPERT_SUMS_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define ZEXPERT_SUMS_8 ZEXPERT_SUMS_4(0)
#define ZEXPERT_SUMS_16 ZEXPERT_SUMS_8, ZEXPERT_SUMS_4(4)
#define ZEXPERT_SUMS_32 ZEXPERT_SUMS_16, ZEXPERT_SUMS_4(8), ZEXPERT_SUMS_4(12)
#define ZEXPERT_SUMS_64 ZEXPERT_SUMS_32, ZEXPERT_SUMS_4(16), ZEXPERT_SUMS_4(20), ZEXPERT_SUMS_4(24), ZEXPERT_SUMS_4(28)
#define ZEXPERT_SUMS_128 ZEXPERT_SUMS_64, ZEXPERT_SUMS_4(32), ZEXPERT_SUMS_4(36), ZEXPERT_SUMS_4(40), \
                                          ZEXPERT_SUMS_4(44), ZEXPERT_SUMS_4(48), ZEXPERT_SUMS_4(52), \
                                          ZEXPERT_SUMS_4(56), ZEXPERT_SUMS_4(60)

// A0 .. A3, B, ADDS: the numbers of the operands that follow the sums. Scales of 1 for both inputs, b not transposed.
#define ZEXPERT_WGMMA(T, TYPE, N, A0, A1, A2, A3, B, ADDS)                                                         \
  template <>                                                                                                      \
  struct WgmmaRegisters<T, N> {                                                                                    \
    static __device__ __forceinline__ void add(float (&sums)[N / 2], const uint32_t (&a)[4], uint64_t b, int adds) { \
      asm volatile(                                                                                                \
          "{\n\t"                                                                                                  \
          ".reg .pred adds;\n\t"                                                                                   \
          "setp.ne.b32 adds, %" #ADDS ", 0;\n\t"                                                                   \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ZEXPERT_REGISTERS_##N "}, "         \
          "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", adds, 1, 1, 0;\n\t"                                  \
          "}"                                                                                                      \
          : ZEXPERT_SUMS_##N                                                                                       \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds)                                          \
          : "memory");                                                                                             \
    }                                                                                                              \
  };
#define ZEXPERT_WGMMA_TYPES(N, A0, A1, A2, A3, B, ADDS)            \
  ZEXPERT_WGMMA(__nv_bfloat16, "bf16", N, A0, A1, A2, A3, B, ADDS) \
  ZEXPERT_WGMMA(__half, "f16", N, A0, A1, A2, A3, B, ADDS)

ZEXPERT_WGMMA_TYPES(8, 4, 5, 6, 7, 8, 9)
ZEXPERT_WGMMA_TYPES(16, 8, 9, 10, 11, 12, 13)
ZEXPERT_WGMMA_TYPES(32, 16, 17, 18, 19, 20, 21)
ZEXPERT_WGMMA_TYPES(64, 32, 33, 34, 35, 36, 37)
ZEXPERT_WGMMA_TYPES(128, 64, 65, 66, 67, 68, 69)

#undef ZEXPERT_WGMMA_TYPES
#undef ZEXPERT_WGMMA
#undef ZEXPERT_SUMS_4
#undef ZEXPERT_REGISTERS_8
#undef ZEXPERT_SUMS_8
#undef ZEXPERT_REGISTERS_16
#undef ZEXPERT_SUMS_16
#undef ZEXPERT_REGISTERS_32
#undef ZEXPERT_SUMS_32
#undef ZEXPERT_REGISTERS_64
#undef ZEXPERT_SUMS_64
#undef ZEXPERT_REGISTERS_128
#undef ZEXPERT_SUMS_128
// clang-format on

}  // namespace zexpert::cuda
