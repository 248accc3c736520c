# SPDX-License-Identifier: Apache-2.0
"""zexpert inside transformers: whole models before and after, their files, and the experts implementation "zexpert"."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
import zexpert
from model_cases import TINY_DECODER
from testing import assert_equal, assert_error_rule
from zexpert.telemetry import track_routing
from zexpert.training import LongCatBiasController

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, LongcatFlashConfig, LongcatFlashForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashMoE

from zexpert.integrations.transformers import PatchedMoE, experts_forward, fp8_experts_forward, patch, unpatch

REAL, ZERO = 16, 8
TOKENS = torch.tensor([[1, 7, 12, 30, 4, 44, 9, 21, 3], [5, 5, 2, 18, 33, 40, 8, 11, 27]])


def longcat(dtype: torch.dtype = torch.float32, seed: int = 0, zero: int = ZERO, **others: Any) -> Any:
    """A small LongCat-Flash with random weights, large enough for the experts to matter."""
    config = LongcatFlashConfig(
        n_routed_experts=REAL,
        zero_expert_num=zero,
        moe_topk=6,
        hidden_size=64,
        expert_ffn_hidden_size=24,
        **TINY_DECODER,
        **others,
    )
    torch.manual_seed(seed)
    return randomize(LongcatFlashForCausalLM(config)).eval().to(dtype)


def randomize(model: nn.Module) -> Any:
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" not in name and "inv_freq" not in name:
                tensor.normal_(std=0.02 if "bias" in name else tensor.shape[-1] ** -0.5)
    return model


def decide_by_bias(model: Any) -> None:
    """Makes the bias alone decide who is chosen, other experts in every layer. Else rounding in bfloat16 does for some
    tokens, whose results then have nothing to do with each other."""
    for layer in model.model.layers:
        bias = layer.mlp.router.e_score_correction_bias
        bias.copy_(torch.randperm(bias.numel()) * 2.0)


@pytest.fixture
def layers_input() -> Tensor:
    return torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))


def generate(model: Any) -> Tensor:
    tokens: Tensor = model.generate(TOKENS, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zero", [ZERO, 0], ids=["zero experts", "all real"])
def test_a_patched_model_gives_the_same_logits_and_text(zero: int, dtype: torch.dtype, seed: int) -> None:
    model = longcat(dtype, seed, zero)
    if dtype == torch.bfloat16:
        decide_by_bias(model)
    plain, text = model(TOKENS).logits, generate(model)
    exact = copy.deepcopy(model).double()(TOKENS).logits
    assert patch(model) is model
    assert_error_rule(model(TOKENS).logits, plain, exact)
    if dtype == torch.float32:  # in bfloat16 the two likeliest tokens often tie, and rounding decides
        assert_equal(generate(model), text)
    unpatch(model)
    assert_equal(model(TOKENS).logits, plain)


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_patched_model_on_a_gpu(dtype: torch.dtype) -> None:
    model = longcat(dtype)
    decide_by_bias(model)
    plain, exact = model(TOKENS).logits, copy.deepcopy(model).double()(TOKENS).logits
    patch(model).cuda()
    assert_error_rule(model(TOKENS.cuda()).logits.cpu(), plain, exact)


@pytest.mark.parametrize("free", [False, True])
def test_a_training_step_has_the_same_gradients(free: bool) -> None:
    model = longcat()
    patched = patch(copy.deepcopy(model), free_unused_weights=free, recompute=free)
    losses, gradients = [], []
    for one in (model, patched):
        loss = one.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: parameter.grad for name, parameter in one.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        actual = gradients[1][name]
        if name.endswith("gate_up_proj"):
            assert actual.shape[0] == (REAL if free else REAL + ZERO)
            assert not expected[REAL:].any()
            expected, actual = expected[:REAL], actual[:REAL]
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: name + text)


def test_parameters_stay_the_objects_they_are() -> None:
    model = longcat()
    modules = dict(model.named_modules())
    tensors = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    memory = model.model.layers[0].mlp.experts.gate_up_proj.data_ptr()
    keys = list(model.state_dict())
    patch(model)
    model(TOKENS)
    patched = {name: id(tensor) for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    assert {name: patched[name] for name in tensors} == tensors
    assert set(patched) == set(tensors)  # the runner refers to the bias, which is listed once
    assert model.model.layers[0].mlp.experts.gate_up_proj.data_ptr() == memory
    assert list(model.state_dict()) == keys
    unpatch(model)
    assert dict(model.named_modules()) == modules
    assert all(type(layer.mlp) is LongcatFlashMoE for layer in model.model.layers)


@torch.no_grad()
def test_patching_again_and_unpatching_again() -> None:
    model = longcat()
    expected = model(TOKENS).logits
    first = patch(model)(TOKENS).logits
    assert_equal(patch(model)(TOKENS).logits, first)
    torch.testing.assert_close(patch(model, chunk_size=3)(TOKENS).logits, first)
    assert model.model.layers[0].mlp.runner.chunk_size == 3
    assert_equal(unpatch(unpatch(model))(TOKENS).logits, expected)


@torch.no_grad()
def test_unused_rows_are_freed_and_come_back() -> None:
    model = longcat()
    expected = model(TOKENS).logits
    weights = model.model.layers[0].mlp.experts.gate_up_proj
    row_bytes = weights[0].nbytes
    patched = patch(model)(TOKENS).logits
    patch(model, free_unused_weights=True)
    assert model.model.layers[0].mlp.experts.gate_up_proj is weights
    assert weights.untyped_storage().nbytes() == REAL * row_bytes
    assert_equal(model(TOKENS).logits, patched)
    state_dict = model.state_dict()
    assert state_dict["model.layers.0.mlp.experts.gate_up_proj"].shape[0] == REAL + ZERO
    patch(model, free_unused_weights=True).load_state_dict(state_dict)
    assert_equal(model(TOKENS).logits, patched)
    unpatch(model)
    assert model.model.layers[0].mlp.experts.gate_up_proj is weights
    assert weights.shape[0] == REAL + ZERO
    assert_equal(model(TOKENS).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("free", [False, True])
def test_saved_files_are_those_of_transformers(free: bool, tmp_path: Path) -> None:
    model = longcat()
    expected = model(TOKENS).logits
    model.save_pretrained(tmp_path / "theirs")
    patch(model, free_unused_weights=free).save_pretrained(tmp_path / "ours")
    theirs, ours = (LongcatFlashForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("theirs", "ours"))
    assert_equal(ours(TOKENS).logits, expected)
    for (name, tensor), other in zip(theirs.state_dict().items(), ours.state_dict().values(), strict=True):
        rows = REAL if name.endswith("gate_up_proj") else None
        assert_equal(other[:rows], tensor[:rows], name)
    assert_equal(patch(ours)(TOKENS).logits, patch(theirs)(TOKENS).logits)


@torch.no_grad()
def test_router_logits_are_recorded_as_before() -> None:
    model = longcat()
    expected = getattr(model(TOKENS, output_router_logits=True), "router_logits", None)
    if expected is None:
        pytest.skip("this transformers does not record LongCat-Flash's router logits")
    recorded = patch(model)(TOKENS, output_router_logits=True).router_logits
    assert len(recorded) == 2
    for ours, theirs in zip(recorded, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
def test_moves_copies_and_pickles() -> None:
    model = patch(longcat())
    expected = model(TOKENS).logits
    router = model.model.layers[0].mlp.router
    router.e_score_correction_bias = router.e_score_correction_bias + 1.0  # the same choices, another tensor
    torch.testing.assert_close(model(TOKENS).logits, expected)
    assert model.model.layers[0].mlp.runner.router.e_score_correction_bias is router.e_score_correction_bias
    assert_equal(copy.deepcopy(model)(TOKENS).logits, model(TOKENS).logits)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_equal(torch.load(buffer, weights_only=False)(TOKENS).logits, model(TOKENS).logits)
    halved = patch(longcat()).to(torch.bfloat16)
    assert_equal(halved(TOKENS).logits, patch(longcat(torch.bfloat16))(TOKENS).logits)


@torch.no_grad()
def test_compiles_without_a_break(layers_input: Tensor) -> None:
    layer = patch(longcat()).model.layers[0].mlp
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(layers_input), layer(layers_input))


@torch.no_grad()
def test_telemetry_and_load_control_reach_the_layers() -> None:
    model = patch(longcat().train())
    stats = track_routing(model)
    assert list(stats) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    controller = LongCatBiasController(0.3, target_ffn_experts=2.0)
    for _ in range(60):
        model(TOKENS)
        controller.update(model)
    model(TOKENS)
    for one in stats.values():
        assert int(one.num_tokens) == TOKENS.numel()
        assert float(one.mean_ffn_slots) == pytest.approx(2.0, abs=0.5)
    biases = [layer.mlp.router.e_score_correction_bias for layer in model.model.layers]
    assert all(float(bias.abs().max()) > 0.1 for bias in biases)


@torch.no_grad()
def test_autocast_keeps_the_dtype_of_the_hidden_states(layers_input: Tensor) -> None:
    layer = patch(longcat()).model.layers[0].mlp
    expected = layer(layers_input)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(layers_input)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05)
    assert not torch.equal(out, expected)


@torch.no_grad()
def test_hooks_of_accelerate_stay() -> None:
    """What accelerate's add_hook_to_module and remove_hook_from_module do to a module, without its hook."""
    model = longcat()
    expected = model(TOKENS).logits
    seen: list[str] = []

    def hooked(module: Any, *arguments: Any) -> Any:
        seen.append(type(module).__name__)
        return module._old_forward(*arguments)

    modules = [module for layer in model.model.layers for module in (layer.mlp, layer.mlp.router, layer.mlp.experts)]
    for module in modules:
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(hooked, module), module._old_forward)
    patched = patch(model)(TOKENS).logits
    assert seen == ["PatchedMoE", "PatchedRouter", "PatchedExperts"] * 2
    assert_equal(patched, patch(longcat())(TOKENS).logits)
    assert_equal(unpatch(model)(TOKENS).logits, expected)
    patch(model)
    for module in modules:
        module.forward = module._old_forward
        del module._old_forward
    assert_equal(model(TOKENS).logits, patched)
    assert_equal(unpatch(model)(TOKENS).logits, expected)


def test_what_cannot_be_patched_is_told_and_left_alone(layers_input: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^model must be a torch\.nn\.Module, got NoneType$"):
        patch(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model must have a LongcatFlashMoE layer, got Linear without one; other"):
        patch(nn.Linear(2, 2))
    cases: list[tuple[Any, str]] = []
    gelu = longcat(hidden_act="gelu")
    cases.append((gelu, r'^hidden_act must be "silu", got \'gelu\'$'))
    sharded = longcat()
    experts = sharded.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj[:, :24].clone())
    cases.append(
        (sharded, r"^gate_up_proj of layer 'model.layers.1.mlp' must be whole, with shape \[16 or 24, 48, 64\], got")
    )
    wrapped = longcat()
    wrapped.model.layers[1].mlp.forward = lambda x: x
    cases.append((wrapped, r"^layer 'model.layers.1.mlp' must have its own forward"))
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            patch(model)
        assert type(model.model.layers[0].mlp) is LongcatFlashMoE
    with pytest.raises(ValueError, match=r"^chunk_size must be an integer of at least 1, got 0$"):
        patch(longcat(), chunk_size=0)
    model = longcat()
    with pytest.raises(ValueError, match=r"^recompute must be True or False, got 'yes'$"):
        patch(model, recompute="yes")  # type: ignore[arg-type]
    assert type(model.model.layers[0].mlp) is LongcatFlashMoE
    assert isinstance(patch(model).model.layers[0].mlp, PatchedMoE)


# ---- Other mixtures of experts --------------------------------------------------------------------------------------

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


def other_moe(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, moe_intermediate_size=16, **FAMILIES[family])
    return randomize(AutoModelForCausalLM.from_config(config)).eval().to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_implementation_of_other_models(family: str) -> None:
    model = other_moe(family)
    results = []
    for dtype, implementation in (
        (torch.float64, "eager"),
        (torch.float32, "eager"),
        (torch.float32, "zexpert"),
    ):
        one = copy.deepcopy(model).to(dtype)
        one.set_experts_implementation(implementation)
        out = one(TOKENS, labels=TOKENS)
        out.loss.backward()
        results.append((out.logits.detach(), {name: parameter.grad for name, parameter in one.named_parameters()}))
    (exact, _), (plain, expected_gradients), (ours, gradients) = results
    assert_error_rule(ours, plain, exact)
    for name, expected in expected_gradients.items():
        tolerance = 1e-4 * float(expected.abs().max())
        torch.testing.assert_close(gradients[name], expected, rtol=1e-4, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_alone_in_every_dtype(dtype: torch.dtype) -> None:
    experts = other_moe("glm4_moe").model.layers[1].mlp.experts
    experts.config._experts_implementation = "eager"
    x, ids, weights = torch.randn(30, 32).to(dtype), torch.rand(30, 8).topk(3).indices, torch.rand(30, 3).to(dtype)
    plain = experts.to(dtype)(x, ids, weights)
    exact = copy.deepcopy(experts).double()(x.double(), ids, weights.double())
    assert_error_rule(experts_forward(experts, x, ids, weights), plain, exact)
    assert experts_forward(experts, x[:0], ids[:0], weights[:0]).shape == (0, 32)


@torch.no_grad()
def test_other_models_load_generate_and_compile_with_it(tmp_path: Path) -> None:
    model = other_moe("qwen3_moe")
    model.set_experts_implementation("eager")
    expected = generate(model)
    model.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="zexpert")
    assert_equal(generate(ours), expected)
    compiled = torch.compile(ours.model.layers[0].mlp, fullgraph=True)
    x = torch.randn(1, 7, 32)
    torch.testing.assert_close(compiled(x), ours.model.layers[0].mlp(x))


@torch.no_grad()
def test_slots_of_another_device_are_left_out() -> None:
    experts = other_moe("qwen3_moe").model.layers[0].mlp.experts
    experts._is_expert_parallel = True
    x, weights = torch.randn(4, 32), torch.rand(4, 2)
    ids = torch.tensor([[0, 3], [8, 1], [8, 8], [7, 2]])  # 8 is nobody's here
    here = (ids < 8).float()
    expected = experts_forward(experts, x, ids.clamp(max=7), weights * here)
    assert_equal(experts_forward(experts, x, ids, weights), expected)
    assert not experts_forward(experts, x, ids, weights)[2].any()


def fp8_experts(hidden_size: int = 160, intermediate_size: int = 256, num_experts: int = 6, **others: Any) -> Any:
    """The experts that transformers gives a fine-grained-fp8 model, with random weights."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = SimpleNamespace(
        hidden_size=hidden_size,
        num_local_experts=num_experts,
        moe_intermediate_size=intermediate_size,
        hidden_act="silu",
        _experts_implementation="zexpert",
    )
    decorated = use_experts_implementation(
        type("Experts", (fp8.FP8Experts,), {}), experts_interface=fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    torch.manual_seed(0)
    experts = decorated(config, **{"block_size": (128, 128), **others})
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            quantised, scale_inv = zexpert.ops.quantize_blockwise(torch.randn(weight.shape) / weight.shape[-1] ** 0.5)
            weight.copy_(quantised)
            getattr(experts, f"{name}_scale_inv").copy_(scale_inv)
    return experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fine_grained_fp8_experts(dtype: torch.dtype) -> None:
    experts = fp8_experts()
    values = [
        reference.dequantize_blockwise(getattr(experts, name).detach(), getattr(experts, f"{name}_scale_inv").detach())
        for name in ("gate_up_proj", "down_proj")
    ]
    x, ids, weights = torch.randn(30, 160).to(dtype), torch.rand(30, 6).topk(3).indices, torch.rand(30, 3).to(dtype)

    def layer(dtype: torch.dtype) -> Tensor:
        out = torch.zeros(30, 160, dtype=dtype)
        for token, slot in itertools.product(range(30), range(3)):
            gate_up, down = (value[ids[token, slot]].to(dtype) for value in values)
            row = reference.silu_and_mul(x[token : token + 1].to(dtype) @ gate_up.T, dtype=dtype) @ down.T
            out[token] += weights[token, slot].to(dtype) * row[0]
        return out

    ours = experts(x, ids, weights)  # through transformers' own dispatch
    assert ours.dtype == dtype
    assert_error_rule(ours, layer(dtype), layer(torch.float64))
    hidden_states = x.requires_grad_()
    experts(hidden_states, ids, weights).sum().backward()
    assert hidden_states.grad is not None
    assert experts.gate_up_proj.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": (64, 128)}, r"block_size=\(128, 128\), got \(64, 128\) of Experts$"),
        ({"block_size": None}, r"block_size=\(128, 128\), got None of Experts$"),
        ({"intermediate_size": 192}, r"a multiple of 128, so that gate and up share no scale, got 192 of Experts$"),
    ],
)
def test_fp8_experts_of_another_kind_are_refused(options: dict[str, Any], message: str) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    sizes = {"hidden_size": 160, "intermediate_size": 256, "block_size": (128, 128), **options}
    config = SimpleNamespace(
        hidden_size=sizes["hidden_size"],
        num_local_experts=2,
        moe_intermediate_size=sizes["intermediate_size"],
        hidden_act="silu",
    )
    experts = type("Experts", (fp8.FP8Experts,), {})(config, block_size=sizes["block_size"])
    with pytest.raises(ValueError, match=message):
        fp8_experts_forward(experts, torch.randn(1, 160), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    usual = type("Experts", (fp8.FP8Experts,), {})(config, block_size=(128, 128))
    usual.swiglu_limit = 7.0
    with pytest.raises(ValueError, match=r"must have experts with swiglu_limit=None, got 7.0 of Experts$"):
        fp8_experts_forward(usual, torch.randn(1, 160), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))


def test_a_longcat_with_fp8_experts_is_not_patched() -> None:
    model = longcat()
    for layer in model.model.layers:
        layer.mlp.experts = fp8_experts()
    with pytest.raises(ValueError, match=r"must have experts that are not quantised, got Experts: load float8"):
        patch(model)


def test_experts_of_another_kind_are_refused() -> None:
    experts = other_moe("qwen3_moe").model.layers[0].mlp.experts
    arguments = (torch.randn(1, 32), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1))
    for attribute, value in (("has_bias", True), ("is_transposed", True), ("is_concatenated", False)):
        other = copy.deepcopy(experts)
        setattr(other, attribute, value)
        with pytest.raises(ValueError, match=f"must have experts with {attribute}={not value}, got {value} of Qwen3"):
            experts_forward(other, *arguments)
    for dtype in (torch.float8_e4m3fn, torch.int8):
        other = copy.deepcopy(experts)
        other.down_proj = nn.Parameter(other.down_proj.detach().to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=f"must have experts that are not quantised, got {dtype} of Qwen3"):
            experts_forward(other, *arguments)
    other = copy.deepcopy(experts)
    other.act_fn = nn.GELU()
    with pytest.raises(ValueError, match="must have experts with silu, got GELU of Qwen3MoeExperts"):
        experts_forward(other, *arguments)
    other.act_fn = nn.SiLU()
    other.__class__ = type("OwnGate", (type(experts),), {"_apply_gate": lambda self, gate_up: gate_up})
    with pytest.raises(ValueError, match=r"usual gate.*got one of OwnGate's own"):
        experts_forward(other, *arguments)


# ---- The package ----------------------------------------------------------------------------------------------------


def test_zexpert_alone_does_not_import_transformers() -> None:
    code = "import sys, zexpert, zexpert.integrations; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_integration_is_imported_at_its_first_use() -> None:
    code = (
        "import sys, zexpert; before = 'transformers' in sys.modules; zexpert.integrations.transformers.patch; "
        "print(before, 'transformers' in sys.modules, hasattr(zexpert.integrations, 'tensorflow'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False True False"


def test_a_missing_transformers_is_told() -> None:
    code = "import sys; sys.modules['transformers'] = None; import zexpert.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(r"ImportError: zexpert.integrations.transformers needs transformers 5 \(.*pip install", last)


def test_zexpert_experts_on_a_longcat_warn_of_patch(tmp_path: Path) -> None:
    model = longcat()
    with pytest.warns(
        UserWarning, match=r'"zexpert" has no effect on LongCat-Flash: call .*transformers.patch\(model\)'
    ):
        model.set_experts_implementation("zexpert")
    model.set_experts_implementation("eager")
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"has no effect on LongCat-Flash"):
        LongcatFlashForCausalLM.from_pretrained(tmp_path, experts_implementation="zexpert")
