// SPDX-License-Identifier: Apache-2.0
// ZEXPERT_BOX(&function): the boxed kernel that calls `function` with an operator's arguments, for m.impl().
//
// It does what TORCH_BOX does, and two things more:
//   - It frees string arguments. Before PyTorch 2.14, TORCH_BOX loses a std::string at every call.
//   - One parameter of the function may stand for several arguments of the schema: specialise ReadArgument for its
//   type.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "torch/tensor.h"
#include "zexpert/error.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Reads an operator's arguments from the stack, in the order of the schema.
class ArgumentReader {
 public:
  explicit ArgumentReader(const StableIValue* stack) : next_(stack) {}

  template <typename T>
  T read();

  /// The next argument. The caller owns it.
  StableIValue next() { return *next_++; }

 private:
  const StableIValue* next_;
};

/// Makes a T of kCount arguments of the schema. If read() throws, it must have read all of them before.
template <typename T>
struct ReadArgument {
  static constexpr uint64_t kCount = 1;
  static T read(ArgumentReader& reader) { return torch::stable::detail::to<T>(reader.next()); }
};

template <>
struct ReadArgument<std::string> {
  static constexpr uint64_t kCount = 1;
  static std::string read(ArgumentReader& reader) {
    const auto handle = torch::stable::detail::to<StringHandle>(reader.next());
    const char* data = nullptr;
    size_t length = 0;
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    std::string text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

template <typename T>
T ArgumentReader::read() {
  return ReadArgument<T>::read(*this);
}

/// Puts an operator's results on the stack.
template <typename Result>
void write_results(StableIValue* stack, const Result& result) {
  stack[0] = torch::stable::detail::from(result);
}

template <typename... Results>
void write_results(StableIValue* stack, const std::tuple<Results...>& results) {
  std::apply([stack](const Results&... each) mutable { ((*stack++ = torch::stable::detail::from(each)), ...); },
             results);
}

template <typename Result>
inline constexpr uint64_t kNumResults = 1;
template <>
inline constexpr uint64_t kNumResults<void> = 0;
template <typename... Results>
inline constexpr uint64_t kNumResults<std::tuple<Results...>> = sizeof...(Results);

template <auto function>
struct Box;

template <typename Result, typename... Parameters, Result (*function)(Parameters...)>
struct Box<function> {
  static void call(StableIValue* stack, uint64_t num_arguments, uint64_t num_results) {
    constexpr uint64_t kNumArguments = (0 + ... + ReadArgument<std::decay_t<Parameters>>::kCount);
    ZEXPERT_CHECK(num_arguments == kNumArguments && num_results == kNumResults<Result>,
                  "the operator's schema must have ", kNumArguments, " arguments and ", kNumResults<Result>,
                  " results like its implementation, got ", num_arguments, " and ", num_results);
    ArgumentReader reader(stack);
    // Braces: the arguments are read from left to right.
    const std::tuple<std::decay_t<Parameters>...> arguments{reader.read<std::decay_t<Parameters>>()...};
    if constexpr (std::is_void_v<Result>) {
      std::apply(function, arguments);
    } else {
      write_results(stack, std::apply(function, arguments));
    }
  }
};

HIDDEN_NAMESPACE_END(zexpert, ops)

#define ZEXPERT_BOX(function) (&::zexpert::ops::Box<(function)>::call)
