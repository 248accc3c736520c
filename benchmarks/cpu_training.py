# SPDX-License-Identifier: Apache-2.0
"""Times training on the CPU: one decoder on zexpert's layers, the same on transformers' LongcatFlashMoE.

Usage: python benchmarks/cpu_training.py [--batch-size 4] [--repeats 7] [--threads 2] [--json PATH]

A step is forward, loss and backward of zexpert_tools.byte_decoder.ByteDecoder in float32 with LongCat-Flash's kind of
layers (hidden size 512, expert ffn 256, 64 real + 32 identity experts, K 12). Both models start from the same weights
and see the same bytes; loss and gradients are compared before anything is timed. Peak memory is measured in a process
per model, as the growth of its resident set beyond model and input.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import zexpert
from zexpert_tools.benchmark import harness, machine, rates
from zexpert_tools.byte_decoder import ByteDecoder, ByteDecoderConfig

CONFIG = ByteDecoderConfig(
    hidden_size=512,
    num_layers=2,
    num_heads=8,
    context_length=256,
    num_experts=64,
    zero_expert_num=32,
    top_k=12,
    intermediate_size=256,
    routed_scaling_factor=6.0,
)
TARGET = harness.Target(over="transformers", at_least=1.8)


class TransformersLayer(nn.Module):
    """transformers' LongcatFlashMoE with FusedMoE's interface. It has its own classifier and ignores the logits."""

    def __init__(self, moe: zexpert.FusedMoE, classifier: nn.Parameter) -> None:
        from transformers.models.longcat_flash.configuration_longcat_flash import LongcatFlashConfig
        from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

        super().__init__()
        config = LongcatFlashConfig(
            hidden_size=CONFIG.hidden_size,
            expert_ffn_hidden_size=CONFIG.intermediate_size,
            n_routed_experts=CONFIG.num_experts,
            zero_expert_num=CONFIG.zero_expert_num,
            moe_topk=CONFIG.top_k,
            routed_scaling_factor=CONFIG.routed_scaling_factor,
        )
        self.moe = LongcatFlashMoE(config)
        with torch.no_grad():
            self.moe.router.classifier.weight.copy_(classifier)
            self.moe.router.e_score_correction_bias.copy_(moe.e_score_correction_bias)
            self.moe.experts.gate_up_proj.zero_()
            self.moe.experts.gate_up_proj[: CONFIG.num_experts].copy_(moe.w13_weight)
            self.moe.experts.down_proj.copy_(moe.w2_weight)

    def forward(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        out: Tensor = self.moe(hidden_states)
        return out


def build(name: str) -> ByteDecoder:
    """The model of one contender, with the weights that all contenders start from."""
    torch.manual_seed(0)
    model = ByteDecoder(CONFIG)
    if name == "transformers":
        for layer in model.layers:
            layer.moe = TransformersLayer(layer.moe, layer.classifier.weight)
    return model


def bytes_for(index: int, batch_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    windows = torch.randint(256, (batch_size, CONFIG.context_length + 1), generator=generator)
    return windows[:, :-1], windows[:, 1:]


def train_step(model: ByteDecoder, inputs: Tensor, targets: Tensor) -> Tensor:
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


def compare(models: dict[str, ByteDecoder], batch_size: int) -> dict[str, harness.ErrorCheck]:
    """Gradients of the embedding, through every layer, of each model against the same model in float64."""
    inputs, targets = bytes_for(0, batch_size)
    gradients = {}
    for name, model in models.items():
        train_step(model, inputs, targets)
        gradients[name] = model.embedding.weight.grad.clone()
    reference_model = build("zexpert").double()
    train_step(reference_model, inputs, targets)
    reference = reference_model.embedding.weight.grad
    plain = gradients.get("transformers", gradients["zexpert"])
    return {name: harness.check_error(gradient, plain, reference) for name, gradient in gradients.items()}


def peak_memory(name: str, options: argparse.Namespace) -> int:
    """Bytes that a training step of `name` needs in addition to model and input, measured in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--batch-size", str(options.batch_size)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(json.loads(printed.splitlines()[-1]))


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def print_peak_memory(name: str, batch_size: int) -> None:
    model = build(name)
    inputs, targets = bytes_for(0, batch_size)
    before = status_bytes("VmRSS")
    train_step(model, inputs, targets)
    print(status_bytes("VmHWM") - before)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training on the CPU: zexpert and transformers, one model.")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 256 bytes per step (default: 4)")
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the results there")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("batch_size", "repeats", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(options, name)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.memory_of is not None:
        print_peak_memory(options.memory_of, options.batch_size)
        return 0
    torch.set_num_threads(options.threads)
    models = {"zexpert": build("zexpert")}
    try:
        models["transformers"] = build("transformers")
    except ImportError:
        print("transformers is not installed, so it is left out (pip install transformers)")

    checks = compare(models, options.batch_size)
    inputs = [bytes_for(index, options.batch_size) for index in range(3)]
    contenders: dict[str, Callable[[int], Tensor]] = {
        name: (lambda index, model=model: train_step(model, *inputs[index])) for name, model in models.items()
    }
    with machine.OtherLoad() as load:
        timings = harness.measure(contenders, num_inputs=len(inputs), repeats=options.repeats)

    num_tokens = options.batch_size * CONFIG.context_length
    ffn_slots = CONFIG.top_k * CONFIG.num_experts / (CONFIG.num_experts + CONFIG.zero_expert_num)
    products = 3 * 2 * CONFIG.num_layers * num_tokens * ffn_slots * 3 * CONFIG.hidden_size * CONFIG.intermediate_size
    result = harness.CaseResult(
        case=f"training step, {num_tokens} tokens, float32, {options.threads} threads",
        subject="zexpert",
        floor=products / rates.matmul_rate(torch.float32),
        timings=timings,
        checks=checks,
        other_load=load.share,
        target=TARGET,
    )
    harness.print_case(result)
    rows = []
    for name, timing in timings.items():
        memory = peak_memory(name, options) / 2**20
        rows.append([name, f"{num_tokens / timing.median:,.0f}", f"{memory:,.0f} MiB"])
    print()
    print(harness.format_table(["model", "tokens per second", "peak memory of a step"], rows))
    return harness.finish("cpu_training", {"batch_size": options.batch_size}, [result], options.json)


if __name__ == "__main__":
    sys.exit(main())
