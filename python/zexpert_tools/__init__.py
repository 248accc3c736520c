# SPDX-License-Identifier: Apache-2.0
"""The `zexpert` command, its demo and its benchmarks. zexpert, the library, imports nothing from here."""
