// SPDX-License-Identifier: Apache-2.0
// What several of the tests need: typed data, memory that notices stray writes, threads, and bounds on rounding errors.
#pragma once

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "zexpert/error.h"
#include "zexpert/parallel.h"
#include "zexpert/scalar_types.h"

namespace zexpert::testing {

// ---- Types ----------------------------------------------------------------------------------------------------------

using FloatingTypes = ::testing::Types<float, double, BFloat16, Half>;

template <typename T>
struct TypeTraits;
template <>
struct TypeTraits<float> {
  static constexpr ScalarType kType = ScalarType::kFloat32;
  static constexpr double kHalfUlp = 0x1p-24;  ///< largest relative error of rounding to the type
  static constexpr double kSmallest = 0x1p-149;
};
template <>
struct TypeTraits<double> {
  static constexpr ScalarType kType = ScalarType::kFloat64;
  static constexpr double kHalfUlp = 0x1p-53;
  static constexpr double kSmallest = 0x1p-1074;
};
template <>
struct TypeTraits<BFloat16> {
  static constexpr ScalarType kType = ScalarType::kBFloat16;
  static constexpr double kHalfUlp = 0x1p-8;
  static constexpr double kSmallest = 0x1p-133;
};
template <>
struct TypeTraits<Half> {
  static constexpr ScalarType kType = ScalarType::kFloat16;
  static constexpr double kHalfUlp = 0x1p-11;
  static constexpr double kSmallest = 0x1p-24;
};

/// Compares `actual` with a sum of `num_terms` products, exactly `expected`: every operation may round once
/// in the accumulation type, in proportion to `magnitude`, the sum of the products' absolute values, and the result
/// once in T.
template <typename T>
::testing::AssertionResult is_rounded_sum(T actual, double expected, double magnitude, int64_t num_terms) {
  const double accumulated =
      static_cast<double>(2 * num_terms) * TypeTraits<accumulate_t<T>>::kHalfUlp * magnitude * 1.01;
  const double bound =
      accumulated + TypeTraits<T>::kHalfUlp * (std::abs(expected) + accumulated) + TypeTraits<T>::kSmallest;
  const double error = std::abs(static_cast<double>(actual) - expected);
  if (error <= bound) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << static_cast<double>(actual) << " is " << error << " from " << expected
                                       << ", more than " << bound;
}

// ---- Data -----------------------------------------------------------------------------------------------------------

/// The same numbers on every run.
class Random {
 public:
  explicit Random(uint64_t seed = 20240715) : generator_(seed) {}

  template <typename T>
  std::vector<T> normal(int64_t size, double deviation = 1) {
    std::normal_distribution<double> distribution(0, deviation);
    std::vector<T> values(static_cast<size_t>(size));
    for (T& value : values) value = static_cast<T>(distribution(generator_));
    return values;
  }

  template <typename T>
  void fill(T* values, int64_t size, double deviation = 1) {
    const std::vector<T> source = normal<T>(size, deviation);
    std::copy(source.begin(), source.end(), values);
  }

  /// Integers in [low, high].
  template <typename Index>
  std::vector<Index> integers(int64_t size, Index low, Index high) {
    std::uniform_int_distribution<Index> distribution(low, high);
    std::vector<Index> values(static_cast<size_t>(size));
    for (Index& value : values) value = distribution(generator_);
    return values;
  }

 private:
  std::mt19937_64 generator_;
};

/// `num_rows` rows of `row_size` elements, `row_stride` elements apart, that start off every vector's boundary and end
/// where their memory ends. Gaps and, until they are written, rows hold the sentinel byte.
template <typename T>
class Rows {
 public:
  Rows(int64_t num_rows, int64_t row_size, int64_t row_stride)
      : num_rows_(num_rows),
        row_size_(row_size),
        row_stride_(row_stride),
        bytes_((kOffset + static_cast<size_t>(num_rows * row_stride)) * sizeof(T), kSentinel) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data()) + kOffset; }
  T* row(int64_t index) { return data() + index * row_stride_; }
  const T* row(int64_t index) const { return const_cast<Rows*>(this)->row(index); }
  int64_t stride() const { return row_stride_; }

  void randomize(Random& random, double deviation = 1) {
    for (int64_t i = 0; i < num_rows_; ++i) random.fill(row(i), row_size_, deviation);
  }

  /// Whether all bytes but the rows [begin, end) still are sentinels.
  bool untouched_outside(int64_t begin, int64_t end) const {
    const auto* first = bytes_.data();
    for (size_t byte = 0; byte < bytes_.size(); ++byte) {
      const int64_t element = static_cast<int64_t>(byte / sizeof(T)) - static_cast<int64_t>(kOffset);
      const bool inside =
          element >= begin * row_stride_ && element < end * row_stride_ && element % row_stride_ < row_size_;
      if (!inside && first[byte] != kSentinel) {
        return false;
      }
    }
    return true;
  }
  bool untouched() const { return untouched_outside(0, 0); }

  bool operator==(const Rows& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr size_t kOffset = 3;
  static constexpr char kSentinel = 0x5a;
  int64_t num_rows_, row_size_, row_stride_;
  std::vector<char> bytes_;
};

/// Address space without memory behind it until it is touched, for strides that no 32-bit offset reaches.
template <typename T>
class SparseMemory {
 public:
  explicit SparseMemory(int64_t num_elements) : bytes_(static_cast<size_t>(num_elements) * sizeof(T)) {
    address_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  }
  ~SparseMemory() {
    if (available()) {
      munmap(address_, bytes_);
    }
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;

  bool available() const { return address_ != MAP_FAILED; }
  T* data() { return static_cast<T*>(address_); }

 private:
  size_t bytes_;
  void* address_;
};

/// More elements than a 32-bit offset counts, and no power of two.
inline constexpr int64_t kHugeStride = (int64_t{1} << 31) + 1048583;

// ---- Threads --------------------------------------------------------------------------------------------------------

/// While it lives, parallel_for cuts every range into at most `most_ranges` ranges of at least the grain size, each on
/// a thread of its own, the last one first.
class ScopedThreads {
 public:
  explicit ScopedThreads(int64_t most_ranges) {
    most_ranges_ = most_ranges;
    set_parallel_for(&run);
  }
  ~ScopedThreads() { set_parallel_for(nullptr); }
  ScopedThreads(const ScopedThreads&) = delete;
  ScopedThreads& operator=(const ScopedThreads&) = delete;

 private:
  static void run(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context) {
    const int64_t least = std::max<int64_t>(grain_size, 1);
    const int64_t range = std::max(least, (end - begin + most_ranges_ - 1) / most_ranges_);
    std::vector<std::thread> threads;
    for (int64_t first = begin + (end - begin - 1) / range * range; first >= begin; first -= range) {
      threads.emplace_back(body, first, std::min(end, first + range), context);
    }
    for (std::thread& thread : threads) thread.join();
  }
  static inline int64_t most_ranges_ = 1;
};

// ---- Errors ---------------------------------------------------------------------------------------------------------

/// The message of the Error that `fn` throws.
template <typename Fn>
std::string error_of(const Fn& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

}  // namespace zexpert::testing
