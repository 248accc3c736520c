# SPDX-License-Identifier: Apache-2.0
"""The harness of `zexpert bench` and of benchmarks/: timing in turns, checked outputs, floors."""
