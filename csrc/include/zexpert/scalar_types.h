// SPDX-License-Identifier: Apache-2.0
// Element types that kernels read and write, with their conversions to and from float.
#pragma once

#include <cstdint>
#include <cstring>

#include "zexpert/error.h"

namespace zexpert {

// X(enumerator, "name")
#define ZEXPERT_SCALAR_TYPES(X) \
  X(kFloat32, "float32")        \
  X(kFloat64, "float64")        \
  X(kBFloat16, "bfloat16")      \
  X(kFloat16, "float16")        \
  X(kInt32, "int32")            \
  X(kInt64, "int64")

#define ZEXPERT_ENUMERATOR(enumerator, text) enumerator,
#define ZEXPERT_NAME_CASE(enumerator, text) \
  case ScalarType::enumerator: return text;

enum class ScalarType : int8_t { ZEXPERT_SCALAR_TYPES(ZEXPERT_ENUMERATOR) };

/// The type's name in Python; "unknown" for a value that is none of the enumerators.
inline const char* name(ScalarType type) {
  switch (type) { ZEXPERT_SCALAR_TYPES(ZEXPERT_NAME_CASE) }
  return "unknown";
}

#undef ZEXPERT_ENUMERATOR
#undef ZEXPERT_NAME_CASE

/// Whether visit_floating has a C++ type for it.
constexpr bool is_floating(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat32:
    case ScalarType::kFloat64:
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: return true;
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;
  }
  return false;
}

namespace detail {
template <typename To, typename From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace detail

/// The upper half of a float32. Converting to it rounds to nearest, ties to even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits = 0;

  BFloat16() = default;
  explicit BFloat16(float value) {
    const auto word = detail::bit_cast<uint32_t>(value);
    const bool is_nan = (word & 0x7fffffffU) > 0x7f800000U;
    bits =
        is_nan ? static_cast<uint16_t>(0x7fc0U) : static_cast<uint16_t>((word + 0x7fffU + ((word >> 16U) & 1U)) >> 16U);
  }
  explicit BFloat16(double value) : BFloat16(static_cast<float>(value)) {}
  explicit operator float() const { return detail::bit_cast<float>(static_cast<uint32_t>(bits) << 16U); }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
};

/// IEEE 754 binary16. Converting to it rounds to nearest, ties to even; NaN stays NaN.
struct Half {
  uint16_t bits = 0;

  Half() = default;
  explicit Half(float value) {
    const auto word = detail::bit_cast<uint32_t>(value);
    const uint32_t sign = (word >> 16U) & 0x8000U;
    const uint32_t magnitude = word & 0x7fffffffU;
    uint32_t half = 0;
    if (magnitude > 0x7f800000U) {
      half = 0x7e00U;
    } else if (magnitude >= 0x477ff000U) {  // 65520 and above round to infinity
      half = 0x7c00U;
    } else if (magnitude < 0x38800000U) {
      // Below 2^-14 the result is subnormal: adding 0.5 lets the float adder do the rounding.
      const float sum = detail::bit_cast<float>(magnitude) + 0.5F;
      half = detail::bit_cast<uint32_t>(sum) - 0x3f000000U;
    } else {
      half = (magnitude + 0xc8000fffU + ((magnitude >> 13U) & 1U)) >> 13U;
    }
    bits = static_cast<uint16_t>(sign | half);
  }
  explicit Half(double value) : Half(static_cast<float>(value)) {}
  explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000U) << 16U;
    const uint32_t magnitude = bits & 0x7fffU;
    if (magnitude >= 0x7c00U) {  // infinity and NaN
      return detail::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13U));
    }
    if (magnitude < 0x400U) {  // zero and subnormals, in units of 2^-24
      const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8F;
      return detail::bit_cast<float>(detail::bit_cast<uint32_t>(value) | sign);
    }
    return detail::bit_cast<float>(sign | ((magnitude << 13U) + 0x38000000U));
  }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
};

/// float8_e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, no infinity; NaN has all bits set but the sign. Converting to
/// it rounds to nearest, ties to even, and saturates at 448; NaN stays NaN.
struct Float8E4M3 {
  uint8_t bits = 0;

  Float8E4M3() = default;
  explicit Float8E4M3(float value) {
    const auto word = detail::bit_cast<uint32_t>(value);
    const uint32_t magnitude = word & 0x7fffffffU;
    uint32_t code = 0;
    if (magnitude > 0x7f800000U) {
      code = 0x7fU;
    } else if (magnitude >= 0x43e00000U) {
      code = 0x7eU;
    } else if (magnitude < 0x3c800000U) {
      // Below 2^-6 the result is subnormal, in units of 2^-9, the last bit of 2^14: the float adder does the rounding.
      const float sum = detail::bit_cast<float>(magnitude) + 16384.0F;
      code = detail::bit_cast<uint32_t>(sum) - 0x46800000U;
    } else {
      code = ((magnitude + 0x7ffffU + ((magnitude >> 20U) & 1U)) >> 20U) - (120U << 3U);
    }
    bits = static_cast<uint8_t>(((word >> 24U) & 0x80U) | code);
  }
  explicit operator float() const {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x80U) << 8U;
    const uint32_t magnitude = bits & 0x7fU;
    Half small;  // the same bits in their places in a float16, which makes it 2^-8 times the value
    small.bits = static_cast<uint16_t>(sign | (magnitude == 0x7fU ? 0x7e00U : magnitude << 7U));
    return static_cast<float>(small) * 256.0F;
  }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }
};

/// The type in which values of T are computed: float64 for float64, float32 for every other.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

/// Calls `fn` with a value of the C++ type of `type`. Throws Error unless that is one of the four floating types.
template <typename Fn>
inline void visit_floating(ScalarType type, Fn&& fn) {
  switch (type) {
    case ScalarType::kFloat32: return fn(float{});
    case ScalarType::kFloat64: return fn(double{});
    case ScalarType::kBFloat16: return fn(BFloat16{});
    case ScalarType::kFloat16: return fn(Half{});
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;
  }
  detail::throw_error("data must be of a floating type, got ", name(type));
}

/// Calls `fn` with a value of the C++ type of `type`. Throws Error unless that is int32 or int64.
template <typename Fn>
inline void visit_index(ScalarType type, Fn&& fn) {
  switch (type) {
    case ScalarType::kInt32: return fn(int32_t{});
    case ScalarType::kInt64: return fn(int64_t{});
    case ScalarType::kFloat32:
    case ScalarType::kFloat64:
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: break;
  }
  detail::throw_error("ids must be int32 or int64, got ", name(type));
}

}  // namespace zexpert
