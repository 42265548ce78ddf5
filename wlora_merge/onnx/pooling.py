"""What a sentence-transformers folder does with the token embeddings: pooling, dense layers, normalization.

`modules.json` lists the modules behind the transformer. They become one `torch.nn.Module` on the model, so that its outputs
are also `token_embeddings` and `sentence_embedding`, as Optimum names them. `last_hidden_state` stays: Optimum's own classes and
sentence-transformers' ONNX backend read that.
Knows those files alone; a module or a mode of pooling that is not here is refused by name.

Source: https://github.com/huggingface/sentence-transformers, `modules/pooling.py`, `modules/dense.py`, `modules/normalize.py`;
`optimum.exporters.onnx.model_configs.SentenceTransformersTransformerOnnxConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError, UnsupportedError
from ..io.safetensors_file import read_header, read_tensor
from ..io.untrusted import find_file, read_bytes, read_json
from ..models.pooling import pool_tokens

if TYPE_CHECKING:
    import torch

MODULES = "modules.json"
OUTPUTS = ("token_embeddings", "sentence_embedding")
HEAD = "sentence_transformers"
"""What the modules are called on the model."""
# Older configs have one switch for each mode; several are concatenated in this order, newer ones name the modes in theirs
SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU", "SiLU", "Sigmoid")
TRANSFORMERS_INSTEAD = f"take {MODULES} out of the base's folder to export the token embeddings alone"


def add_pooling(model: torch.nn.Module, folder: Path) -> None:
    """Let `model` also give `token_embeddings` and `sentence_embedding`, where `folder` is a sentence-transformers folder.

    Args:
        model: a transformers model whose outputs have `last_hidden_state` [batch, sequence, hidden].
        folder: with `modules.json` and the folders that it names.

    Raises:
        UnsupportedError: a module, a mode of pooling or an activation that is not known here.
        BaseModelError: a file that is broken or missing.
    """
    import torch

    steps = [step for step in _steps(folder) if step is not None]
    if not steps:
        return
    head = torch.nn.Sequential(*steps).to(next(model.parameters()).dtype).eval()

    def pool(module: torch.nn.Module, arguments: tuple[Any, ...], given: Mapping[str, Any], output: Any) -> Any:
        tokens = output["last_hidden_state"]
        mask = given.get("attention_mask")
        mask = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device) if mask is None else mask
        return {**output, OUTPUTS[0]: tokens, OUTPUTS[1]: head((tokens, mask))}

    model.add_module(HEAD, head)
    model.register_forward_hook(pool, with_kwargs=True)


def pools(model: torch.nn.Module) -> bool:
    """Whether `add_pooling` has given the model its outputs."""
    return hasattr(model, HEAD)


def own_pooling(folder: Path) -> str | None:
    """How a sentence-transformers folder pools its tokens, as `fit --pooling` calls it; None where it is none, or pools otherwise."""
    file = find_file(folder, MODULES, BaseModelError)
    path = next((path for kind, path in _modules(file) if kind.rpartition(".")[2] == "Pooling"), None) if file else None
    config = find_file(folder, f"{path}/config.json", BaseModelError) if path else None
    if config is None:
        return None
    modes = _modes(read_json(config, BaseModelError))
    return {"mean": "mean", "cls": "cls", "lasttoken": "last"}.get(modes[0]) if len(modes) == 1 else None


def _modes(config: Mapping[str, Any]) -> list[str]:
    """The modes that a config of a Pooling names."""
    named = config.get("pooling_mode") or [mode for switch, mode in SWITCHES.items() if config.get(switch)] or "mean"
    return [named] if isinstance(named, str) else list(named)


def _steps(folder: Path) -> list[torch.nn.Module | None]:
    """The modules behind the transformer, in order; None for one that does nothing at inference."""
    file = find_file(folder, MODULES, BaseModelError)
    if file is None:
        return []
    kinds = _modules(file)
    known: dict[str, Callable[[Path, dict[str, Any]], torch.nn.Module | None]] = {
        "Pooling": _pooling, "Dense": _dense, "Normalize": _normalize, "Dropout": lambda file, config: None,
    }  # fmt: skip
    steps: list[torch.nn.Module | None] = []
    for number, (kind, path) in enumerate(kinds):
        name = kind.rpartition(".")[2]
        _check_module(file, number, kind, path, tuple(known))
        if number:
            config = find_file(folder, f"{path}/config.json", BaseModelError) if path else None
            table = read_json(config, BaseModelError) if config is not None else {}
            steps.append(known[name](config or folder / path / "config.json", table))
    if not steps:
        raise UnsupportedError(f"{file}: has no module that pools: {TRANSFORMERS_INSTEAD}.")
    return steps


def _modules(file: Path) -> list[tuple[str, str]]:
    """(type, path) of each module that `modules.json` lists."""
    try:
        rows = json.loads(read_bytes(file, BaseModelError))
        return [(str(row["type"]), str(row.get("path") or "")) for row in rows]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(f"{file}: is not a list of modules with a type and a path ({error}).") from error


def _check_module(file: Path, number: int, kind: str, path: str, known: tuple[str, ...]) -> None:
    """Refuse a module that cannot stand at this place: first the transformer, then what pools, then any that is known."""
    expected = [("Transformer",), ("Pooling",), known][min(number, 2)]
    inside = number == 0 and bool(path)
    if not kind.startswith("sentence_transformers.") or kind.rpartition(".")[2] not in expected or inside:
        raise UnsupportedError(
            f"{file}: module {number} is {kind!r} in {path or 'the folder itself'!r}, and the ONNX export knows "
            f"{' or '.join(expected)}{' in the folder itself' if number == 0 else ''} there: {TRANSFORMERS_INSTEAD}."
        )


def _pooling(file: Path, config: dict[str, Any]) -> torch.nn.Module:
    import torch

    modes = _modes(config)
    strange = [mode for mode in modes if mode not in SWITCHES.values()]
    strange += [key for key in config if key.startswith("pooling_mode_") and key not in SWITCHES and config[key]]
    if strange:
        raise UnsupportedError(
            f"{file}: pooling mode {strange[0]!r} is not one of {', '.join(SWITCHES.values())}: {TRANSFORMERS_INSTEAD}."
        )
    if config.get("include_prompt") is False:
        raise UnsupportedError(
            f"{file}: include_prompt is false, and a graph cannot know which tokens are the prompt: {TRANSFORMERS_INSTEAD}."
        )

    class Pooling(torch.nn.Module):
        def forward(self, given: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return torch.cat([pool_tokens(*given, mode) for mode in modes], dim=-1)

        def extra_repr(self) -> str:
            return ", ".join(modes)  # a graph that was traced before is known by what the model says of itself

    return Pooling()


def _normalize(file: Path, config: dict[str, Any]) -> torch.nn.Module:
    import torch

    _refuse_inputs(file, config)

    class Normalize(torch.nn.Module):
        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(given.float(), dim=-1).to(given.dtype)

    return Normalize()


def _dense(file: Path, config: dict[str, Any]) -> torch.nn.Module:
    import torch

    _refuse_inputs(file, config)
    name = str(config.get("activation_function") or "torch.nn.modules.activation.Tanh")
    if not name.startswith("torch.nn.") or name.rpartition(".")[2] not in ACTIVATIONS or config.get("use_residual"):
        what = "use_residual is true" if config.get("use_residual") else f"its activation is {name!r}"
        raise UnsupportedError(
            f"{file}: {what}, expected none and one of {', '.join(ACTIVATIONS)}: {TRANSFORMERS_INSTEAD}."
        )
    weights = find_file(file.parent, "model.safetensors", BaseModelError)
    if weights is None:
        raise BaseModelError(
            f"{file.parent}: has no model.safetensors; a pickle could run code and is never loaded: convert it where you trust it."
        )
    entries = read_header(weights).entries
    try:
        weight, bias = entries["linear.weight"], entries.get("linear.bias")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.load_state_dict({key.partition(".")[2]: read_tensor(entry) for key, entry in entries.items()})
    except (KeyError, IndexError, RuntimeError) as error:
        raise BaseModelError(f"{weights}: is not a linear.weight and a linear.bias ({error}).") from error
    return torch.nn.Sequential(linear, getattr(torch.nn, name.rpartition(".")[2])())


def _refuse_inputs(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse a module that reads or writes another thing than the sentence embedding."""
    for key in ("module_input_name", "module_output_name"):
        if config.get(key) not in (None, OUTPUTS[1]):
            raise UnsupportedError(
                f"{file}: {key} is {config[key]!r}, expected {OUTPUTS[1]!r}: {TRANSFORMERS_INSTEAD}."
            )
