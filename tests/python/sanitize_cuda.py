"""Runs every CUDA kernel once on small inputs. A program for compute-sanitizer: test_cuda_sanitizer.py."""

from __future__ import annotations

import torch

from zexpert.ops import biased_topk, moe_plan, zero_expert_accumulate

WIDTHS = (128, 192, 256, 384, 512, 576, 768, 896, 1024)


def main() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in WIDTHS:
            logits = torch.randn(9, width, device="cuda").to(dtype)
            logits[2, 5:50] = torch.nan
            logits[3] = 0.0
            bias = 0.01 * torch.randn(width, device="cuda")
            biased_topk(logits, bias, 12, num_real_experts=64, num_constant_experts=2, renormalize=True)
            biased_topk(logits, bias.to(dtype), 8, num_real_experts=64, num_expert_group=8, topk_group=3)
        for width, top_k in ((5, 3), (200, 40), (1500, 12)):
            logits = torch.randn(9, width, device="cuda").to(dtype)
            biased_topk(logits, None, top_k, num_real_experts=width, scoring_func="sigmoid", indices_dtype=torch.int64)
        hidden_states = torch.randn(3, 1000, device="cuda").to(dtype)
        weight = torch.rand(3, device="cuda")
        zero_expert_accumulate(hidden_states, weight, zero_expert_accumulate(hidden_states, weight))
        zero_expert_accumulate(hidden_states[:, 1:], weight)
    for num_tokens in (1, 100, 2000):
        moe_plan(torch.randint(-1, 100, (num_tokens, 6), device="cuda"), 100)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
