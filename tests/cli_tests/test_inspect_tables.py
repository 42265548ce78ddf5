"""What a folder is, as rows; and which adapters fit which base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.imports import heavy_imports
from support.models import make_adapter, peft_changes, tiny_llama

from wlora_merge.cli.inspect_tables import inspect_paths
from wlora_merge.errors import WloraMergeError
from wlora_merge.exporters.export import export
from wlora_merge.mixture.mix import mix
from wlora_merge.progress import Done, listening

COLUMNS = ["adapter", "r", "alpha", "scaling", "modules", "parameters", "delta / base norm", "mixes"]


def test_names_with_brackets_are_shown_as_they_are(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    odd = tmp_path / "we[/x]rd" / "a[i]0"
    shutil.copytree(folders[0], odd)
    from click.testing import CliRunner

    from wlora_merge.cli.main import main

    done = CliRunner().invoke(main, ["inspect", str(base), str(odd)])
    assert "a[i]0" in done.output
    done = CliRunner().invoke(main, ["inspect", str(shutil.copytree(base, tmp_path / "b[/x]"))])
    assert done.exit_code == 0, done.output
    assert "b[/x]" in done.output


def test_adapters_on_a_base_are_two_tables_with_a_row_for_each(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    tables = inspect_paths([base, *folders])
    assert list(tables) == [f"Base model {base}", "Adapters", "Targets and features"]
    rows, features = tables["Adapters"], tables["Targets and features"]
    assert all(list(row) == COLUMNS for row in rows)
    assert [row["adapter"] for row in rows] == [row["adapter"] for row in features] == ["a0", "a1", "a2"]
    assert [row["mixes"] for row in rows] == ["yes"] * 3
    assert [row["modules"] for row in rows] == [4, 14, 6]
    assert rows[0] | {"r": "4", "alpha": "8", "scaling": "2"} == rows[0]
    assert rows[2] | {"r": "2..4", "alpha": "3..12", "scaling": "0.75..6"} == rows[2]
    assert features[2] == {
        "adapter": "a2", "targets": "k_proj o_proj q_proj", "features": "rank_pattern alpha_pattern", "trained on": "tiny",
    }  # fmt: skip
    assert [row["features"] for row in features[:2]] == ["plain", "use_rslora"]
    json.dumps(tables, allow_nan=False)


def test_sizes_and_norms_are_pefts(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    whole = load_file(base / "model.safetensors")
    for folder, row in zip(folders, inspect_paths([base, *folders], norms=True)["Adapters"], strict=True):
        peft = PeftModel.from_pretrained(tiny_llama(), folder)
        deltas = {n: m for n, m in peft.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
        changed = sum(m.get_delta_weight("default").double().square().sum().item() for m in deltas.values())
        under = sum(whole[f"{name}.weight"].double().square().sum().item() for name in deltas)
        assert row["delta / base norm"] == pytest.approx((changed / under) ** 0.5, rel=1e-5)
        assert row["parameters"] == sum(p.numel() for n, p in peft.named_parameters() if "lora_" in n)


def test_without_a_base_nothing_is_said_about_fitting(llama_zoo: Callable[..., Any]) -> None:
    _, folders = llama_zoo()
    tables = inspect_paths(folders)
    assert list(tables) == ["Adapters", "Targets and features"]
    assert all(list(row) == COLUMNS[:6] for row in tables["Adapters"])


def test_an_adapter_that_does_not_fit_is_a_row_with_the_reason(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    make_adapter(tiny_llama(hidden_size=64), tmp_path / "wide", 1, r=2, target_modules=["q_proj"])
    make_adapter(tiny_llama(), tmp_path / "dora", 1, r=2, target_modules=["q_proj"], use_dora=True)
    make_adapter(tiny_llama(), tmp_path / "alora", 1, r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    paths = [base, folders[0], tmp_path / "wide", tmp_path / "dora", tmp_path / "alora", tmp_path / "broken"]
    tables = inspect_paths(paths, norms=True)
    fits = {row["adapter"]: row["mixes"] for row in tables["Adapters"]}
    assert fits == {"a0": "yes", "wide": "no", "dora": "yes", "alora": "no", "broken": "no"}
    reasons = {row["adapter"]: row["reason"] for row in tables["Adapters that cannot be mixed"]}
    assert set(reasons) == {"wide", "alora", "broken"}
    assert reasons["wide"].startswith("adapter 'wide'")
    assert "do not fit the base weight [32, 32]" in reasons["wide"]
    assert "alora_invocation_tokens" in reasons["alora"]
    changes = peft_changes(tiny_llama(), tmp_path / "dora")
    sums = [
        sum(float(t.double().square().sum()) for t in found)
        for found in (changes.values(), map(tiny_llama().state_dict().__getitem__, changes))
    ]
    norms = {row["adapter"]: row["delta / base norm"] for row in tables["Adapters"] if row["mixes"] == "yes"}
    assert norms["dora"] == pytest.approx((sums[0] / sums[1]) ** 0.5, rel=1e-6)
    assert "is not valid JSON" in reasons["broken"]
    assert [row["adapter"] for row in tables["Targets and features"]] == ["a0", "wide", "dora"]
    json.dumps(tables, allow_nan=False)


@pytest.mark.filterwarnings("ignore:adapters .* are the same")
def test_adapters_that_mix_given_an_option_are_told_which(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    head = make_adapter(tiny_llama(), tmp_path / "head", 1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    shutil.copytree(folders[1], tmp_path / "a0")
    shutil.copytree(head, tmp_path / "other")
    tables = inspect_paths([base, folders[0], head, tmp_path / "a0", tmp_path / "other"])
    needs = "yes, with --modules-to-save or a fit that trains a head"
    assert [row["mixes"] for row in tables["Adapters"]] == ["yes", needs, "yes, named apart", needs]
    assert "Adapters that cannot be mixed" not in tables
    rows = tables["What adapters need to be mixed"]
    assert [row["adapter"] for row in rows] == ["head other", "a0"]
    reasons = [row["reason"] for row in rows]
    assert "carries whole tensors (lm_head): say --modules-to-save NAME" in reasons[0]
    assert "another adapter is called 'a0' too" in reasons[1]
    assert tables["Targets and features"][1]["features"] == "modules_to_save"


def test_an_adapter_that_mixes_alone_but_not_with_the_others_is_told_so(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    targets = [["embed_tokens"], ["lm_head"]]
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=t) for i, t in enumerate(targets)]
    file = folders[1] / "adapter_model.safetensors"
    factors = {k.replace("lm_head", "model.embed_tokens"): v for k, v in load_file(file).items() if "lora_" in k}
    save_file(factors, file)
    for folder in folders:
        assert inspect_paths([tmp_path / "base", folder])["Adapters"][0]["mixes"] == "yes"
    tables = inspect_paths([tmp_path / "base", *folders])
    assert [row["mixes"] for row in tables["Adapters"]] == ["yes", "no"]
    (row,) = tables["Adapters that cannot be mixed"]
    assert row["adapter"] == "a1"
    assert "is Linear here and Embedding in another" in row["reason"]


@pytest.mark.filterwarnings("ignore")
def test_fused_experts_are_measured_on_the_rows_that_they_change(tmp_path: Path) -> None:
    from support.architectures import merged
    from support.experts import CASES, EXPERTS, make

    for name in ("mixtral", "gpt_oss"):
        case = CASES[name]
        base, adapters = make(
            case, tmp_path / name, {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
        )
        row = inspect_paths([base, *adapters], norms=True)["Adapters"][0]
        start, after = case.load(base, torch.float64).state_dict(), merged(case, base, adapters[0])
        changed = [k for k in start if not torch.equal(start[k], after[k])]
        squares = [sum(float((t[k]).square().sum()) for k in changed) for t in (start,)]
        delta = sum(float((after[k] - start[k]).square().sum()) for k in changed)
        assert row["delta / base norm"] == pytest.approx((delta / squares[0]) ** 0.5, rel=1e-5)
        assert (row["r"], row["scaling"], row["mixes"]) == ("2", "4", "yes")
        alone = inspect_paths(adapters)
        assert alone["Adapters"][0] | {"r": "2", "scaling": None} == alone["Adapters"][0]
        assert (
            alone["Targets and features"][0] | {"targets": "experts q_proj", "features": "target_parameters"}
            == (alone["Targets and features"][0])
        )
        json.dumps(alone, allow_nan=False)


def test_a_quantized_base_gives_no_norm(tmp_path: Path) -> None:
    from support.quantized import quantize

    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    paths = [quantize(tmp_path / "base", tmp_path / "q", "gptq 4-bit"), folder]
    row = inspect_paths(paths, norms=True)["Adapters"][0]
    assert (row["mixes"], row["delta / base norm"]) == ("yes", None)


def test_headers_say_the_same_as_weights_but_for_norms_and_numbers(
    llama_zoo: Callable[..., Any], tmp_path: Path
) -> None:
    base, folders = llama_zoo()
    file = shutil.copytree(folders[0], tmp_path / "nan") / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    paths = [base, *folders, tmp_path / "nan"]
    headers, weights = inspect_paths(paths), inspect_paths(paths, norms=True)
    norms = [row.pop("delta / base norm") for row in weights["Adapters"]]
    assert [row.pop("delta / base norm") for row in headers["Adapters"]] == [None] * 4
    assert [norm is None for norm in norms] == [False] * 3 + [True]
    assert headers["Adapters"][3].pop("mixes") == "yes"
    assert weights["Adapters"][3].pop("mixes") == "no"
    (reason,) = weights.pop("Adapters that cannot be mixed")
    assert "holds a NaN" in reason["reason"]
    assert headers == weights


@pytest.fixture(scope="module")
def folders_of_each_kind(llama_zoo: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("kinds")
    base, (first, second, _) = llama_zoo()
    mix(base, [first, second], place / "mixture", task="causal-lm")
    for kind in ("dense", "lora"):
        export(place / "mixture", kind, place / kind)
    return {"base": base, "first": first, "second": second} | {n: place / n for n in ("mixture", "dense", "lora")}


KINDS = ["base", "first", "first second", "base first second", "mixture", "dense", "lora", "mixture base first"]


@pytest.fixture(scope="module")
def imported(folders_of_each_kind: dict[str, Path]) -> dict[str, tuple[int, set[str]]]:
    """What is told of each of these, one after the other: the first that imports something spoils all after it."""
    lines = [["inspect", *(str(folders_of_each_kind[kind]) for kind in kinds.split())] for kinds in KINDS]
    return dict(zip(KINDS, heavy_imports(lines, folders_of_each_kind["base"]), strict=True))


@pytest.mark.parametrize("kinds", KINDS)
def test_inspect_imports_no_torch(imported: dict[str, tuple[int, set[str]]], kinds: str) -> None:
    assert imported[kinds] == (0, set())


def test_norms_import_torch_and_not_transformers(folders_of_each_kind: dict[str, Path], tmp_path: Path) -> None:
    paths = [str(folders_of_each_kind[kind]) for kind in ("base", "first", "second")]
    assert heavy_imports([["inspect", "--norms", *paths]], tmp_path) == [(0, {"torch"})]


def test_norms_need_a_base_and_adapters(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    for paths in ([base], folders):
        with pytest.raises(WloraMergeError, match="give the base's folder or hub id, and the adapters' folders"):
            inspect_paths(paths, norms=True)


def test_norms_tell_how_far_they_are(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    told: list[Done] = []
    with listening(told.append):
        inspect_paths([base, *folders], norms=True)
    ends = {done.what: (done.items, done.total_items) for done in told if done.unit == "modules"}
    assert ends == {"norms of a0": (4, 4), "norms of a1": (14, 14), "norms of a2": (6, 6)}


def test_a_base_says_what_it_is(llama_zoo: Callable[..., Any]) -> None:
    base, _ = llama_zoo()
    (rows,) = inspect_paths([base]).values()
    assert {row["what"]: row["value"] for row in rows} == {
        "model type": "llama",
        "architectures": "LlamaForCausalLM",
        "parameters": str(sum(p.numel() for p in tiny_llama().parameters())),
        "tensors": str(len(load_file(base / "model.safetensors"))),
        "dtypes": "F32",
        "files": "1",
    }


def test_a_mixture_shows_its_inputs_and_weights(llama_zoo: Callable[..., Any], tmp_path: Path) -> None:
    base, folders = llama_zoo()
    mix(base, folders, tmp_path / "m", weights=[1, 2, -3], task="causal-lm")
    tables = inspect_paths([tmp_path / "m"])
    what, weights = tables.values()
    values = {row["what"]: row["value"] for row in what}
    assert (values["adapters"], values["task"], values["granularity"]) == ("a0 a1 a2", "causal-lm", "global (1 group)")
    assert weights[2] == {"adapter": "a2", "mean": -3, "lowest": -3, "highest": -3}
    json.dumps(tables, allow_nan=False)


@pytest.mark.parametrize("kind", ["dense", "lora"])
def test_an_export_shows_what_went_into_it(llama_zoo: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    base, folders = llama_zoo()
    export(mix(base, folders, task="causal-lm"), kind, tmp_path / "out")
    (rows,) = inspect_paths([tmp_path / "out"]).values()
    values = {row["what"]: row["value"] for row in rows}
    assert (values["format"], values["task"], values["adapters"]) == (kind, "causal-lm", "a0 a1 a2")
    files = [p for p in (tmp_path / "out").rglob("*") if p.is_file() and p.name != "wlora_merge.json"]
    assert (values["files"], values["bytes"]) == (str(len(files)), str(sum(p.stat().st_size for p in files)))


def test_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(WloraMergeError, match=str(path)):
            inspect_paths([path])


def test_tables_are_no_wider_than_80_columns(llama_zoo: Callable[..., Any]) -> None:
    from rich.table import Table

    base, folders = llama_zoo()
    torch.manual_seed(0)
    for rows in inspect_paths([base, *folders], norms=True).values():
        table = Table()
        for column in rows[0]:
            table.add_column(column)
        for row in rows:
            table.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()))
        assert "…" not in _rendered(table)


def _rendered(table: Any) -> str:
    from rich.console import Console

    console = Console(width=80)
    with console.capture() as capture:
        console.print(table)
    return capture.get()
