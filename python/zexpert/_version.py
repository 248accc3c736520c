# SPDX-License-Identifier: Apache-2.0
"""The version, stated here alone: setup.py, CMakeLists.txt and the wheel's metadata read it here."""

__version__ = "0.1.0"
