# SPDX-License-Identifier: Apache-2.0
# GoogleTest: the system's (Debian: libgtest-dev) where there is one, else a release pinned by its hash.
find_package(GTest 1.12 QUIET)
if(GTest_FOUND)
  message(STATUS "GoogleTest: ${GTest_VERSION}, installed (${GTest_DIR})")
else()
  message(STATUS "GoogleTest: not installed (Debian: apt-get install libgtest-dev), so it is downloaded")
  include(FetchContent)
  set(BUILD_SHARED_LIBS OFF)
  set(INSTALL_GTEST OFF)
  set(BUILD_GMOCK OFF)
  FetchContent_Declare(
    googletest
    URL https://github.com/google/googletest/releases/download/v1.17.0/googletest-1.17.0.tar.gz
    URL_HASH SHA256=65fab701d9829d38cb77c14acdc431d2108bfdbf8979e40eb8ae567edf10b27c)
  FetchContent_MakeAvailable(googletest)
  if(NOT TARGET GTest::gtest_main)
    add_library(GTest::gtest_main ALIAS gtest_main)
  endif()
endif()
