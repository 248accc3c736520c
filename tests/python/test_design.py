# SPDX-License-Identifier: Apache-2.0
"""Nothing is added by halves: every operator, scoring function and router has all of the files and entries that
docs/design.md lists for one. Each list is taken from the library, not written down here.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._library.utils import has_fake_kernel

import reference
import zexpert
from zexpert import _C, ops, router

ROOT = Path(__file__).resolve().parents[2]

#: Operators that are cases of another operator: their C++ may be in the other's files.
CASES_OF = {
    "biased_topk_and_plan": "biased_topk",
    "biased_topk_choices": "biased_topk",
    "zero_expert_accumulate": "moe_finalize",
}
#: Operators made of other operators: they have no kernels of their own.
MADE_OF = {
    "fused_moe": ("moe_permute", "grouped_mlp", "moe_finalize"),
    "route": ("router_logits", "biased_topk_and_plan"),
}
#: Older names that stay for one release, in the files of the operator that replaced them.
ALIASES = {"grouped_mlp_hopper": "grouped_mlp", "grouped_mlp_with_gate_up": "grouped_mlp", "is_hopper": "grouped_mlp"}


def registered_operators() -> list[str]:
    """Names of the library's schemas without overloads."""
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zexpert::"))
    return sorted({name.removeprefix("zexpert::").partition(".")[0] for name in names})


OPERATORS = [name for name in registered_operators() if not name.endswith("_backward") and name not in ALIASES]
BACKWARDS = [name for name in registered_operators() if name.endswith("_backward")]


def missing_files(*paths: str | tuple[str, ...]) -> list[str]:
    """Those that do not exist; of a tuple, one has to."""
    alternatives = [path if isinstance(path, tuple) else (path,) for path in paths]
    return [" or ".join(paths) for paths in alternatives if not any((ROOT / path).exists() for path in paths)]


def cpp_files_of(op: str) -> list[str]:
    """Names that the operator's C++ files may have: its own, and that of the operator it is a case of."""
    return [op, *([CASES_OF[op]] if op in CASES_OF else [])]


def text(path: str) -> str:
    return (ROOT / path).read_text()


def is_registered(name: str, op: str) -> bool:
    """Whether one of the operator's files registers `name`."""
    files = [ROOT / f"csrc/torch/{file}.cpp" for file in cpp_files_of(op)]
    return any(f'"{name}"' in file.read_text() for file in files if file.exists())


def is_of(item: Callable[..., object], file: str) -> bool:
    """Whether the function or class is written in the package's file."""
    return str(inspect.getsourcefile(item)).endswith(f"/{file}")


def knows_kernel_plan(op: str) -> bool:
    try:
        zexpert.kernel_plan(op, num_tokens=1, num_experts=1, top_k=1)
    except ValueError:
        return False
    return True


def test_the_library_has_operators() -> None:
    assert {"biased_topk", "moe_plan", "moe_permute", "grouped_mlp", "moe_finalize", "fused_moe"} <= set(OPERATORS)


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_has_all_of_its_files(op: str) -> None:
    files = cpp_files_of(op)
    missing = missing_files(
        tuple(f"csrc/torch/{name}.cpp" for name in files),
        f"python/zexpert/ops/{op}.py",
        f"tests/python/test_{op}.py",
        f"docs/ops/{op}.md",
    )
    if op not in MADE_OF:
        missing += missing_files(
            tuple(f"csrc/include/zexpert/{name}.h" for name in files),
            tuple(f"csrc/cpu/{name}.cpp" for name in files),
            tuple(f"csrc/cuda/{name}{end}" for name in files for end in (".cu", "")),
            tuple(f"tests/cpp/test_{name}.cpp" for name in files),
        )
    assert not missing, f"operator {op} lacks {missing}: see docs/design.md"


@pytest.mark.parametrize("op", OPERATORS)
def test_operator_has_all_of_its_entries(op: str) -> None:
    page = text(f"docs/ops/{op}.md")
    lacks = []
    for device, library in (("CPU", "libzexpert.so"), ("CUDA", "libzexpert_cuda.so")):
        is_loaded = device == "CPU" or zexpert.build_info()["cuda_library"] == "loaded"
        if is_loaded and not torch._C._dispatch_has_kernel_for_dispatch_key(f"zexpert::{op}", device):
            lacks.append(f"a kernel for {device} in {library}, registered in csrc/torch/{op}.cpp")
    if f'"{op}' not in text("csrc/torch/library.cpp"):
        lacks.append("its schema in csrc/torch/library.cpp")
    if not is_registered(op, op):
        lacks.append(f"its registration in csrc/torch/{op}.cpp")
    if not has_fake_kernel(getattr(torch.ops.zexpert, op).default):
        lacks.append(f"a fake kernel in python/zexpert/ops/{op}.py")
    if op not in ops.__all__ or not is_of(getattr(ops, op), f"zexpert/ops/{op}.py"):
        lacks.append(f"a wrapper in python/zexpert/ops/{op}.py, listed in python/zexpert/ops/__init__.py")
    if f"ops/{op}.md" not in text("mkdocs.yml"):
        lacks.append("a line in mkdocs.yml")
    if f"ops/{op}.md" not in text("docs/semantics.md"):
        lacks.append("a line in docs/semantics.md")
    if not knows_kernel_plan(op):
        lacks.append("its kernels in csrc/cpu/kernel_plan.cpp")
    if f"{op}_backward" in BACKWARDS and f'"{op}"' not in text("tests/python/test_gradients_registration.py"):
        lacks.append("a call for opcheck in tests/python/test_gradients_registration.py")
    headings = [heading for heading in ("Example", "Gradient", "Errors") if f"\n## {heading}\n" not in page]
    lacks += [f"the heading {heading} in docs/ops/{op}.md" for heading in headings]
    assert not lacks, f"operator {op} lacks {lacks}: see docs/design.md"


@pytest.mark.parametrize("backward", BACKWARDS)
def test_backward_is_in_the_files_of_its_forward(backward: str) -> None:
    op = backward.removesuffix("_backward")
    assert op in OPERATORS
    assert is_registered(backward, op)
    assert f'"{backward}"' in text(f"python/zexpert/ops/{op}.py")
    assert has_fake_kernel(getattr(torch.ops.zexpert, backward).default)
    for of_backward in ("csrc/include/zexpert/{}.h", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "csrc/torch/{}.cpp"):
        assert not (ROOT / of_backward.format(backward)).exists(), "a backward has no files of its own"


def test_pages_and_the_lists_above_are_of_operators_that_exist() -> None:
    assert {page.stem for page in (ROOT / "docs/ops").glob("*.md")} == set(OPERATORS)
    assert {*CASES_OF, *CASES_OF.values(), *MADE_OF, *ALIASES.values()} <= set(OPERATORS)
    assert {part for parts in MADE_OF.values() for part in parts} <= set(OPERATORS)


@pytest.mark.parametrize("scoring_func", [_C.name(member) for member in zexpert.ScoringFunc])
def test_scoring_function_is_complete(scoring_func: str) -> None:
    """The C++ switches have no default, so the compiler finds what is missing there; this finds the rest."""
    logits = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    expected = reference.biased_topk(logits.detach(), None, 2, num_real_experts=4, scoring_func=scoring_func)
    routing = ops.biased_topk(logits, None, 2, num_real_experts=4, scoring_func=scoring_func)
    torch.testing.assert_close(routing.topk_weights.detach(), expected.topk_weights)
    routing.topk_weights.sum().backward()
    assert logits.grad is not None
    masked = torch.full((1, 4), -torch.inf).masked_fill(torch.tensor([False, True, False, False]), 1.0)
    assert ops.biased_topk(masked, None, 2, num_real_experts=4, scoring_func=scoring_func).topk_ids.tolist() == [
        [1, -1]
    ]
    expert_load = torch.ones(6, dtype=torch.int64)
    assert zexpert.training.switch_loss(logits, expert_load, 3, 2, scoring_func=scoring_func).isfinite()

    assert f'| `"{scoring_func}"` |' in text("docs/ops/biased_topk.md"), "the table of scores lacks it"
    assert f'"{scoring_func}"' in inspect.getdoc(zexpert.create_fused_moe_router), "the factory's docstring lacks it"
    with pytest.raises(ValueError, match=f'scoring_func must be .*"{scoring_func}"'):
        _C.parse_scoring_func("none")


def test_stub_of_the_extension_has_every_enumerator() -> None:
    stub = ast.parse(text("python/zexpert/_C.pyi"))
    classes = {node.name: node for node in stub.body if isinstance(node, ast.ClassDef)}
    for enum in (zexpert.ScoringFunc, zexpert.ZeroExpertType):
        members = [node for node in classes[enum.__name__].body if isinstance(node, ast.Assign | ast.AnnAssign)]
        targets = [node.target if isinstance(node, ast.AnnAssign) else node.targets[0] for node in members]
        assert [ast.unparse(target) for target in targets] == [member.name for member in enum]


def routers() -> list[type]:
    """What the package offers that makes choices: no interface, no base of others."""
    classes = [getattr(router, name) for name in router.__all__ if inspect.isclass(getattr(router, name))]
    found = [kind for kind in classes if issubclass(kind, router.FusedMoERouter)]
    return [kind for kind in found if not any(issubclass(other, kind) and other is not kind for other in found)]


@pytest.mark.parametrize("kind", routers(), ids=lambda kind: kind.__name__)
def test_router_is_complete(kind: type) -> None:
    lacks = []
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", kind.__name__.replace("TopK", "Topk").replace("MoE", "Moe")).lower()
    if not is_of(kind, f"zexpert/router/{words}.py"):
        lacks.append(f"a file of its name, python/zexpert/router/{words}.py")
    if f" {kind.__name__}(" not in text("python/zexpert/router/factory.py"):
        lacks.append("a branch in python/zexpert/router/factory.py")
    if "RoutingMethodType." not in inspect.getsource(kind):
        lacks.append("a routing_method_type")
    if f"| `{kind.__name__}` |" not in text("docs/routers.md"):
        lacks.append("a row in docs/routers.md")
    if not any(kind.__name__ in path.read_text() for path in (ROOT / "tests/python").glob("test_router*.py")):
        lacks.append("a test in tests/python/test_router*.py")
    assert not lacks, f"router {kind.__name__} lacks {lacks}: see docs/design.md"


def test_every_kind_of_router_has_a_routing_method_type() -> None:
    assert len(routers()) == len(list(zexpert.RoutingMethodType))


def test_files_that_the_page_names_exist() -> None:
    """Those of its examples aside."""
    named = set(re.findall(r"`((?:csrc|python|tests|docs)/[^`\s]+)`", text("docs/design.md")))
    examples = {path for path in named if re.search(r"my_op|expert_choice", path)}
    assert len(examples) > 5
    assert not missing_files(*sorted(named - examples))
