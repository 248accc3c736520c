// SPDX-License-Identifier: Apache-2.0
// The one error type of zexpert and the check that throws it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace zexpert {

/// Bad input. The message is one sentence that names the argument, what it must be and what it was.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace detail {
template <typename... Parts>
[[noreturn]] void throw_error(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}
}  // namespace detail

}  // namespace zexpert

/// Throws zexpert::Error with the streamed parts as its message unless `condition` holds.
#define ZEXPERT_CHECK(condition, ...)              \
  do {                                             \
    if (!(condition)) {                            \
      ::zexpert::detail::throw_error(__VA_ARGS__); \
    }                                              \
  } while (false)
