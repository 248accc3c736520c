# SPDX-License-Identifier: Apache-2.0
"""The exchange "deep_ep", on a stand-in of DeepEP's interface."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

import deep_ep_stand_in
from layer_cases import HIDDEN
from parallel_cases import (
    EXCHANGES,
    MAX_TOKENS,
    NUM_EXPERTS,
    assert_as_one_process,
    make_layer,
    make_parallel,
    runner_of,
)
from ranks import Ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without torch.distributed")


def with_stand_in(group: Any) -> None:
    sys.modules["deep_ep"] = deep_ep_stand_in
    EXCHANGES["deep_ep"] = {"max_tokens": MAX_TOKENS}
    try:
        for kind, case in (
            ("identity", "random"),
            ("mixed", "random"),
            ("identity", "one expert"),
            ("identity", "only zero experts"),
        ):
            assert_as_one_process(group, kind, "deep_ep", torch.bfloat16, case)
        layer = make_parallel("plain", "deep_ep", group)
        with pytest.raises(ValueError, match=r"^hidden_states must be bfloat16 .*, got torch.float32$"):
            layer(torch.zeros(2, HIDDEN), torch.zeros(2, NUM_EXPERTS))
    finally:
        del sys.modules["deep_ep"], EXCHANGES["deep_ep"]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_as_one_process(num_ranks: int, ranks: Ranks) -> None:
    ranks.run(with_stand_in, num_ranks)


def without(group: Any) -> None:
    sys.modules["deep_ep"] = None  # type: ignore[assignment]
    try:
        runner = runner_of(make_layer("plain", expert_parallel_group=group))
        with pytest.raises(ImportError, match=r'^the exchange "deep_ep" needs the package deep_ep with ElasticBuffer'):
            runner.use_exchange("deep_ep", max_tokens=4)
        assert runner.exchange_name == "ragged"
        with pytest.raises(ValueError, match=r'^max_tokens is required with the exchange "deep_ep"$'):
            runner.use_exchange("deep_ep")
    finally:
        del sys.modules["deep_ep"]


def test_imported_only_when_asked(ranks: Ranks) -> None:
    ranks.run(without, 1)
