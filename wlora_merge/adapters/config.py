"""What each field of a PEFT `LoraConfig` means for the delta weight: folded, without effect, or refused.

Importing PEFT costs seconds, and what only reads adapters and folds them must not pay them. So the fields and their
defaults stand here as a table. A test holds the table against PEFT's own dataclass: a new release of PEFT breaks a test
and not a user. A field that is refused, or that the table does not know, is accepted only with an empty value or its
default.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AdapterError, UnsupportedError
from ..text import short

FOLDED: dict[str, Any] = {
    "peft_type": None, "r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {},
    "fan_in_fan_out": False, "modules_to_save": None, "init_lora_weights": True, "use_dora": False,
    "bias": "none", "lora_bias": False, "trainable_token_indices": None, "target_parameters": None,
    "peft_version": None,
}  # fmt: skip
"""Field -> default, for fields that this package reads. Some of their values are refused below."""

INERT: dict[str, Any] = {
    "task_type": None, "auto_mapping": None, "base_model_name_or_path": None, "revision": None,
    "inference_mode": False, "target_modules": None, "exclude_modules": None, "lora_dropout": 0.0,
    "layers_to_transform": None, "layers_pattern": None, "megatron_config": None, "megatron_core": "megatron.core",
    "loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None, "qalora_group_size": 16,
    "runtime_config": None, "ensure_weight_tying": False,
}  # fmt: skip
"""Field -> default, for fields that steer training, or say which modules were chosen: the tensors already tell."""

REFUSED: dict[str, Any] = {
    "velora_config": None, "alora_invocation_tokens": None, "use_qalora": False,
    "monteclora_config": None, "layer_replication": None, "use_bdlora": None,
    "arrow_config": None, "kasa_config": None,
}  # fmt: skip
"""Field -> default, for fields whose effect is not folded yet, or cannot be. What gets folded moves to `FOLDED`."""

MUTATES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weight: unless converted on saving, such an adapter belongs to that base."""

BIASES = ("none", "all", "lora_only")
"""Which biases of the base were trained along."""

KEEPS_BASE = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base weight alone."""


def check_config(config: Mapping[str, Any], where: str, *, base_is_residual: bool = False) -> None:
    """Refuse a configuration that holds anything whose effect on the delta weight is not folded.

    Args:
        config: the parsed `adapter_config.json`.
        where: how to call the adapter in a message.
        base_is_residual: the base given is the residual that this adapter's initialisation left.

    Raises:
        AdapterError: not a LoRA adapter, or a field of the wrong type.
        UnsupportedError: a named field with a value that is not folded.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{where}: peft_type is {config.get('peft_type')!r}, expected 'LORA': only LoRA adapters can be mixed."
        )
    known = FOLDED | INERT
    for field, value in config.items():
        if field not in known and not _is_empty(value) and not _is_same(value, REFUSED.get(field)):
            kind = "is not folded" if field in REFUSED else "is not known"
            raise UnsupportedError(
                f"{where}: its config sets {field} to {short(value)}, a field that {kind}: leave this adapter out."
            )
    _check_types(config, where)
    _check_init(config.get("init_lora_weights", True), where, base_is_residual)


def plain_config(
    *,
    r: int,
    lora_alpha: int,
    target_modules: Sequence[str],
    base_name: str,
    fan_in_fan_out: bool,
    task_type: str | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The `adapter_config.json` of a LoRA without any feature beyond its factors, with no field that older PEFT would reject."""
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_name,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": list(target_modules),
        "modules_to_save": modules_to_save,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _is_empty(value: Any) -> bool:
    """True for null, false, {} and [], and for nothing that merely equals one of them (0 is a value)."""
    return value is None or value is False or (isinstance(value, dict | list) and not value)


def _is_same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _check_init(init: Any, where: str, base_is_residual: bool) -> None:
    if isinstance(init, bool) or init is None or (isinstance(init, str) and init.lower() in KEEPS_BASE):
        return
    if not isinstance(init, str) or not init.lower().startswith(MUTATES_BASE):
        raise UnsupportedError(
            f"{where}: init_lora_weights is {short(init)}, an initialisation that is not known: leave this adapter out."
        )
    if not base_is_residual:
        raise UnsupportedError(
            f"{where}: init_lora_weights is {init!r}, which changed the base weights too: convert the adapter to plain LoRA with "
            "PEFT's path_initial_model_for_weight_conversion, or say --base-is-residual NAME if the base given is its residual."
        )


def _check_types(config: Mapping[str, Any], where: str) -> None:
    for field in ("use_rslora", "fan_in_fan_out", "use_dora", "lora_bias"):
        if not isinstance(config.get(field), bool | None):
            raise AdapterError(f"{where}: {field} must be true or false, got {short(config[field])}.")
    if config.get("bias") not in (None, *BIASES):
        raise AdapterError(f"{where}: bias must be one of {', '.join(BIASES)}, got {short(config['bias'])}.")
    for field in ("modules_to_save", "target_parameters"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise AdapterError(f"{where}: {field} must be a list of names, got {short(names)}.")
    _check_numbers(config, where)


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    numbers = [config.get("r", 8), *_values(config, "rank_pattern", where)]
    if not all(type(r) is int and r > 0 for r in numbers):
        raise AdapterError(f"{where}: r and rank_pattern must be positive whole numbers, got {short(numbers)}.")
    alphas = [config.get("lora_alpha", 8), *_values(config, "alpha_pattern", where)]
    if not all(isinstance(a, int | float) and not isinstance(a, bool) and abs(a) < 1e30 for a in alphas):
        raise AdapterError(f"{where}: lora_alpha and alpha_pattern must be numbers, got {short(alphas)}.")


def _values(config: Mapping[str, Any], field: str, where: str) -> list[Any]:
    table = config.get(field) or {}
    if not isinstance(table, Mapping):
        raise AdapterError(f"{where}: {field} must be a table, got {short(table)}.")
    return list(table.values())
