# SPDX-License-Identifier: Apache-2.0
"""zexpert inside other libraries, a module each, which imports its library; importing this package imports none."""
