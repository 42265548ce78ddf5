"""The table of LoraConfig's fields against PEFT's own, and every refusal by name."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import peft
import pytest
from peft import LoraConfig
from peft.tuners.lora.config import LoraRuntimeConfig

from wlora_merge.adapters.config import FOLDED, INERT, KEEPS_BASE, MUTATES_BASE, REFUSED, check_config
from wlora_merge.errors import AdapterError, UnsupportedError

PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
SET: dict[str, Any] = {
    "velora_config": {"a": 1},
    "alora_invocation_tokens": [3],
    "use_qalora": True,
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 2]],
    "use_bdlora": {"a": 1},
    "arrow_config": {"a": 1},
    "kasa_config": {"a": 1},
}


def default_of(field: dataclasses.Field[Any]) -> Any:
    value = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return None if isinstance(value, LoraRuntimeConfig) else value  # never written to a file


def test_the_table_of_fields_is_pefts_own_with_its_defaults() -> None:
    ours = FOLDED | INERT | REFUSED
    theirs = {field.name: default_of(field) for field in dataclasses.fields(LoraConfig)}
    assert ours == theirs, f"peft {peft.__version__} has other fields or defaults"
    assert len(ours) == len(FOLDED) + len(INERT) + len(REFUSED)


def test_every_initialisation_that_peft_names_is_known() -> None:
    hint = get_type_hints(LoraConfig)["init_lora_weights"]
    named = {value for part in get_args(hint) for value in get_args(part)}
    assert named
    assert not [n for n in named if n not in KEEPS_BASE and not n.startswith(MUTATES_BASE)]


def test_a_config_that_peft_writes_is_accepted() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, use_rslora=True).to_dict()
    check_config({**config, "peft_type": "LORA"}, "here")


def test_every_field_that_is_refused_has_a_value_to_test_it_with() -> None:
    assert set(SET) == set(REFUSED)


@pytest.mark.parametrize("field", REFUSED)
def test_a_feature_that_is_not_folded_is_refused_by_name(field: str) -> None:
    with pytest.raises(UnsupportedError, match=f"here: its config sets {field} to .* is not folded"):
        check_config(PLAIN | {field: SET[field]}, "here")
    check_config(PLAIN | {field: REFUSED[field]}, "here")


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_field_with_an_empty_value_is_accepted(value: Any) -> None:
    check_config(PLAIN | {"of_the_future": value}, "here")


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "none", "", {"a": None}, [None], "x" * 1000])
def test_an_unknown_field_with_any_other_value_is_refused_by_name(value: Any) -> None:
    with pytest.raises(UnsupportedError, match=r"of_the_future to .* is not known") as error:
        check_config(PLAIN | {"of_the_future": value}, "here")
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "PiSSA", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changes_the_base_is_refused_unless_the_base_is_its_residual(init: str) -> None:
    with pytest.raises(UnsupportedError, match=f"init_lora_weights is '{init}'.*--base-is-residual"):
        check_config(PLAIN | {"init_lora_weights": init}, "here")
    check_config(PLAIN | {"init_lora_weights": init}, "here", base_is_residual=True)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_an_initialisation_that_leaves_the_base_alone_is_accepted(init: Any) -> None:
    check_config(PLAIN | {"init_lora_weights": init}, "here")


@pytest.mark.parametrize("init", ["of_the_future", 3, ["pissa"]])
def test_an_initialisation_that_is_not_known_is_refused(init: Any) -> None:
    for residual in (False, True):
        with pytest.raises(UnsupportedError, match="initialisation that is not known"):
            check_config(PLAIN | {"init_lora_weights": init}, "here", base_is_residual=residual)


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "lora", None, 3, ["LORA"]])
def test_another_kind_of_adapter_is_refused(kind: Any) -> None:
    with pytest.raises(AdapterError, match=r"peft_type is .*, expected 'LORA'"):
        check_config(PLAIN | {"peft_type": kind}, "here")


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": 0}, {"r": -1}, {"r": 4.0}, {"r": True}, {"r": "4"}, {"r": None}, {"rank_pattern": {"q": 0}}, {"rank_pattern": [2]},
        {"lora_alpha": "8"}, {"lora_alpha": None}, {"lora_alpha": True}, {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")}, {"alpha_pattern": {"q": None}}, {"alpha_pattern": "q"}, {"use_rslora": "yes"},
        {"use_rslora": 1}, {"use_dora": 1}, {"lora_bias": "yes"}, {"bias": "some"}, {"bias": True},
        {"fan_in_fan_out": "no"}, {"modules_to_save": "classifier"}, {"modules_to_save": [1]},
        {"target_parameters": "experts"}, {"target_parameters": [1]},
    ],
)  # fmt: skip
def test_a_field_of_the_wrong_type_is_refused_by_name(wrong: dict[str, Any]) -> None:
    (field,) = wrong
    with pytest.raises(AdapterError, match=field):
        check_config(PLAIN | wrong, "here")
