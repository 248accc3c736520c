// SPDX-License-Identifier: Apache-2.0
// Enumerations shared by C++ and Python. Each list below is the only definition: the enum, its names, its parser and
// its Python enum are all made from it.
#pragma once

#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>

#include "zexpert/error.h"

namespace zexpert {

// X(enumerator, PYTHON_NAME, "name")

/// How a logit becomes a score: softmax over all experts, sigmoid, or sqrt(softplus).
#define ZEXPERT_SCORING_FUNCS(X)  \
  X(kSoftmax, SOFTMAX, "softmax") \
  X(kSigmoid, SIGMOID, "sigmoid") \
  X(kSqrtSoftplus, SQRT_SOFTPLUS, "sqrtsoftplus")

/// What a zero expert does with a token: returns it, adds a learned constant, or does nothing.
#define ZEXPERT_ZERO_EXPERT_TYPES(X) \
  X(kIdentity, IDENTITY, "identity") \
  X(kConstant, CONSTANT, "constant") \
  X(kDrop, DROP, "drop")

#define ZEXPERT_ENUMERATOR(enumerator, python_name, text) enumerator,
#define ZEXPERT_NAME_CASE(enumerator, python_name, text) \
  case Enum::enumerator: return text;
#define ZEXPERT_KNOWN_CASE(enumerator, python_name, text) \
  case Enum::enumerator: return;
#define ZEXPERT_QUOTED_NAME(enumerator, python_name, text) "\"" text "\"",
#define ZEXPERT_PARSE_CASE(enumerator, python_name, text) \
  if (value == (text)) {                                  \
    return Enum::enumerator;                              \
  }

// name() of a value that is none of the enumerators is "unknown".
#define ZEXPERT_DEFINE_ENUM(Name, LIST)                  \
  enum class Name : int8_t { LIST(ZEXPERT_ENUMERATOR) }; \
  inline const char* name(Name value) {                  \
    using Enum = Name;                                   \
    switch (value) { LIST(ZEXPERT_NAME_CASE) }           \
    return "unknown";                                    \
  }

ZEXPERT_DEFINE_ENUM(ScoringFunc, ZEXPERT_SCORING_FUNCS)
ZEXPERT_DEFINE_ENUM(ZeroExpertType, ZEXPERT_ZERO_EXPERT_TYPES)

/// Throws Error unless `value` is one of the enumerators.
inline void check_scoring_func(ScoringFunc value) {
  using Enum = ScoringFunc;
  switch (value) { ZEXPERT_SCORING_FUNCS(ZEXPERT_KNOWN_CASE) }
  detail::throw_error("scoring_func must be a ScoringFunc, got ", static_cast<int>(value));
}

/// The scoring function called `value`; throws Error for any other text.
inline ScoringFunc parse_scoring_func(std::string_view value) {
  using Enum = ScoringFunc;
  ZEXPERT_SCORING_FUNCS(ZEXPERT_PARSE_CASE)
  constexpr std::string_view kNames[] = {ZEXPERT_SCORING_FUNCS(ZEXPERT_QUOTED_NAME)};
  std::string names;
  for (size_t i = 0; i < std::size(kNames); ++i) {
    names += i == 0 ? "" : i + 1 == std::size(kNames) ? " or " : ", ";
    names += kNames[i];
  }
  detail::throw_error("scoring_func must be ", names, ", got \"", value, "\"");
}

/// The zero-expert type called `value`; "copy" is identity and "zero" is drop. Throws Error for any other text.
inline ZeroExpertType parse_zero_expert_type(std::string_view value) {
  using Enum = ZeroExpertType;
  ZEXPERT_ZERO_EXPERT_TYPES(ZEXPERT_PARSE_CASE)
  if (value == "copy") {
    return ZeroExpertType::kIdentity;
  }
  if (value == "zero") {
    return ZeroExpertType::kDrop;
  }
  detail::throw_error(
      "zero_expert_type must be \"identity\" (or \"copy\"), \"constant\" or \"drop\" (or \"zero\"), got \"", value,
      "\"");
}

#undef ZEXPERT_ENUMERATOR
#undef ZEXPERT_NAME_CASE
#undef ZEXPERT_KNOWN_CASE
#undef ZEXPERT_QUOTED_NAME
#undef ZEXPERT_PARSE_CASE
#undef ZEXPERT_DEFINE_ENUM

}  // namespace zexpert
