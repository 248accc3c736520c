# SPDX-License-Identifier: Apache-2.0
"""What `zexpert bench` and the scripts of benchmarks/ measure with: timing in turns, outputs checked, floors."""
