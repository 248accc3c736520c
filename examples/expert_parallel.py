# SPDX-License-Identifier: Apache-2.0
"""Data-parallel and expert-parallel training on one mesh of processes, on CPUs or GPUs.

Usage: torchrun --nproc-per-node 4 examples/expert_parallel.py [--data-ranks 2] [--steps 20] [--checkpoint FOLDER]

The ranks form a mesh [data, expert]. Each has tokens of its own. The ranks of a row share one set of experts; the rows
hold copies of it. What is no expert, the router's classifier here, is on every rank. Rank 0 trains the same model on
all tokens in one process too, and prints the difference.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import zexpert

REAL, ZERO, TOP_K, HIDDEN, INTERMEDIATE = 16, 8, 4, 64, 32
TOKENS = 256  # on each rank


class Block(nn.Module):
    """x + MoE(x), with identity experts."""

    def __init__(self, expert_mesh: DeviceMesh | None, device: torch.device) -> None:
        super().__init__()
        self.classifier = nn.Linear(HIDDEN, REAL + ZERO, bias=False, device=device)
        self.moe = zexpert.FusedMoE(
            REAL,
            TOP_K,
            HIDDEN,
            INTERMEDIATE,
            zero_expert_type="identity",
            zero_expert_num=ZERO,
            expert_parallel_group=expert_mesh,
            device=device,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = hidden_states + self.moe(hidden_states, self.classifier(hidden_states))
        return out


def batch(step: int, rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A rank's tokens and what a fixed function makes of them."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator)
    teacher = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) / HIDDEN**0.5
    return tokens.to(device), torch.tanh(tokens @ teacher).to(device)


def loss_of(model: nn.Module, tokens: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(tokens), target)


def average_gradients(model: Block, mesh: DeviceMesh) -> None:
    """Makes every gradient that of the mean of all ranks' losses.

    The backward sums an expert's gradient over the ranks that share the expert; what other rows of the mesh add is
    missing. Of other parameters' gradients all other ranks' part is.
    """
    experts = (model.moe.w13_weight, model.moe.w2_weight)
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        is_expert = any(parameter is expert for expert in experts)
        dist.all_reduce(parameter.grad, group=mesh["data"].get_group() if is_expert else None)
        parameter.grad /= mesh.size()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-ranks", type=int, default=1, help="rows of the mesh, each with all experts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="save the model there at the end")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it with torchrun, as in: torchrun --nproc-per-node 4 examples/expert_parallel.py")
    world_size = int(os.environ["WORLD_SIZE"])
    if options.data_ranks < 1 or world_size % options.data_ranks != 0:
        parser.error(f"--data-ranks must divide the number of processes ({world_size}), got {options.data_ranks}")

    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shape = (options.data_ranks, world_size // options.data_ranks)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "expert"))
    rank = dist.get_rank()

    torch.manual_seed(0)  # the same on all ranks: they draw one model
    model = Block(mesh["expert"], device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    alone = None
    if rank == 0:
        print(f"mesh of {shape[0]} x {shape[1]} ranks, {model.moe.w13_weight.size(0)} of {REAL} experts on each")
        alone = Block(None, device)
    whole = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
    if alone is not None:
        alone.load_state_dict(whole)
        alone_optimizer = torch.optim.SGD(alone.parameters(), lr=1.0)

    for step in range(options.steps):
        optimizer.zero_grad()
        loss = loss_of(model, *batch(step, rank, device))
        loss.backward()
        average_gradients(model, mesh)
        optimizer.step()
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        mean_loss /= world_size
        if alone is not None:
            alone_optimizer.zero_grad()
            everyone = [batch(step, each, device) for each in range(world_size)]
            alone_loss = loss_of(alone, *(torch.cat(parts) for parts in zip(*everyone, strict=True)))
            alone_loss.backward()
            alone_optimizer.step()
            if step % 5 == 0 or step == options.steps - 1:
                print(f"step {step}: loss {mean_loss.item():.4f}, one process {alone_loss.item():.4f}")

    whole = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
    if alone is not None:
        difference = max(float((whole[name] - tensor).abs().max()) for name, tensor in alone.state_dict().items())
        print(f"largest difference of a parameter from one process: {difference:.1e}")
    if options.checkpoint is not None:
        import torch.distributed.checkpoint as dcp

        dcp.save(model.state_dict(), checkpoint_id=options.checkpoint)
        if rank == 0:
            print("checkpoint saved; any number of ranks can load it")
    dist.destroy_process_group()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of a state dict, of which experts are on several ranks. All ranks call it."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


if __name__ == "__main__":
    main()
    gc.collect()  # free the mesh: the threads of its groups must end before Python does
