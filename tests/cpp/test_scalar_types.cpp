// SPDX-License-Identifier: Apache-2.0
#include "zexpert/scalar_types.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>

namespace zexpert {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// The value of a 16-bit pattern with `exponent_bits` of exponent, from the definition of the format.
double value_of(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const int implicit_one = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign * std::ldexp(mantissa + implicit_one, std::max(exponent, 1) - bias - mantissa_bits);
}

template <typename T>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kExponentBits = 8;
};
template <>
struct Format<Half> {
  static constexpr int kExponentBits = 5;
};

template <typename T>
class SixteenBits : public ::testing::Test {
 protected:
  static T from_bits(uint32_t bits) {
    T value;
    value.bits = static_cast<uint16_t>(bits);
    return value;
  }
};
using SixteenBitTypes = ::testing::Types<BFloat16, Half>;
TYPED_TEST_SUITE(SixteenBits, SixteenBitTypes);

TYPED_TEST(SixteenBits, EveryPatternHasItsValueAndComesBack) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam value = this->from_bits(bits);
    const double expected = value_of(value.bits, Format<TypeParam>::kExponentBits);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(value))) << bits;
      EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(static_cast<float>(value))))) << bits;
    } else {
      EXPECT_EQ(static_cast<double>(value), expected) << bits;
      EXPECT_EQ(static_cast<float>(value), static_cast<float>(expected)) << bits;
      EXPECT_EQ(TypeParam(static_cast<float>(value)).bits, bits);
      EXPECT_EQ(TypeParam(expected).bits, bits);
    }
  }
}

TYPED_TEST(SixteenBits, RoundsToNearestTiesToEven) {
  // Between any two neighbours: the midpoint goes to the even one, what lies beside it to the nearer one.
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const auto low = static_cast<float>(this->from_bits(bits));
    const auto high = static_cast<float>(this->from_bits(bits + 1));
    if (!std::isfinite(low) || !std::isfinite(high)) {
      continue;
    }
    const auto middle = static_cast<float>((static_cast<double>(low) + static_cast<double>(high)) / 2);
    const uint32_t even = bits + bits % 2;
    EXPECT_EQ(TypeParam(middle).bits, even) << bits;
    EXPECT_EQ(TypeParam(-middle).bits, even | 0x8000U) << bits;
    EXPECT_EQ(TypeParam(std::nextafter(middle, -kInfinity)).bits, bits) << bits;
    EXPECT_EQ(TypeParam(std::nextafter(middle, kInfinity)).bits, bits + 1) << bits;
  }
}

TYPED_TEST(SixteenBits, OverflowsToInfinity) {
  EXPECT_EQ(static_cast<float>(TypeParam(std::numeric_limits<float>::max())), kInfinity);
  EXPECT_EQ(static_cast<float>(TypeParam(-kInfinity)), -kInfinity);
}

TEST(Half, LargestFiniteValueAndTheFirstPastIt) {
  EXPECT_EQ(static_cast<float>(Half(65504.0F)), 65504.0F);
  EXPECT_EQ(static_cast<float>(Half(std::nextafter(65520.0F, 0.0F))), 65504.0F);
  EXPECT_EQ(static_cast<float>(Half(65520.0F)), kInfinity);
}

TEST(Float8E4M3, EveryPatternHasItsValueAndComesBack) {
  for (uint32_t bits = 0; bits < 256; ++bits) {
    Float8E4M3 number;
    number.bits = static_cast<uint8_t>(bits);
    const auto value = static_cast<float>(number);
    const uint32_t magnitude = bits & 0x7fU;
    if (magnitude == 0x7fU) {
      EXPECT_TRUE(std::isnan(value));
      EXPECT_EQ(Float8E4M3(value).bits & 0x7f, 0x7f);
      continue;
    }
    const auto exponent = static_cast<int>(magnitude >> 3U);
    const auto mantissa = static_cast<float>(magnitude & 7U);
    const float expected = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    EXPECT_EQ(value, (bits & 0x80U) != 0 ? -expected : expected) << bits;
    EXPECT_EQ(std::signbit(value), (bits & 0x80U) != 0);
    EXPECT_EQ(Float8E4M3(value).bits, bits);
  }
}

TEST(Float8E4M3, RoundsToNearestTiesToEvenAndSaturates) {
  for (uint32_t bits = 0; bits < 0x7e; ++bits) {
    Float8E4M3 lower, upper;
    lower.bits = static_cast<uint8_t>(bits);
    upper.bits = static_cast<uint8_t>(bits + 1);
    const float tie = (static_cast<float>(lower) + static_cast<float>(upper)) / 2;
    EXPECT_EQ(Float8E4M3(tie).bits, bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(Float8E4M3(std::nextafter(tie, 0.0F)).bits, bits);
    EXPECT_EQ(Float8E4M3(std::nextafter(tie, 448.0F)).bits, bits + 1);
    EXPECT_EQ(Float8E4M3(-tie).bits, 0x80U | Float8E4M3(tie).bits);
  }
  for (const float large : {448.0F, 464.0F, 465.0F, 1e30F, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(Float8E4M3(large).bits, 0x7e);
    EXPECT_EQ(Float8E4M3(-large).bits, 0xfe);
  }
}

TEST(ScalarType, VisitGivesTheTypeOfItsName) {
  const auto size_of = [](ScalarType type) {
    size_t size = 0;
    visit_floating(type, [&](auto element) { size = sizeof(element); });
    return size;
  };
  EXPECT_EQ(size_of(ScalarType::kFloat32), 4U);
  EXPECT_EQ(size_of(ScalarType::kFloat64), 8U);
  EXPECT_EQ(size_of(ScalarType::kBFloat16), 2U);
  EXPECT_EQ(size_of(ScalarType::kFloat16), 2U);
  EXPECT_STREQ(name(ScalarType::kBFloat16), "bfloat16");
  EXPECT_STREQ(name(ScalarType::kInt64), "int64");
}

TEST(ScalarType, VisitRefusesIntegers) {
  for (const ScalarType type : {ScalarType::kInt32, ScalarType::kInt64}) {
    EXPECT_THROW(visit_floating(type, [](auto) {}), Error);
  }
}

TEST(ScalarType, OnlyFloat64AccumulatesInFloat64) {
  EXPECT_TRUE((std::is_same_v<accumulate_t<double>, double>));
  EXPECT_TRUE((std::is_same_v<accumulate_t<float>, float>));
  EXPECT_TRUE((std::is_same_v<accumulate_t<BFloat16>, float>));
  EXPECT_TRUE((std::is_same_v<accumulate_t<Half>, float>));
}

}  // namespace
}  // namespace zexpert
