"""The JSON schema of a recipe, for editors, made from the recipe's dataclasses.

python -m wlora_merge.cli.recipe_schema > wlora_merge/cli/schemas/recipe.schema.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from .. import export_options, fit_options
from ..constants import FORMATS, NORMALIZE
from ..data.tasks import FIT_TASKS, TASKS
from .recipe import ExportRecipe, FitRecipe, MixRecipe, Recipe, has_default

KINDS: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "dict[str, str]": {"type": "object", "additionalProperties": {"type": "string"}},
    "list[float]": {"type": "array", "items": {"type": "number"}},
    "Sequence[float]": {"type": "array", "items": {"type": "number"}},
    "None": {"type": "null"},
}
CHOICES: dict[type[Any], Mapping[str, Iterable[str]]] = {
    FitRecipe: fit_options.CHOICES | {"task": FIT_TASKS},
    MixRecipe: {"task": TASKS, "normalize": NORMALIZE[:2]},
    ExportRecipe: export_options.CHOICES | {"format": FORMATS},
}
"""What the keys of a section are chosen from."""


def recipe_schema() -> dict[str, Any]:
    """The schema, JSON Schema 2020-12."""
    top = _table(Recipe)
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    table = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
    top["properties"] |= {
        "adapters": {"oneOf": [table, texts]},
        "fit": _table(FitRecipe),
        "mix": {"anyOf": [_table(MixRecipe), {"type": "null"}]},
        "exports": {"type": "array", "items": _table(ExportRecipe)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "wlora-merge recipe",
        **top,
        "oneOf": [{"required": ["fit"]}, {"required": ["mix"]}],
    }


def _table(cls: type[Any]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    needed = [f.name for f in fields if not has_default(f)]
    known = {f.name: _value(f, CHOICES.get(cls, {})) for f in fields if str(f.type).partition(" | ")[0] in KINDS}
    doc = (cls.__doc__ or "").strip().split("\n")[0]
    return {
        "type": "object",
        "description": doc,
        "properties": known,
        "required": needed,
        "additionalProperties": False,
    }


def _value(f: dataclasses.Field[Any], known: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    kinds = [KINDS[kind] for kind in str(f.type).split(" | ")]
    kinds += [KINDS["None"]] * (has_default(f) and KINDS["None"] not in kinds)
    if f.name in known:
        choices: list[str | None] = [*known[f.name]]
        return {"enum": choices + ([None] if KINDS["None"] in kinds else [])}
    return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2))
