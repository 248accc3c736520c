# SPDX-License-Identifier: Apache-2.0
"""Types of command line arguments that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection


def integers(text: str, is_right: Callable[[int], bool], what: str) -> list[int]:
    """ "1,16,512" as a list, for argparse types: every number must be right, that is, be `what`."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(map(is_right, values)):
        raise argparse.ArgumentTypeError(f"must be {what}, separated by commas, got {text!r}")
    return values


def positive_ints(text: str) -> list[int]:
    """An argparse type: "1,16,512" as a list of positive integers."""
    return integers(text, lambda value: value >= 1, "positive integers")


def positive_int(text: str) -> int:
    """An argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def names_of(choices: Collection[str]) -> Callable[[str], list[str]]:
    """An argparse type: "a,b" as a list of names, each one of `choices`."""

    def names(text: str) -> list[str]:
        given = text.split(",")
        for name in given:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be of {', '.join(choices)}, got {name!r}")
        return given

    return names
