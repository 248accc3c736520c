# SPDX-License-Identifier: Apache-2.0
"""_C: RoutingSpec and the enumerations as Python sees them. What a spec means is tested with the operators."""

from __future__ import annotations

import copy
import enum
import pickle
from typing import Any

import pytest

from zexpert import _C, RoutingMethodType, RoutingSpec, ScoringFunc, ZeroExpertType

LONGCAT = {
    "top_k": 12,
    "num_real_experts": 512,
    "num_logits": 768,
    "num_identity_experts": 256,
    "num_constant_experts": 0,
    "scoring_func": "softmax",
    "renormalize": False,
    "drop_before_renormalize": False,
    "routed_scaling_factor": 6.0,
    "num_expert_group": 1,
    "topk_group": 1,
}
ENUMS: list[type[enum.Enum]] = [ScoringFunc, ZeroExpertType, RoutingMethodType]


def spec(**changes: Any) -> RoutingSpec:
    return RoutingSpec(**{**LONGCAT, **changes})


def test_properties_are_the_arguments() -> None:
    made = spec()
    assert {name: getattr(made, name) for name in LONGCAT} == {**LONGCAT, "scoring_func": ScoringFunc.SOFTMAX}


def test_defaults() -> None:
    made = RoutingSpec(top_k=1, num_real_experts=4)
    assert made.num_logits is None
    assert made.num_identity_experts is None
    assert made.num_drop_experts is None
    assert made.scoring_func is ScoringFunc.SOFTMAX
    assert (made.num_constant_experts, made.renormalize, made.drop_before_renormalize) == (0, False, False)
    assert (made.routed_scaling_factor, made.num_expert_group, made.topk_group) == (1.0, 1, 1)


def test_for_width_makes_every_count_known() -> None:
    open_spec = RoutingSpec(top_k=2, num_real_experts=8, num_constant_experts=2)
    resolved = open_spec.for_width(14)
    assert (resolved.num_logits, resolved.num_identity_experts, resolved.num_drop_experts) == (14, 4, 0)
    assert spec(num_identity_experts=100).num_drop_experts == 156
    assert open_spec.num_logits is None
    with pytest.raises(ValueError, match=r"^logits must have 768 columns, one per expert, got 767$"):
        spec().for_width(767)
    with pytest.raises(ValueError, match=r"^width must not be negative, got -1$"):
        open_spec.for_width(-1)


@pytest.mark.parametrize("scoring_func", list(ScoringFunc))
def test_scoring_func_by_name_or_enum(scoring_func: ScoringFunc) -> None:
    assert spec(scoring_func=scoring_func) == spec(scoring_func=_C.name(scoring_func))


def test_equality_and_hash_see_every_field() -> None:
    assert spec() == spec()
    assert hash(spec()) == hash(spec())
    assert spec() != "a spec"
    changes = {
        "top_k": 8,
        "num_real_experts": 500,
        "num_logits": 769,
        "num_identity_experts": 255,
        "num_constant_experts": 0,
        "scoring_func": "sigmoid",
        "renormalize": True,
        "routed_scaling_factor": 1.0,
    }
    changed = [spec(**{name: value}) for name, value in changes.items() if LONGCAT[name] != value]
    drops = {"num_identity_experts": 255, "renormalize": True}
    changed += [spec(**drops), spec(**drops, drop_before_renormalize=True)]
    changed += [spec(num_expert_group=4), spec(num_expert_group=4, topk_group=2)]
    assert len({spec(), *changed}) == 1 + len(changed)


@pytest.mark.parametrize("made", [spec(), RoutingSpec(top_k=1, num_real_experts=4)], ids=["full", "open"])
def test_copies_are_equal(made: RoutingSpec) -> None:
    assert pickle.loads(pickle.dumps(made)) == made
    assert copy.copy(made) == made
    assert copy.deepcopy([made])[0] == made
    assert eval(repr(made), {"RoutingSpec": RoutingSpec}) == made


def test_spec_is_immutable() -> None:
    with pytest.raises(AttributeError):
        spec().top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 0}, r"^top_k must be between 1 and 64, got 0$"),
        ({"top_k": 2.5}, r"^top_k must be an integer, got 2.5$"),
        ({"top_k": "12"}, r"^top_k must be an integer, got '12'$"),
        ({"num_real_experts": None}, r"^num_real_experts must be an integer, got None$"),
        ({"num_logits": 767.5}, r"^num_logits must be an integer or None, got 767.5$"),
        ({"scoring_func": 3}, r"^scoring_func must be a ScoringFunc or its name, got 3$"),
        ({"renormalize": "yes"}, r"^renormalize must be a bool, got 'yes'$"),
        ({"routed_scaling_factor": "6"}, r"^routed_scaling_factor must be a number, got '6'$"),
        ({"num_experts": 768}, r"^num_experts, the older name of num_logits, must be None with it, got 768$"),
        ({"drop_before_renormalize": True}, r"^drop_before_renormalize needs renormalize, got false$"),
        (
            {"drop_before_renormalize": True, "renormalize": True},
            r"^drop_before_renormalize needs drop experts, got none of 768 experts$",
        ),
        ({"top_k": 65}, r"^top_k must be between 1 and 64, got 65$"),
        ({"num_real_experts": 0}, r"^num_real_experts must be at least 1, got 0$"),
        ({"num_logits": -1}, r"^num_logits must not be negative, got -1$"),
        ({"num_logits": 767}, r"^num_logits \(the width of the logits\) must be at least 768, .* got 767$"),
        ({"num_identity_experts": -1}, r"^num_identity_experts must not be negative, got -1$"),
        ({"num_constant_experts": -1}, r"^num_constant_experts must not be negative, got -1$"),
        ({"scoring_func": "tanh"}, r'^scoring_func must be "softmax", "sigmoid" or "sqrtsoftplus", got "tanh"$'),
        ({"routed_scaling_factor": float("nan")}, r"^routed_scaling_factor must be finite, got nan$"),
        ({"num_expert_group": 3}, r"^num_expert_group must divide the number of real experts \(512\), got 3$"),
        ({"topk_group": 2}, r"^topk_group must be between 1 and num_expert_group \(1\), got 2$"),
        (
            {"num_real_experts": 4, "num_identity_experts": 0, "num_logits": 6},
            r"^top_k must be at most the number of experts \(6\), got 12$",
        ),
    ],
)
def test_bad_specs_get_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_the_older_name_of_the_width() -> None:
    older = RoutingSpec(top_k=2, num_real_experts=4, num_experts=6)
    assert older == RoutingSpec(top_k=2, num_real_experts=4, num_logits=6)
    assert (older.num_experts, RoutingSpec(top_k=2, num_real_experts=4).num_experts) == (6, None)
    with pytest.raises(ValueError, match=r"^num_experts must be an integer or None, got 'six'$"):
        RoutingSpec(top_k=2, num_real_experts=4, num_experts="six")  # type: ignore[arg-type]


def test_arguments_go_by_name() -> None:
    with pytest.raises(TypeError):
        RoutingSpec(12, 512)  # type: ignore[misc]


def test_new_makes_no_spec_that_was_not_checked() -> None:
    with pytest.raises(TypeError, match="top_k"):
        RoutingSpec.__new__(RoutingSpec)
    with pytest.raises(ValueError, match=r"^top_k must be between 1 and 64, got 0$"):
        RoutingSpec.__new__(RoutingSpec, top_k=0, num_real_experts=4)
    spec = RoutingSpec.__new__(RoutingSpec, top_k=2, num_real_experts=4)
    assert spec == RoutingSpec(top_k=2, num_real_experts=4)


def test_subclasses_are_specs() -> None:
    class Named(RoutingSpec):
        name = "mine"

    spec = Named(top_k=2, num_real_experts=4)
    assert (type(spec), spec.name, spec.top_k) == (Named, "mine", 2)


@pytest.mark.parametrize("kind", ENUMS)
def test_enums_are_python_enums(kind: type[enum.Enum]) -> None:
    assert issubclass(kind, enum.Enum)
    for member in kind:
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member


def test_names_and_parsers_are_inverse() -> None:
    assert [_C.name(member) for member in ScoringFunc] == ["softmax", "sigmoid", "sqrtsoftplus"]
    assert all(_C.parse_scoring_func(_C.name(member)) is member for member in ScoringFunc)
    assert [_C.name(member) for member in ZeroExpertType] == ["identity", "constant", "drop"]
    assert all(_C.parse_zero_expert_type(_C.name(member)) is member for member in ZeroExpertType)
    assert _C.parse_zero_expert_type("copy") is ZeroExpertType.IDENTITY
    assert _C.parse_zero_expert_type("zero") is ZeroExpertType.DROP
    with pytest.raises(ValueError, match=r'^zero_expert_type must be "identity" \(or "copy"\), .* got "Identity"$'):
        _C.parse_zero_expert_type("Identity")


def test_routing_methods_are_in_the_order_the_factory_considers_them() -> None:
    assert [member.name.lower() for member in RoutingMethodType] == [
        "simulated",
        "zero_expert",
        "grouped_topk",
        "custom",
        "topk_bias",
        "topk",
    ]
