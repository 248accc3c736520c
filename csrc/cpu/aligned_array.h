// SPDX-License-Identifier: Apache-2.0
// Scratch memory for vectors. It has internal linkage: kernels that are compiled for one instruction set instantiate
// it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace zexpert {
namespace {

/// Memory for `size` numbers on a cache line's boundary, not initialised.
template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), kAlignment))) {}
  T* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Deleter {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Deleter> data_;
};

}  // namespace
}  // namespace zexpert
