// SPDX-License-Identifier: Apache-2.0
// The matrix instruction wgmma for every N that the grouped products use: sums[64, N] += a[64, k] @ b[N, k].T, both
// operands in shared memory with their depth contiguous; k is 16 for bfloat16 and float16, 32 for float8_e4m3fn. Sums
// are float32; those of float8 products keep about 14 bits. Only for code compiled for sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace zexpert::cuda {

/// Starts the instruction. A thread holds N / 2 of the sums: of warp w of the warpgroup, lane l, sums[4 * j + 2 * h +
/// i] is that of row 16 * w + 8 * h + l / 4 and column 8 * j + 2 * (l % 4) + i. `a` and `b` are matrix_descriptor's.
/// For float8, start() is the same with sums that count as 0.
template <typename T, int N>
struct Wgmma;

// clang-format off
// Registers %0 .. %(N / 2 - 1), and the sums that they are.
#define ZEXPERT_REGISTERS_8 "%0, %1, %2, %3"
#define ZEXPERT_REGISTERS_16 ZEXPERT_REGISTERS_8 ", %4, %5, %6, %7"
#define ZEXPERT_REGISTERS_24 ZEXPERT_REGISTERS_16 ", %8, %9, %10, %11"
#define ZEXPERT_REGISTERS_32 ZEXPERT_REGISTERS_24 ", %12, %13, %14, %15"
#define ZEXPERT_REGISTERS_40 ZEXPERT_REGISTERS_32 ", %16, %17, %18, %19"
#define ZEXPERT_REGISTERS_48 ZEXPERT_REGISTERS_40 ", %20, %21, %22, %23"
#define ZEXPERT_REGISTERS_56 ZEXPERT_REGISTERS_48 ", %24, %25, %26, %27"
#define ZEXPERT_REGISTERS_64 ZEXPERT_REGISTERS_56 ", %28, %29, %30, %31"
#define ZEXPERT_REGISTERS_72 ZEXPERT_REGISTERS_64 ", %32, %33, %34, %35"
#define ZEXPERT_REGISTERS_80 ZEXPERT_REGISTERS_72 ", %36, %37, %38, %39"
#define ZEXPERT_REGISTERS_88 ZEXPERT_REGISTERS_80 ", %40, %41, %42, %43"
#define ZEXPERT_REGISTERS_96 ZEXPERT_REGISTERS_88 ", %44, %45, %46, %47"
#define ZEXPERT_REGISTERS_104 ZEXPERT_REGISTERS_96 ", %48, %49, %50, %51"
#define ZEXPERT_REGISTERS_112 ZEXPERT_REGISTERS_104 ", %52, %53, %54, %55"
#define ZEXPERT_REGISTERS_120 ZEXPERT_REGISTERS_112 ", %56, %57, %58, %59"
#define ZEXPERT_REGISTERS_128 ZEXPERT_REGISTERS_120 ", %60, %61, %62, %63"
#define ZEXPERT_REGISTERS_136 ZEXPERT_REGISTERS_128 ", %64, %65, %66, %67"
#define ZEXPERT_REGISTERS_144 ZEXPERT_REGISTERS_136 ", %68, %69, %70, %71"
#define ZEXPERT_REGISTERS_152 ZEXPERT_REGISTERS_144 ", %72, %73, %74, %75"
#define ZEXPERT_REGISTERS_160 ZEXPERT_REGISTERS_152 ", %76, %77, %78, %79"
#define ZEXPERT_SUMS_8 "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
#define ZEXPERT_SUMS_16 ZEXPERT_SUMS_8, "+f"(sums[4]), "+f"(sums[5]), "+f"(sums[6]), "+f"(sums[7])
#define ZEXPERT_SUMS_24 ZEXPERT_SUMS_16, "+f"(sums[8]), "+f"(sums[9]), "+f"(sums[10]), "+f"(sums[11])
#define ZEXPERT_SUMS_32 ZEXPERT_SUMS_24, "+f"(sums[12]), "+f"(sums[13]), "+f"(sums[14]), "+f"(sums[15])
#define ZEXPERT_SUMS_40 ZEXPERT_SUMS_32, "+f"(sums[16]), "+f"(sums[17]), "+f"(sums[18]), "+f"(sums[19])
#define ZEXPERT_SUMS_48 ZEXPERT_SUMS_40, "+f"(sums[20]), "+f"(sums[21]), "+f"(sums[22]), "+f"(sums[23])
#define ZEXPERT_SUMS_56 ZEXPERT_SUMS_48, "+f"(sums[24]), "+f"(sums[25]), "+f"(sums[26]), "+f"(sums[27])
#define ZEXPERT_SUMS_64 ZEXPERT_SUMS_56, "+f"(sums[28]), "+f"(sums[29]), "+f"(sums[30]), "+f"(sums[31])
#define ZEXPERT_SUMS_72 ZEXPERT_SUMS_64, "+f"(sums[32]), "+f"(sums[33]), "+f"(sums[34]), "+f"(sums[35])
#define ZEXPERT_SUMS_80 ZEXPERT_SUMS_72, "+f"(sums[36]), "+f"(sums[37]), "+f"(sums[38]), "+f"(sums[39])
#define ZEXPERT_SUMS_88 ZEXPERT_SUMS_80, "+f"(sums[40]), "+f"(sums[41]), "+f"(sums[42]), "+f"(sums[43])
#define ZEXPERT_SUMS_96 ZEXPERT_SUMS_88, "+f"(sums[44]), "+f"(sums[45]), "+f"(sums[46]), "+f"(sums[47])
#define ZEXPERT_SUMS_104 ZEXPERT_SUMS_96, "+f"(sums[48]), "+f"(sums[49]), "+f"(sums[50]), "+f"(sums[51])
#define ZEXPERT_SUMS_112 ZEXPERT_SUMS_104, "+f"(sums[52]), "+f"(sums[53]), "+f"(sums[54]), "+f"(sums[55])
#define ZEXPERT_SUMS_120 ZEXPERT_SUMS_112, "+f"(sums[56]), "+f"(sums[57]), "+f"(sums[58]), "+f"(sums[59])
#define ZEXPERT_SUMS_128 ZEXPERT_SUMS_120, "+f"(sums[60]), "+f"(sums[61]), "+f"(sums[62]), "+f"(sums[63])
#define ZEXPERT_SUMS_136 ZEXPERT_SUMS_128, "+f"(sums[64]), "+f"(sums[65]), "+f"(sums[66]), "+f"(sums[67])
#define ZEXPERT_SUMS_144 ZEXPERT_SUMS_136, "+f"(sums[68]), "+f"(sums[69]), "+f"(sums[70]), "+f"(sums[71])
#define ZEXPERT_SUMS_152 ZEXPERT_SUMS_144, "+f"(sums[72]), "+f"(sums[73]), "+f"(sums[74]), "+f"(sums[75])
#define ZEXPERT_SUMS_160 ZEXPERT_SUMS_152, "+f"(sums[76]), "+f"(sums[77]), "+f"(sums[78]), "+f"(sums[79])

// A and B: the numbers of the operands that follow the sums. Scales of 1 for both inputs, neither transposed; a true
// predicate: added to the sums.
#define ZEXPERT_WGMMA(T, TYPE, N, A, B)                                                                      \
  template <>                                                                                                \
  struct Wgmma<T, N> {                                                                                       \
    static __device__ __forceinline__ void add(float (&sums)[N / 2], uint64_t a, uint64_t b) {               \
      asm volatile(                                                                                          \
          "{\n\t"                                                                                            \
          ".reg .pred add;\n\t"                                                                              \
          "setp.eq.u32 add, 1, 1;\n\t"                                                                       \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ZEXPERT_REGISTERS_##N "}, "    \
          "%" #A ", %" #B ", add, 1, 1, 0, 0;\n\t"                                                           \
          "}"                                                                                                \
          : ZEXPERT_SUMS_##N                                                                                 \
          : "l"(a), "l"(b)                                                                                   \
          : "memory");                                                                                       \
    }                                                                                                        \
  };
// START: 0 adds to the sums.
#define ZEXPERT_WGMMA_FP8(NAME, START, SUMS, N, A, B)                                               \
  static __device__ __forceinline__ void NAME(float (&sums)[N / 2], uint64_t a, uint64_t b) {        \
    asm volatile(                                                                                    \
        "{\n\t"                                                                                      \
        ".reg .pred add;\n\t"                                                                        \
        "setp.eq.u32 add, " #START ", 0;\n\t"                                                        \
        "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" ZEXPERT_REGISTERS_##N "}, "      \
        "%" #A ", %" #B ", add, 1, 1;\n\t"                                                           \
        "}"                                                                                          \
        : SUMS                                                                                       \
        : "l"(a), "l"(b)                                                                             \
        : "memory");                                                                                 \
  }
#define ZEXPERT_WGMMA_FP8_TYPE(N, A, B)                          \
  template <>                                                    \
  struct Wgmma<__nv_fp8_e4m3, N> {                               \
    ZEXPERT_WGMMA_FP8(add, 0, ZEXPERT_SUMS_##N, N, A, B)         \
    ZEXPERT_WGMMA_FP8(start, 1, ZEXPERT_SUMS_##N, N, A, B)       \
  };
#define ZEXPERT_WGMMA_TYPES(N, A, B)            \
  ZEXPERT_WGMMA(__nv_bfloat16, "bf16", N, A, B) \
  ZEXPERT_WGMMA(__half, "f16", N, A, B)         \
  ZEXPERT_WGMMA_FP8_TYPE(N, A, B)

ZEXPERT_WGMMA_TYPES(8, 4, 5)
ZEXPERT_WGMMA_TYPES(16, 8, 9)
ZEXPERT_WGMMA_TYPES(24, 12, 13)
ZEXPERT_WGMMA_TYPES(32, 16, 17)
ZEXPERT_WGMMA_TYPES(40, 20, 21)
ZEXPERT_WGMMA_TYPES(48, 24, 25)
ZEXPERT_WGMMA_TYPES(56, 28, 29)
ZEXPERT_WGMMA_TYPES(64, 32, 33)
ZEXPERT_WGMMA_TYPES(72, 36, 37)
ZEXPERT_WGMMA_TYPES(80, 40, 41)
ZEXPERT_WGMMA_TYPES(88, 44, 45)
ZEXPERT_WGMMA_TYPES(96, 48, 49)
ZEXPERT_WGMMA_TYPES(104, 52, 53)
ZEXPERT_WGMMA_TYPES(112, 56, 57)
ZEXPERT_WGMMA_TYPES(120, 60, 61)
ZEXPERT_WGMMA_TYPES(128, 64, 65)
ZEXPERT_WGMMA_TYPES(136, 68, 69)
ZEXPERT_WGMMA_TYPES(144, 72, 73)
ZEXPERT_WGMMA_TYPES(152, 76, 77)
ZEXPERT_WGMMA_TYPES(160, 80, 81)

#undef ZEXPERT_WGMMA_TYPES
#undef ZEXPERT_WGMMA
#undef ZEXPERT_WGMMA_FP8
#undef ZEXPERT_WGMMA_FP8_TYPE
#undef ZEXPERT_REGISTERS_8
#undef ZEXPERT_SUMS_8
#undef ZEXPERT_REGISTERS_16
#undef ZEXPERT_SUMS_16
#undef ZEXPERT_REGISTERS_24
#undef ZEXPERT_SUMS_24
#undef ZEXPERT_REGISTERS_32
#undef ZEXPERT_SUMS_32
#undef ZEXPERT_REGISTERS_40
#undef ZEXPERT_SUMS_40
#undef ZEXPERT_REGISTERS_48
#undef ZEXPERT_SUMS_48
#undef ZEXPERT_REGISTERS_56
#undef ZEXPERT_SUMS_56
#undef ZEXPERT_REGISTERS_64
#undef ZEXPERT_SUMS_64
#undef ZEXPERT_REGISTERS_72
#undef ZEXPERT_SUMS_72
#undef ZEXPERT_REGISTERS_80
#undef ZEXPERT_SUMS_80
#undef ZEXPERT_REGISTERS_88
#undef ZEXPERT_SUMS_88
#undef ZEXPERT_REGISTERS_96
#undef ZEXPERT_SUMS_96
#undef ZEXPERT_REGISTERS_104
#undef ZEXPERT_SUMS_104
#undef ZEXPERT_REGISTERS_112
#undef ZEXPERT_SUMS_112
#undef ZEXPERT_REGISTERS_120
#undef ZEXPERT_SUMS_120
#undef ZEXPERT_REGISTERS_128
#undef ZEXPERT_SUMS_128
#undef ZEXPERT_REGISTERS_136
#undef ZEXPERT_SUMS_136
#undef ZEXPERT_REGISTERS_144
#undef ZEXPERT_SUMS_144
#undef ZEXPERT_REGISTERS_152
#undef ZEXPERT_SUMS_152
#undef ZEXPERT_REGISTERS_160
#undef ZEXPERT_SUMS_160
// clang-format on

}  // namespace zexpert::cuda
