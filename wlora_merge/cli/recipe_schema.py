"""The JSON schema of a recipe, for editors, made from the recipe's dataclasses.

python -m wlora_merge.cli.recipe_schema > wlora_merge/cli/schemas/recipe.schema.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from ..fit_options import FitRequest
from ..mix_options import MixOptions
from ..option_fields import Field, kinds, spec
from .recipe import ExportRecipe, Recipe, has_default

KINDS: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "dict[str, str]": {"type": "object", "additionalProperties": {"type": "string"}},
    "Sequence[float]": {"type": "array", "items": {"type": "number"}},
}


def recipe_schema() -> dict[str, Any]:
    """The schema, JSON Schema 2020-12."""
    top = _section(Recipe)
    texts = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    table = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
    top["properties"] |= {
        "adapters": {"oneOf": [table, texts, {"type": "string"}]},
        "fit": _section(FitRequest),
        "mix": {"anyOf": [_section(MixOptions), {"type": "null"}]},
        "exports": {"type": "array", "items": _section(ExportRecipe)},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "wlora-merge recipe",
        **top,
        "oneOf": [{"required": ["fit"]}, {"required": ["mix"]}],
    }


def _section(cls: type[Any]) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").strip().split("\n")[0],
        "properties": {f.name: _value(f) for f in fields if "option" in f.metadata},
        "required": [f.name for f in fields if not has_default(f)],
        "additionalProperties": False,
    }


def _value(f: Field) -> dict[str, Any]:
    known, choices, kind = spec(f), list(spec(f).choices), kinds(f)
    if choices and kind == ["str"]:
        return {"description": known.help, "enum": [*choices, None] if has_default(f) else choices}
    allowed = [{"enum": choices} if k == "str" and choices else KINDS[k] | _bounds(f) for k in kind]
    allowed += [{"type": "null"}] * has_default(f)
    return {"description": known.help, **(allowed[0] if len(allowed) == 1 else {"anyOf": allowed})}


def _bounds(f: Field) -> dict[str, float]:
    """The range of an option; all of its types are numbers then."""
    if (bounds := spec(f).bounds) is None:
        return {}
    most = {} if math.isinf(bounds.high) else {"maximum": bounds.high}
    return {"exclusiveMinimum" if bounds.open else "minimum": bounds.low, **most}


if __name__ == "__main__":
    print(json.dumps(recipe_schema(), indent=2))
