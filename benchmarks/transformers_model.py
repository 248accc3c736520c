# SPDX-License-Identifier: Apache-2.0
"""Times a LongCat-Flash of transformers before and after zexpert.integrations.transformers.patch, same weights.

Usage: python benchmarks/transformers_model.py [--device cpu] [--dtype float32] [--layers 2] [--prompt 256]
[--repeats 7] [--json PATH]

Reading a prompt, a decoding step after it, and a training step (forward, loss, backward). Hidden size 512, expert ffn
256, 64 real + 32 identity experts, K 12, so that the experts are most of the model, as they are in the published ones.
Logits are compared with the float64 model's. The floor is the experts' alone: their products, or their weights' bytes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zexpert_tools.benchmark import harness, machine, rates

VOCABULARY = 1000


def make_model(num_layers: int, hidden_size: int) -> Any:
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_attention_heads=8,
        ffn_hidden_size=hidden_size,
        q_lora_rank=256,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        head_dim=32,
        v_head_dim=64,
        n_routed_experts=64,
        zero_expert_num=32,
        moe_topk=12,
        expert_ffn_hidden_size=hidden_size // 2,
    )
    torch.manual_seed(0)
    return LongcatFlashForCausalLM(config).eval()


def train_step(model: Any, tokens: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.detach()


def decode_step(model: Any, token: Tensor, cache: Any) -> Tensor:
    """One token after the prompt; the cache is cut back to the prompt for the next call."""
    logits: Tensor = model(token, past_key_values=cache).logits
    cache.crop(-1)
    return logits


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of the prompt and of a training step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    options = parser.parse_args(arguments)
    if min(options.layers, options.hidden_size // 2, options.prompt, options.repeats) < 1:
        parser.error("--layers, --hidden-size, --prompt and --repeats must be positive, and the size at least 2")
    try:
        from zexpert.integrations.transformers import patch
    except ImportError as error:
        parser.error(str(error))

    dtype, device = harness.DTYPES[options.dtype], torch.device(options.device)
    theirs = make_model(options.layers, options.hidden_size).to(device, dtype)
    models = {"zexpert": patch(copy.deepcopy(theirs)), "transformers": theirs}
    tokens = torch.randint(VOCABULARY, (1, options.prompt), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        exact = copy.deepcopy(theirs).double()(tokens).logits
        logits = {name: model(tokens).logits for name, model in models.items()}
        caches = {id(model): model(tokens, use_cache=True).past_key_values for model in models.values()}
    checks = {name: harness.check_error(one, logits["transformers"], exact) for name, one in logits.items()}
    del exact

    def read(model: Any) -> Tensor:
        with torch.inference_mode():
            return model(tokens, use_cache=False).logits  # type: ignore[no-any-return]

    def decode(model: Any) -> Tensor:
        with torch.inference_mode():
            return decode_step(model, tokens[:, :1], caches[id(model)])

    def train(model: Any) -> Tensor:
        return train_step(model, tokens)

    limits = rates.measure_limits(device, dtype)
    steps = [
        (f"a prompt of {options.prompt} tokens", read, options.prompt, 1),
        ("a decoding step", decode, 1, 1),
        (f"a training step, {options.prompt} tokens", train, options.prompt, 3),
    ]
    results = []
    for what, run, num_tokens, passes in steps:
        contenders = {name: harness.on_inputs(run, [model]) for name, model in models.items()}
        with machine.OtherLoad() as load:
            timings = harness.measure_on(device, contenders, num_inputs=1, repeats=options.repeats, graphs=False)
        values_per_expert = 3 * options.hidden_size * (options.hidden_size // 2)
        slots = num_tokens * 12 * 64 / 96
        experts_used = 64 * (1 - (1 - 8 / 64) ** num_tokens)
        operations = options.layers * passes * 2 * slots * values_per_expert
        num_bytes = options.layers * passes * experts_used * values_per_expert * dtype.itemsize
        results.append(
            harness.CaseResult(
                case=f"{what}, {options.layers} layers, {options.dtype}, {machine.device_name(device)}",
                subject="zexpert",
                floor=limits.floor(operations, num_bytes),
                timings=timings,
                checks=checks,
                other_load=0.0 if device.type == "cuda" else load.share,
            )
        )
        harness.print_case(results[-1])
    settings = {"device": options.device, "dtype": options.dtype, "layers": options.layers, "prompt": options.prompt}
    return harness.finish("transformers_model", settings, results, options.json)


if __name__ == "__main__":
    sys.exit(main())
