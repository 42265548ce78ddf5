"""YAML -> frozen dataclasses: a whole job in one file, checked before anything runs.

    base: facebook/opt-350m
    adapters:                          # or a folder of adapters, or a text file with one [NAME=]PATH_OR_ID on a line
      first: ybelkada/opt-350m-lora
      second: ./adapters/second
    fit: {data: shots.jsonl, task: causal-lm, max_steps: 40}     # or mix: {weights: [0.7, 0.3], task: causal-lm}
    exports:
      - {format: dense}
      - {format: lora, rank: 16, name: lora-16}

Paths are relative to the recipe. Unknown keys are errors that suggest the nearest. This room knows keys and types, and reads
nothing but the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.adapter import default_name
from ..errors import RecipeError, WloraMergeError
from ..export_options import ExportOptions, export_options, refuse_without_rank
from ..fit_options import FitRequest, fit_request
from ..io.untrusted import is_plain_file_name, parse_yaml, read_bytes
from ..mix_options import MixOptions, mix_options
from ..option_fields import REQUIRED, Field, Topic, is_of_type, option
from ..text import nearest, short


@dataclass(frozen=True, kw_only=True)
class ExportRecipe(ExportOptions):
    """One entry of `exports`; `name` is its folder, the format's own name by default."""

    name: str | None = option(None, Topic.OUTPUT, "Its folder. Default: the format's own name.")

    @property
    def folder(self) -> str:
        """Where it stands in the tree."""
        return self.name or self.format


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole job: a base, adapters, a fit or a mix, and the exports."""

    base: str = option(REQUIRED, Topic.INPUTS, "Base model: a folder, or a hub id.")
    adapters: dict[str, str] | str
    strict: bool = option(
        False,
        Topic.INPUTS,
        "Of adapters that are a folder or a list: refuse one that cannot be mixed on the base. Default: leave it out and say why.",
    )
    fit: FitRequest | None = None
    mix: MixOptions | None = None
    exports: list[ExportRecipe] = field(default_factory=list)
    verify: bool = option(True, Topic.CHECKED, "Verify every export.")
    report: bool = option(True, Topic.OUTPUT, "Write report.html and its figures (needs matplotlib).")


MAX_RECIPE_BYTES = 1 << 20
MAX_INTEGER = 2**53
SECTIONS = {"fit": FitRequest, "mix": MixOptions}


def read_recipe(file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        file: YAML; read by safe load, so nothing in it is executed.
        overrides: `fit.epochs=3` and the like; the value is YAML.

    Raises:
        RecipeError: an unknown key (with the nearest known one), a value of the wrong type, or one that is missing.
    """
    path = Path(file)
    try:
        table = parse_yaml(read_bytes(path, RecipeError, MAX_RECIPE_BYTES).decode("utf-8"))
        if not isinstance(table, dict):
            raise RecipeError(
                f"{path}: expected a table of base, adapters, fit or mix, and exports, got {type(table).__name__}."
            )
        for override in overrides:
            _override(table, override)
    except ValueError as error:
        raise RecipeError(f"{path}: cannot be read as YAML ({error}).") from error
    return _recipe(table, path)


def _override(table: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals:
        raise RecipeError(f"--set {override}: expected KEY=VALUE, as fit.epochs=3.")
    *parents, last = keys.split(".")
    for key in parents:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise RecipeError(f"--set {override}: {key} is no section of the recipe.")
    table[last] = parse_yaml(text)


def _recipe(table: Mapping[str, Any], path: Path) -> Recipe:
    values = dict(table)
    if ("fit" in values) == ("mix" in values):
        raise RecipeError(f"{path}: expected one of the sections fit and mix.")
    for name, section in SECTIONS.items():
        if name in values:
            values[name] = _build(section, values[name] or {}, f"{path}: {name}")
    exports = values.get("exports", [])
    if not isinstance(exports, list):
        raise RecipeError(f"{path}: exports is a {type(exports).__name__}, expected a list.")
    values["exports"] = [_build(ExportRecipe, row, f"{path}: exports[{i}]") for i, row in enumerate(exports)]
    values["adapters"] = _adapters(values.get("adapters"), path)
    recipe: Recipe = _build(Recipe, values, str(path))
    _check(recipe, path)
    return recipe


def _adapters(value: Any, path: Path) -> dict[str, str] | str:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        names = [default_name(v) for v in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise RecipeError(
                f"{path}: two adapters are called {twice[0]!r}: name them, as in adapters: {{first: PATH, second: PATH}}."
            )
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
        raise RecipeError(
            f"{path}: adapters must be a table NAME: PATH_OR_ID, a list of them, or a folder or text file that has them, got "
            f"{short(value)}."
        )
    return {str(k): v for k, v in value.items()}


def _build(cls: type[Any], table: Any, where: str) -> Any:
    if not isinstance(table, dict):
        raise RecipeError(f"{where}: got {short(table)}, expected a table.")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    table = {k: v for k, v in table.items() if v is not None or k not in fields or not has_default(fields[k])}
    for key, value in table.items():
        if key not in fields:
            raise RecipeError(
                f"{where}: unknown key {short(key)}{nearest(str(key)[:80], list(fields))}; known: {', '.join(fields)}."
            )
        if "option" in fields[key].metadata:  # the sections are built before
            _check_type(fields[key], value, where)
    missing = [name for name, f in fields.items() if not has_default(f) and name not in table]
    if missing:
        raise RecipeError(f"{where}: lacks {missing[0]}.")
    return cls(**table)


def has_default(f: Field) -> bool:
    """Whether a key may be left out, or be null, which means the same."""
    return f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING


def _check_type(f: Field, value: Any, where: str) -> None:
    numbers = value if isinstance(value, list) else [value]
    if not is_of_type(f, value):
        kind = str(f.type).removesuffix(" | None").replace("Sequence", "list")
        raise RecipeError(f"{where}: {f.name} is {short(value)}, expected {kind}.")
    if any(isinstance(x, int) and abs(x) > MAX_INTEGER for x in numbers):
        raise RecipeError(f"{where}: {f.name} is {short(value)}, more than {MAX_INTEGER}.")


def _check(recipe: Recipe, path: Path) -> None:
    if recipe.strict and not isinstance(recipe.adapters, str):
        raise RecipeError(f"{path}: strict is of adapters in a folder or a list; those named here are never left out.")
    folders = ["mixture", "figures", *(e.folder for e in recipe.exports)]
    for folder in folders:
        if folders.count(folder) > 1 or not is_plain_file_name(folder):
            raise RecipeError(
                f"{path}: the export folder {short(folder)} must be a plain name that no other has: set its name."
            )
    with _named(f"{path}: fit"):
        if recipe.fit is not None:
            fit_request(vars(recipe.fit))
    with _named(f"{path}: mix"):
        if recipe.mix is not None:
            mix_options(vars(recipe.mix))
    made = recipe.fit or recipe.mix
    for i, entry in enumerate(recipe.exports):
        with _named(f"{path}: exports[{i}]"):
            export_options(options_of(entry, ExportOptions))
            if entry.format == "lora" and made is not None:
                refuse_without_rank(made.method, entry.rank)


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors of options are those of a recipe, with the place in it."""
    try:
        yield
    except WloraMergeError as error:
        raise RecipeError(f"{where}: {error}") from error


def options_of(section: Any, options: type[Any]) -> dict[str, Any]:
    """The values of a section that are options of the workflow itself."""
    return {f.name: getattr(section, f.name) for f in dataclasses.fields(options)}
