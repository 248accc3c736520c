#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Checks for what cannot come from PyPI: a C++ compiler, Python with its headers and venv, GoogleTest. On Debian, what is
# missing is installed if this may be done without asking (root, or sudo without a password); otherwise a sentence says
# what to install.
#
# usage: check_system.sh PYTHON [googletest]
set -u

python=$1
want_googletest=${2:-}

can_install=no
as_root=
if command -v apt-get > /dev/null; then
  if [ "$(id -u)" = 0 ]; then
    can_install=yes
  elif command -v sudo > /dev/null && sudo -n true 2> /dev/null; then
    can_install=yes
    as_root=sudo
  fi
fi

# install PACKAGE: quiet unless it fails
install() {
  [ "$can_install" = yes ] || return 1
  echo "installing $1 (apt-get install $1)"
  log=$(mktemp)
  command="$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $1"
  # The package lists of a fresh machine are empty.
  $command > "$log" 2>&1 || { $as_root apt-get update -qq && $command; } > "$log" 2>&1 || cat "$log" >&2
  rm -f "$log"
}

# require WHAT PACKAGE PROBE...: WHAT is missing while PROBE fails
require() {
  what=$1 package=$2
  shift 2
  "$@" > /dev/null 2>&1 && return
  install "$package"
  "$@" > /dev/null 2>&1 && return
  echo "error: $what is missing; install it (on Debian: apt-get install $package) and run make again" >&2
  exit 1
}

has_gtest() {
  echo '#include <gtest/gtest.h>' | "${CXX:-c++}" -std=c++17 -E -x c++ - > /dev/null 2>&1
}

require "Python 3" python3 "$python" --version
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: Python 3.11 or later is needed, $python is $("$python" --version); run make PYTHON=python3.11" >&2
  exit 1
fi
require "the Python module venv" python3-venv "$python" -c 'import ensurepip, venv'
require "a C++ compiler" g++ "${CXX:-c++}" --version
require "the header Python.h" python3-dev "$python" -c \
  'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'

if [ -n "$want_googletest" ] && ! has_gtest; then
  install libgtest-dev
  if ! has_gtest; then
    echo "note: GoogleTest is missing and cannot be installed from here, so CMake will download it;" \
      "to avoid that, have an administrator run: apt-get install libgtest-dev" >&2
  fi
fi
