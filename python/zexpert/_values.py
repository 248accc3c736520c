# SPDX-License-Identifier: Apache-2.0
"""Small tensors that outlive to_empty: selection biases, expert maps and counts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def values_kept(module: nn.Module) -> Iterator[None]:
    """Around nn.Module._apply of `module`: its own parameters and buffers keep their values, whatever the call does to
    their memory. Those that leave the meta device, where they had none, are 0.

    nn.Module.to_empty leaves uninitialised memory, and no checkpoint fills a buffer that is not persistent.
    """
    before = {name: tensor.detach() for name, tensor in own_tensors(module)}
    buffers = dict(module._buffers)
    yield
    for name, tensor in own_tensors(module):
        if tensor.is_meta or name not in before or tensor is buffers.get(name):
            continue
        with torch.no_grad():
            if before[name].is_meta:
                tensor.zero_()
            else:
                tensor.copy_(before[name])


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of `module` itself."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
