"""A whole recipe: fit or mix, every export, verify; one folder tree, all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.adapter import called
from ..adapters.find import find_adapters
from ..constants import NEW_FOLDER
from ..errors import RecipeError
from ..export_options import ExportOptions
from ..exporters.export import ExportResult, export
from ..exporters.pooling_layer import KINDS
from ..exporters.verify import verify
from ..exporters.verify_outputs import Checked
from ..fit_options import POOLED_TASKS, FitRequest
from ..io.hub import is_here, seen_from
from ..io.staging import staged
from ..mixture.inputs import find_inputs
from ..mixture.mixture import Mixture
from ..models.base_model import open_base
from ..models.pooling import LAYER_POOLINGS
from ..onnx.pooling import own_pooling
from ..text import human_bytes
from .given_adapters import mixable_adapters
from .recipe import Recipe, options_of

if TYPE_CHECKING:
    from ..data.examples import Examples
    from ..mixture.inputs import Inputs


Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """The tree, its mixture, and what each export and its check gave, by folder name."""

    folder: Path
    mixture: Mixture
    exports: dict[str, ExportResult]
    checked: dict[str, Checked]


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    where: str | Path = ".",
    force: bool = False,
    say: Say = lambda _: None,
    fit_progress: Any = None,
) -> RunResult:
    """Do what a recipe says, and put `out/mixture` and one folder per export in place together.

    Args:
        recipe: from `recipe.read_recipe`.
        out: the folder to write.
        where: the folder that the recipe's paths are relative to.
        force: replace what is in `out`.
        say: called with each step as it begins.
        fit_progress: as `fit`'s progress.

    Raises:
        WloraMergeError: from any step; nothing is left in `out`.
    """
    base = seen_from(recipe.base, where)
    _refuse_unfit_lora(recipe, base)
    adapters = _adapters(recipe, base, where)
    exports: dict[str, ExportResult] = {}
    checked: dict[str, Checked] = {}
    data = [seen_from(path, where) for path in (recipe.fit.data, recipe.fit.eval_data) if path] if recipe.fit else []
    local = [Path(source) for source in (base, *(path for _, path in adapters), *data) if is_here(source)]
    with staged(Path(out), force=force, inputs=local) as staging:
        folder = staging.path / "mixture"
        mixture = _mixture(recipe, base, adapters, folder, where, say, fit_progress)
        for entry in recipe.exports:
            say(f"export {entry.folder}")
            options = options_of(entry, ExportOptions) | {"report": recipe.report}
            if entry.onnx_base is not None:
                options["onnx_base"] = seen_from(entry.onnx_base, where)
            target = staging.path / entry.folder
            exports[entry.folder] = export(folder, options.pop("format"), target, **options)
            if recipe.verify:
                say(f"verify {entry.folder}")
                named = [f"{name}={path}" for name, path in adapters if name in mixture.adapter_names]
                if new := mixture.data.get("new_adapter"):
                    named.append(f"{new['name']}={folder / NEW_FOLDER}")
                checked[entry.folder] = verify(target, base=base, adapters=named)
        if recipe.report:
            say("report")
            _write_report(staging.path, mixture, exports, checked)
    mixture.remember_new(staging.out / "mixture")
    return RunResult(staging.out, mixture, exports, checked)


def _write_report(
    folder: Path, mixture: Mixture, exports: Mapping[str, ExportResult], checked: Mapping[str, Checked]
) -> None:
    from ..exporters.report import write_report

    facts = {}
    for name, done in exports.items():
        c = checked.get(name)
        found = "not compared" if c is None or c.largest_difference is None else f"{c.largest_difference:.1e}"
        facts[f"export {name}"] = f"{human_bytes(done.bytes)}, difference from the unmerged mixture: {found}"
    found_inputs = find_inputs(folder / "mixture")
    write_report(
        folder, mixture, found_inputs.deltas, title=f"A mixture on {found_inputs.base.source.name}", facts=facts
    )


def _mixture(
    recipe: Recipe, base: str, adapters: list[tuple[str, str]], folder: Path, where: str | Path, say: Say, progress: Any
) -> Mixture:
    if recipe.fit is not None:
        from ..training.fit import fit

        say("fit")
        options = {key: value for key, value in asdict(recipe.fit).items() if value is not None}
        for key in ("data", "eval_data", "initial_logits"):
            if isinstance(options.get(key), str):
                options[key] = seen_from(options[key], where)
        return fit(base, adapters, options.pop("data"), options.pop("task"), folder, progress=progress, **options)
    from ..mixture.mix import mix

    say("mix")
    return mix(base, adapters, folder, **_mix_options(recipe))


def _adapters(recipe: Recipe, base: str, where: str | Path) -> list[tuple[str, str]]:
    """Names and places of the adapters; of a folder or list, those that can be mixed on the base."""
    if not isinstance(recipe.adapters, str):
        return [(name, seen_from(source, where)) for name, source in recipe.adapters.items()]
    found = find_adapters(seen_from(recipe.adapters, where))
    if recipe.strict:
        return found
    kept = {
        called(a) for a in mixable_adapters(base, found, asdict(recipe.fit) if recipe.fit else _mix_options(recipe))
    }
    return [(name, path) for name, path in found if name in kept]


def _mix_options(recipe: Recipe) -> dict[str, Any]:
    return {key: value for key, value in asdict(recipe.mix).items() if value is not None} if recipe.mix else {}


def _refuse_unfit_lora(recipe: Recipe, base: str) -> None:
    """Refuse a LoRA that the fit's pooling would leave without its head: that is known before the fit, or likely.

    Raises:
        RecipeError: with the place in the recipe.
    """
    fit, lora = recipe.fit, next((i for i, entry in enumerate(recipe.exports) if entry.format == "lora"), None)
    if fit is None or lora is None or fit.task not in POOLED_TASKS:
        return
    opened = open_base(base)
    likely = fit.pooling == "auto" and opened.model_type in KINDS and own_pooling(opened.folder) != "cls"
    if likely or fit.pooling in LAYER_POOLINGS:
        raise RecipeError(
            f"exports[{lora}]: fit has pooling: {fit.pooling}, so its head may see the mean of a text's tokens, which no LoRA adds "
            f"to {opened.folder}: say pooling: cls, or leave this export out."
        )


def _keeps_all(fit: FitRequest | None) -> bool:
    """Whether every adapter will be in the mixture, whatever the data say."""
    return fit is None or (
        fit.method in ("learned", "uniform", "search") and fit.select == "method" and not fit.prune_below
    )


def check_paths(recipe: Recipe, where: str | Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What `run` would read, resolved and opened, and what it will cost, as rows for tables; nothing is trained or written.

    Raises:
        WloraMergeError: an input that is missing or does not fit.
    """
    from ..mixture.mix import mix

    base = seen_from(recipe.base, where)
    _refuse_unfit_lora(recipe, base)
    adapters = _adapters(recipe, base, where)
    fitted: dict[str, Any] = {}
    if recipe.fit is not None:
        fitted = {"modules_to_save": "drop", "residual": recipe.fit.residual, **recipe.fit.options.combination}
    inputs = find_inputs(mix(base, adapters, **(fitted or _mix_options(recipe))))
    rows = [{"what": "base", "path": base}, *({"what": f"adapter {n}", "path": p} for n, p in adapters)]
    examples, read = (None, []) if recipe.fit is None else _read_data(recipe.fit, where)
    _check_ranks(recipe, inputs)
    rows += [*read, *({"what": f"export {e.folder}", "path": e.format} for e in recipe.exports)]
    from .costs import predict

    return rows, predict(inputs, recipe.exports, recipe.fit, examples, recipe.report)


def _read_data(fit: FitRequest, where: str | Path) -> tuple[Examples, list[dict[str, Any]]]:
    """The shots, and a row for each file of data."""
    from ..data.examples import EVAL_SPLITS, read_examples

    data = seen_from(fit.data, where)
    examples = read_examples(data, task=fit.task, columns=fit.columns, split=fit.split)
    rows = [{"what": f"data ({len(examples)} examples)", "path": data}]
    if fit.eval_data:
        data = seen_from(fit.eval_data, where)
        held = read_examples(data, task=fit.task, columns=fit.columns, split=fit.eval_split, default_splits=EVAL_SPLITS)
        held.tell_shots(examples)
        rows.append({"what": f"eval_data ({len(held)} examples)", "path": data})
    return examples, rows


def _check_ranks(recipe: Recipe, inputs: Inputs) -> None:
    """Refuse a LoRA whose rank is known before the fit, and which its server would not load."""
    from ..adapters.deltas import ModuleDelta
    from ..exporters.serving import check_rank

    for entry in recipe.exports:
        if entry.format == "lora" and entry.energy is None and _keeps_all(recipe.fit):
            r = entry.rank or max((d.R for d in inputs.deltas if isinstance(d, ModuleDelta)), default=0)
            r += (recipe.fit.new_adapter or 0) if recipe.fit is not None and entry.rank is None else 0
            check_rank(r, server=entry.server, max_rank=entry.max_rank, exact=entry.rank is None)
