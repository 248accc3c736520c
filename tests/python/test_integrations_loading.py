# SPDX-License-Identifier: Apache-2.0
"""from_pretrained of zexpert.integrations.transformers: checkpoints in the hub's layout, and what others lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hub_layout import hub_tensors, write
from model_cases import TINY_DECODER
from ranks import Ranks
from testing import assert_equal, assert_error_rule

pytest.importorskip("transformers")

from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from zexpert import FusedMoE, record_choices
from zexpert.integrations.transformers import from_pretrained
from zexpert.models import LongcatFlashMoE, checkpoint_state_dict

REAL, ZERO, HIDDEN = 10, 5, 32
TOKENS = torch.tensor([[1, 7, 12, 30, 4, 44, 9, 21, 3], [5, 5, 2, 18, 33, 40, 8, 11, 27]])


def longcat(dtype: torch.dtype = torch.float32, **others: Any) -> Any:
    """transformers' own model with random weights; a bias that decides who is chosen, so that rounding does not."""
    config = LongcatFlashConfig(
        n_routed_experts=REAL, zero_expert_num=ZERO, moe_topk=4, hidden_size=HIDDEN, expert_ffn_hidden_size=12,
        **TINY_DECODER, **others,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LongcatFlashForCausalLM(config).eval().to(dtype)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=tensor.shape[-1] ** -0.5)
        for layer in model.model.layers:
            layer.mlp.router.e_score_correction_bias.copy_(torch.randperm(REAL + ZERO) * 2.0)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_files", [1, 3, 7])
def test_gives_the_model_of_the_hub(num_files: int, dtype: torch.dtype, tmp_path: Path) -> None:
    plain = longcat(dtype)
    plain.config.dtype = dtype
    tensors = hub_tensors(plain)
    tensors["model.mtp.layers.0.norm.weight"] = torch.ones(3)  # is ignored, as by transformers
    model = from_pretrained(write(tmp_path / "hub", plain.config, tensors, num_files))
    assert isinstance(model, LongcatFlashForCausalLM)
    assert not model.training
    assert model.dtype == dtype
    assert all(type(layer.mlp) is LongcatFlashMoE for layer in model.model.layers)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert all(parameter.requires_grad for parameter in model.parameters())
    exact = plain.double()(TOKENS).logits
    plain.to(dtype)
    assert_error_rule(model(TOKENS).logits, plain(TOKENS).logits, exact)
    if dtype == torch.float32:
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert_equal(model.generate(TOKENS, **settings), plain.generate(TOKENS, **settings))


def test_dtype_and_options(tmp_path: Path) -> None:
    plain = longcat()
    folder = write(tmp_path / "hub", plain.config, hub_tensors(plain))
    model = from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="eager", chunk_size=5, recompute=True, experts_backend="torch"
    )
    assert {parameter.dtype for name, parameter in model.named_parameters() if "router" not in name} == {torch.bfloat16}
    moe = model.model.layers[0].mlp
    assert moe.router.classifier.weight.dtype == torch.float32
    assert moe.experts.runner.chunk_size == 5
    assert moe.experts.runner.recompute
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"^chunk_size must be an integer of at least 1, got 0"):
        from_pretrained(folder, chunk_size=0)


def test_trains_records_and_saves(tmp_path: Path) -> None:
    """Its weights under transformers' names load into transformers' own model."""
    plain = longcat()
    model = from_pretrained(write(tmp_path / "hub", plain.config, hub_tensors(plain))).train()
    with record_choices(model) as record:
        model(TOKENS, labels=TOKENS).loss.backward()
    assert list(record) == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert all(module.w13_weight.grad.abs().sum() > 0 for module in model.modules() if isinstance(module, FusedMoE))
    model.save_pretrained(tmp_path / "saved", state_dict=checkpoint_state_dict(model))
    again = LongcatFlashForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, tensor in plain.state_dict().items():
        rows = REAL if name.endswith("gate_up_proj") else len(tensor)
        assert_equal(again.state_dict()[name][:rows], tensor[:rows], name)
    saved = from_pretrained(tmp_path / "saved").eval()
    assert_equal(saved(TOKENS).logits, model.eval()(TOKENS).logits)


def test_tied_embeddings_and_no_zero_experts(tmp_path: Path) -> None:
    plain = longcat(tie_word_embeddings=True)
    tensors = hub_tensors(plain)
    del tensors["lm_head.weight"]
    model = from_pretrained(write(tmp_path / "tied", plain.config, tensors))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(TOKENS).logits, plain(TOKENS).logits)


def test_experts_are_copied_from_the_mapped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that the loader sees is a view of a file, and no larger tensor is made of them."""
    plain = longcat()
    folder = write(tmp_path / "hub", plain.config, hub_tensors(plain))
    shapes: list[tuple[int, ...]] = []
    stack, cat = torch.stack, torch.cat

    def spy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def function(*arguments: Any, **keywords: Any) -> Tensor:
            result = original(*arguments, **keywords)
            shapes.append(tuple(result.shape))
            return result

        return function

    monkeypatch.setattr(torch, "stack", spy(stack))
    monkeypatch.setattr(torch, "cat", spy(cat))
    from_pretrained(folder)
    assert not [shape for shape in shapes if len(shape) == 3]


def of_rank(group: Any, folder: str, whole: Tensor) -> None:
    model = from_pretrained(folder, expert_parallel_group=group)
    assert len(model.model.layers[0].mlp.experts.w13_weight) == REAL // group.size()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, whole)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_expert_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    plain = longcat()
    folder = write(tmp_path / "hub", plain.config, hub_tensors(plain))
    with torch.no_grad():
        ranks.run(of_rank, 2, str(folder), plain(TOKENS).logits)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.layers.0.input_layernorm.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(EXPERT), rf"^{EXPERT} must be in the checkpoint, got none$"),
        (lambda tensors: tensors.pop(NORM), rf"^{NORM} must be in the checkpoint, got none$"),
        (
            lambda tensors: tensors.pop("model.layers.0.mlp.router.e_score_correction_bias"),
            r"^model.layers.0.mlp.router.e_score_correction_bias must be in the checkpoint, got none$",
        ),
        (
            lambda tensors: tensors.update({"model.layers.0.mlp.experts.15.up_proj.weight": torch.ones(12, HIDDEN)}),
            r"^model.layers.0.mlp.experts.15.up_proj.weight must be a tensor of LongCat-Flash, got another name$",
        ),
        (
            lambda tensors: tensors.update({"model.other.weight": torch.ones(1)}),
            r"^model.other.weight must be a tensor of LongCat-Flash, got another name$",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.ones(HIDDEN + 1)}),
            rf"^{NORM} must have shape \[32\], got \[33\]$",
        ),
        (
            lambda tensors: tensors.update({EXPERT: torch.ones(12, HIDDEN + 1)}),
            r"experts.3.up_proj.weight must have shape \[12, 32\], got \[12, 33\]$",
        ),
        (
            lambda tensors: tensors.update({NORM: torch.ones(HIDDEN).to(torch.float8_e4m3fn)}),
            rf"^{NORM} must not be quantised, got torch.float8_e4m3fn$",
        ),
    ],
)
def test_what_is_wrong_with_a_checkpoint(
    change: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    plain = longcat()
    tensors = hub_tensors(plain)
    change(tensors)
    with pytest.raises(RuntimeError, match=message):
        from_pretrained(write(tmp_path / "hub", plain.config, tensors))


def test_other_models_and_folders_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"^name_or_folder must be a LongCat-Flash \(longcat_flash\), got a qwen3_moe$"
    ):
        from_pretrained(tmp_path / "other")
    plain = longcat()
    plain.config.save_pretrained(tmp_path / "empty")
    with pytest.raises(OSError, match=r"^name_or_folder must have safetensors files, got none in "):
        from_pretrained(tmp_path / "empty")
    plain.config.quantization_config = {"quant_method": "fp8"}
    folder = write(tmp_path / "quantised", plain.config, hub_tensors(plain))
    with pytest.raises(
        ValueError, match=r"^name_or_folder must not be quantised, got a checkpoint with a quantization_c"
    ):
        from_pretrained(folder)
