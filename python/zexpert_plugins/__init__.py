# SPDX-License-Identifier: Apache-2.0
"""What serving engines call in each of their processes. A process that does not want zexpert imports nothing else."""

from __future__ import annotations

import os

ON = ("1", "true", "yes", "on")
OFF = ("", "0", "false", "no", "off")


def vllm() -> None:
    """The entry point of "vllm.general_plugins": zexpert.integrations.vllm.register if ZEXPERT_VLLM is on."""
    if is_on("ZEXPERT_VLLM"):
        from zexpert.integrations.vllm import register

        register()


def sglang() -> None:
    """The entry point of "sglang.srt.plugins": zexpert.integrations.sglang.register if ZEXPERT_SGLANG is on."""
    if is_on("ZEXPERT_SGLANG"):
        from zexpert.integrations.sglang import register

        register()


def is_on(variable: str) -> bool:
    """Whether an environment variable is 1, true, yes or on, in any case. Unset and empty are off.

    Raises:
        ValueError: if it is neither one of these nor 0, false, no or off.
    """
    value = os.environ.get(variable, "")
    if value.lower() not in (*ON, *OFF):
        raise ValueError(f"{variable} must be 1, true, yes or on, or 0, false, no or off, got {value!r}")
    return value.lower() in ON
