# SPDX-License-Identifier: Apache-2.0
"""A decode loop as a server has it: a fixed number of places in the batch, requests that come and go, garbage in empty
places. On a GPU a step is captured into a CUDA graph once and replayed; on a CPU it is called.

Usage: python examples/decode_loop.py [--device auto] [--requests 12] [--places 4] [--new-tokens 24] [--hidden-size 64]

The model is a small stand-in with random weights: bytes, two layers in LongCat-Flash's shape, and for attention's cache
a running mean of what a layer saw. The loop is checked against the same requests without a graph and with zeros in
empty places: the bytes must be the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor, nn

from zexpert.models import LongcatFlashConfig, LongcatFlashMoE


class Layer(nn.Module):
    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        config = LongcatFlashConfig(
            hidden_size=hidden_size,
            expert_ffn_hidden_size=hidden_size,
            n_routed_experts=32,
            zero_expert_num=16,
            moe_topk=6,
            routed_scaling_factor=6.0,
        )
        self.norm = nn.RMSNorm(hidden_size, dtype=dtype)
        self.moe = LongcatFlashMoE(config, params_dtype=dtype)

    def forward(self, hidden_states: Tensor, mean: Tensor) -> Tensor:
        mean.lerp_(hidden_states, 0.25)
        mixed = hidden_states + mean
        out: Tensor = mixed + self.moe(self.norm(mixed))
        return out


class Model(nn.Module):
    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, hidden_size, dtype=dtype)
        self.layers = nn.ModuleList(Layer(hidden_size, dtype) for _ in range(2))
        self.head = nn.Linear(hidden_size, 256, bias=False, dtype=dtype)

    def forward(self, tokens: Tensor, means: Tensor) -> Tensor:
        """Next bytes [places]; updates the layers' running means [layers, places, hidden_size] in place."""
        hidden_states = self.embedding(tokens)
        for layer, mean in zip(self.layers, means, strict=True):
            hidden_states = layer(hidden_states, mean)
        return self.head(hidden_states).argmax(dim=1)


def captured(model: Model, tokens: Tensor, means: Tensor) -> Callable[[], Tensor]:
    """A step on these very tensors, as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries set themselves up
            model(tokens, means)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(tokens, means)

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@torch.inference_mode()
def serve(
    model: Model, prompts: list[bytes], places: int, new_tokens: int, *, use_graph: bool, empty: float
) -> tuple[list[bytes], float]:
    """What each prompt goes on with, and the mean seconds of a step. Empty places hold `empty`."""
    weight = model.head.weight
    tokens = torch.zeros(places, dtype=torch.int64, device=weight.device)
    means = torch.zeros(len(model.layers), places, weight.shape[1], dtype=weight.dtype, device=weight.device)
    step = captured(model, tokens, means) if use_graph else lambda: model(tokens, means)
    means.fill_(empty)

    waiting = deque(enumerate(prompts))
    running: list[tuple[int, deque[int], list[int]] | None] = [None] * places  # request, bytes to feed, bytes it got
    results = [b""] * len(prompts)
    steps, started = 0, time.perf_counter()
    while waiting or any(running):
        for place in range(places):
            if running[place] is None and waiting:
                request, prompt = waiting.popleft()
                running[place] = (request, deque(prompt), [])
                means[:, place] = 0
        fed = [slot[1].popleft() if slot else 0 for slot in running]
        tokens.copy_(torch.tensor(fed))
        following = step().tolist()
        steps += 1
        for place, slot in enumerate(running):
            if slot is None or slot[1]:  # empty, or the prompt goes on
                continue
            request, to_feed, got = slot
            got.append(following[place])
            to_feed.append(following[place])
            if len(got) == new_tokens:
                results[request] = bytes(got)
                running[place] = None
                means[:, place] = empty
    return results, (time.perf_counter() - started) / steps


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--places", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--hidden-size", type=int, default=64)
    options = parser.parse_args(arguments)
    for name in ("requests", "places", "new_tokens", "hidden_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device: torch.cuda.is_available() is False")

    torch.manual_seed(0)
    model = Model(options.hidden_size, torch.bfloat16 if on_gpu else torch.float32).to(options.device).eval()
    prompts = [f"request {number}: {'x' * (number % 5)}".encode() for number in range(options.requests)]
    sizes = (prompts, options.places, options.new_tokens)

    expected, plain_seconds = serve(model, *sizes, use_graph=False, empty=0.0)
    results, seconds = serve(model, *sizes, use_graph=on_gpu, empty=float("nan"))
    print(f"requests          {len(prompts)}, {options.places} at a time, on {options.device}")
    print(f"step, called      {1e3 * plain_seconds:.3f} ms")
    print(f"step, {'replayed' if on_gpu else 'again   '}    {1e3 * seconds:.3f} ms")
    print(f"same bytes        {'yes' if results == expected else 'NO'}")
    return 0 if results == expected else 1


if __name__ == "__main__":
    sys.exit(main())
