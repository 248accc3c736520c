# SPDX-License-Identifier: Apache-2.0
"""Writes the modules that test_embedding.cpp runs, with inputs and the outputs that Python computes.

Usage: python save_modules.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import zexpert


class SharedExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 8)
        self.down = nn.Linear(8, 24)

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.silu(self.up(hidden_states)))
        return out


def mixed_layer() -> nn.Module:
    return zexpert.FusedMoE(
        6, 3, 24, 20, zero_expert_type={"identity": 1, "constant": 2, "drop": 1}, renormalize=True,
        e_score_correction_bias=torch.randn(10), shared_experts=SharedExperts(),
    )  # fmt: skip


def longcat_block() -> nn.Module:
    config = zexpert.models.LongcatFlashConfig(
        hidden_size=24, expert_ffn_hidden_size=20, n_routed_experts=6, zero_expert_num=3, moe_topk=3
    )
    return zexpert.models.LongcatFlashMoE(config)


@torch.no_grad()
def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    for name, module, widths in (("layer", mixed_layer(), (24, 10)), ("block", longcat_block(), (24,))):
        module.eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        cases = []
        for num_tokens in (0, 1, 7, 33):
            inputs = tuple(torch.randn(num_tokens, width) for width in widths)
            cases.append((inputs, module(*inputs)))
        torch.save(cases, folder / f"{name}.cases.pt")

        script = torch.jit.script(module)
        script.save(str(folder / f"{name}.script.pt"))
        torch.jit.freeze(script).save(str(folder / f"{name}.frozen.pt"))
        example = tuple(torch.randn(7, width) for width in widths)
        torch.jit.trace(module, example).save(str(folder / f"{name}.trace.pt"))
        for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
            inputs = tuple(tensor.to(device) for tensor in example)
            program = torch.export.export(module.to(device), inputs, dynamic_shapes=tuple({0: tokens} for _ in inputs))
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.{device}.pt2"))


if __name__ == "__main__":
    main()
