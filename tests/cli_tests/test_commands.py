"""The command line as a user meets it: the main job, one clear sentence and exit 1 for bad input, exit 2 for wrong usage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.commands import KEY, adapter_options, copied, inputs, refused, run, write
from support.commands import zoo as zoo


def test_mix_export_inspect_verify_from_end_to_end(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    mixture = tmp_path / "mixture"
    done = run("mix", *inputs(base, folders), "--out", mixture, "--task", "causal-lm", "--weights", "0.2,0.3,0.5")
    assert done.exit_code == 0, done.output
    for kind, options in {"dense": [], "lora": ["--rank", "2"]}.items():
        done = run("export", mixture, "--format", kind, "--out", tmp_path / kind, *options)
        assert done.exit_code == 0, done.output
    done = run("verify", tmp_path / "dense", "--json", "--base", base, *adapter_options(folders))
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["largest_difference"] < 1e-5
    assert not result["skipped"]
    for paths in ([base, *folders], [mixture], [tmp_path / "dense"]):
        assert run("inspect", *paths).exit_code == 0
        assert json.loads(run("inspect", *paths, "--json").stdout)


def test_a_mixture_of_another_method_is_shown_exported_and_verified(
    zoo: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = zoo
    how = ["--method", "dare_ties", "--density", "0.5", "--seed", "3", "--weights", "1,0.5,1", "--task", "causal-lm"]
    assert run("mix", *inputs(base, folders), *how, "--out", tmp_path / "m").exit_code == 0
    rows = json.loads(run("inspect", tmp_path / "m", "--json").stdout)[f"Mixture {tmp_path / 'm'}"]
    assert {"what": "combination", "value": "method dare_ties, density 0.5, majority_sign total, seed 3"} in rows
    refused(
        run("export", tmp_path / "m", "--format", "lora", "--out", tmp_path / "l"),
        tmp_path / "l",
        "dare_ties: ",
        "--rank K",
    )
    done = run("export", tmp_path / "m", "--format", "lora", "--rank", "4", "--out", tmp_path / "l")
    assert "r = 4, relative error" in done.stdout
    for name, words in (
        ("d", ["--format", "dense", "--report"]),
        ("l", ["--format", "lora", "--rank", "4", "--force"]),
    ):
        assert run("export", tmp_path / "m", *words, "--out", tmp_path / name).exit_code == 0
        done = run("verify", tmp_path / name, "--base", base, *adapter_options(folders), "--json")
        assert json.loads(done.stdout)["skipped"] == {}


def test_wrong_usage_exits_2(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    assert run("export").exit_code == 2
    assert run("nonsense").exit_code == 2
    assert run("mix", *inputs(base, folders), "--out", tmp_path / "m", "--weights", "a,b").exit_code == 2
    fit = ["fit", *inputs(base, folders[:1]), "--data", "x.csv", "--task", "causal-lm", "--out", tmp_path / "m"]
    assert run(*fit).exit_code == 2


FIT = ["fit", "--base", "b", "--adapter", "a", "--adapter", "c", "--data", "x"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "m", "--format", "lora", "--rank", "0"], "x>=1"),
        (["export", "m", "--format", "lora", "--rank", "-3"], "x>=1"),
        (["export", "m", "--format", "lora", "--energy", "2"], "0<x<=1"),
        (["export", "m", "--format", "lora", "--rank", "2", "--energy", "0.5"], "exclude each other"),
        (["export", "m", "--format", "dense", "--rank", "2"], "--rank: of --format lora alone, not of dense"),
        (["mix", "--base", "b", "--adapter", "a", "--adapter", "c", "--adapter", "d", "--weights", "1,2"], "2 numbers"),
        (["mix", "--base", "b", "--adapter", "a", "--adapter", "c", "--weights", "0.7,nan"], "finite numbers"),
        (
            ["mix", "--base", "b", "--adapter", "a", "--method", "ties"],
            "method ties prunes the delta weights: say --density",
        ),
        (["mix", "--base", "b", "--adapter", "a", "--method", "ties", "--density", "0"], "0<x<=1"),
        (["mix", "--base", "b", "--adapter", "a", "--density", "0.5"], "density is of a method that prunes"),
        (
            ["mix", "--base", "b", "--adapter", "a", "--majority-sign", "total"],
            "majority_sign is of ties and dare_ties",
        ),
        (["export", "m", "--format", "lora", "--opset", "18"], "of --format onnx alone"),
        (["export", "m", "--format", "onnx", "--max-shard-size", "1MB"], "of --format dense alone"),
        ([*FIT, "--task", "causal-lm", "--eval-split", "test"], "eval_split is of eval_data"),
        ([*FIT, "--task", "seq2seq-lm", "--packing"], "packing is of causal-lm"),
        ([*FIT, "--task", "causal-lm", "--folds", "1"], "folds"),
    ],
)
def test_options_that_cannot_be_are_wrong_usage(words: list[str], message: str, tmp_path: Path) -> None:
    done = run(*words, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Usage: " in done.stderr


def test_a_wrong_override_is_wrong_usage_and_a_wrong_recipe_failed_work(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("base: b\nadapters: {a: a}\nmix: {}\n")
    for override in ("mix.wieghts=[1]", "mix", "fit.task=causal-lm"):
        assert run("run", file, "--check", "--set", override).exit_code == 2
    file.write_text("base: b\nadapters: {a: a}\nmix: {}\nexprots: []\n")
    for override in ([], ["--set", "mix.weights=[1]"]):
        done = run("run", file, "--check", *override)
        assert (done.exit_code, "exprots" in done.stderr) == (1, True)


def test_a_tree_of_a_run_names_what_is_below_it(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    tree = tmp_path / "build"
    tree.mkdir()
    assert run("mix", *inputs(base, folders), "--out", tree / "mixture", "--task", "causal-lm").exit_code == 0
    assert run("export", tree / "mixture", "--format", "lora", "--out", tree / "lora").exit_code == 0
    done = run("verify", tree)
    assert done.exit_code == 1
    assert f"below it are {tree / 'lora'}, {tree / 'mixture'}: give one of the exports." in done.stderr
    (rows,) = json.loads(run("inspect", tree, "--json").stdout).values()
    assert rows == [{"what": "export", "path": str(tree / "lora")}, {"what": "mixture", "path": str(tree / "mixture")}]
    done = run("verify", tmp_path / "nope")
    assert (done.exit_code, done.stderr) == (1, f"Error: {tmp_path / 'nope'}: does not exist.\n")


# --------------------------------------------------------------------------------------------------- bad adapters


def test_a_missing_adapter_folder(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out = tmp_path / "out"
    refused(run("mix", *inputs(base, [folders[0], tmp_path / "no" / "such"]), "--out", out), out, "no/such", "no such")


def test_a_folder_that_is_no_lora(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, "IA3", "LORA", "odd")
    refused(run("mix", *inputs(base, [folders[1], base]), "--out", out), out, "adapter_config.json")


def test_a_pickle(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")
    (odd / "adapter_model.safetensors").rename(odd / "adapter_model.bin")
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, "adapter_model.bin", "save_pretrained")


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def test_shapes_that_do_not_fit_the_base(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")
    changed(odd, lambda t: t.update({f"{KEY}.lora_A.weight": torch.randn(4, 31)}))
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, "layers.1.self_attn.q_proj", "31", "32")


def test_a_target_module_that_the_base_lacks(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for part in ("lora_A", "lora_B"):
            old = f"{KEY}.{part}.weight"
            tensors[old.replace("layers.1", "layers.7")] = tensors.pop(old)

    changed(odd, rename)
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, "layers.7", "odd")


@pytest.mark.parametrize("field", ["use_qalora", "layer_replication", "alora_invocation_tokens", "made_up_field"])
def test_a_feature_that_is_not_supported_is_named(zoo: tuple[Path, list[Path]], tmp_path: Path, field: str) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")
    config = json.loads((odd / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(config | {field: [[1, 2]]}))
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, field, "odd")


def test_a_nan_in_a_tensor(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out, odd = tmp_path / "out", copied(folders[0], tmp_path / "odd")
    changed(odd, lambda t: t[f"{KEY}.lora_B.weight"].__setitem__((0, 0), float("nan")))
    refused(run("mix", *inputs(base, [folders[1], odd]), "--out", out), out, f"{KEY}.lora_B.weight", "NaN")


# ------------------------------------------------------------------------------------------------------- bad data


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("empty.csv", "", ["empty.csv"]),
        ("header.csv", "text,label\n", ["header.csv"]),
        ("columns.csv", "utterance,kind\na,b\nc,d\n", ["utterance", "kind", "text", "label"]),
        ("broken.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', ["broken.jsonl", "2"]),
    ],
)
def test_an_empty_or_wrongly_columned_data_file(
    zoo: tuple[Path, list[Path]], tmp_path: Path, name: str, text: str, words: list[str]
) -> None:
    base, folders = zoo
    out, data = tmp_path / "out", write(tmp_path / name, text)
    done = run("fit", *inputs(base, folders), "--data", data, "--task", "text-classification", "--out", out)
    refused(done, out, *words)


def test_a_missing_data_file(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out = tmp_path / "out"
    done = run("fit", *inputs(base, folders), "--data", tmp_path / "none.csv", "--task", "causal-lm", "--out", out)
    refused(done, out, "none.csv")


# ----------------------------------------------------------------------------------------------------- bad output


def test_an_out_that_is_not_empty(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    done = run("mix", *inputs(base, folders), "--out", out)
    assert done.exit_code == 1
    assert "--force" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "mine"
    assert run("mix", *inputs(base, folders), "--out", out, "--force").exit_code == 0
    assert {p.name for p in out.iterdir()} == {"mixture.json", "mixture.safetensors"}


@pytest.mark.parametrize("name", ["x" * 300, "/" + "y" * 300, "~nobody-of-that-name/x", "a\0b"])
def test_a_name_that_no_file_system_takes_is_one_sentence_wherever_it_stands(
    zoo: tuple[Path, list[Path]], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base, folders = zoo
    assert run("mix", *inputs(base, folders), "--out", "m", "--task", "causal-lm").exit_code == 0
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    recipe = {"base": str(base), "adapters": [str(folders[0])], "mix": {}, "exports": [{"format": "dense"}]}
    for key, changed in (("base", name), ("adapters", [name]), ("adapters", {"a": name})):
        (tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml").write_text(json.dumps(recipe | {key: changed}))
    fit = {"fit": {"data": name, "task": "causal-lm"}, "adapters": list(map(str, folders))}
    (tmp_path / "fit.yaml").write_text(json.dumps({k: v for k, v in (recipe | fit).items() if k != "mix"}))
    recipes = sorted(tmp_path.glob("*.yaml"))
    before = sorted(p.name for p in tmp_path.iterdir())
    adapters = inputs(base, folders)
    lines: list[list[object]] = [
        ["mix", "--base", name, "--adapter", folders[0], "--out", "o"],
        ["mix", "--base", base, "--adapter", name, "--out", "o"],
        ["mix", "--base", base, "--adapter", f"a={name}", "--out", "o"],
        *([["mix", *adapters, "--out", name]] if not name.startswith("~") else []),
        ["fit", *adapters, "--data", name, "--task", "causal-lm", "--out", "o"],
        ["fit", *adapters, "--data", "data.jsonl", "--eval-data", name, "--task", "causal-lm", "--out", "o"],
        ["export", name, "--format", "dense", "--out", "o"],
        ["export", "m", "--format", "dense", "--out", "o", "--base", name],
        ["export", "m", "--format", "dense", "--out", "o", "--adapter", f"{folders[0].name}={name}"],
        ["export", "m", "--format", "onnx", "--out", "o", "--onnx-base", name],
        ["verify", name],
        ["inspect", name],
        ["run", name],
        *(["run", file, *more] for file in recipes for more in ([], ["--check"])),
    ]
    if "\0" in name:  # which stands in no argument of a process, but in a recipe
        lines = [line for line in lines if line[0] == "run" and line[1] != name]
    ended = {" ".join(map(str, line)): run(*line) for line in lines}
    assert not [(line[-60:], repr(done)) for line, done in ended.items() if "Error: " not in done.stderr]
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_an_out_inside_an_input(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    own = copied(base, tmp_path / "base")
    done = run("mix", *inputs(own, folders), "--out", own / "mixture")
    assert done.exit_code == 1
    assert not (own / "mixture").exists()


def test_an_input_changed_since_the_mixture_was_made(zoo: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, folders = zoo
    own = copied(folders[0], tmp_path / "own")
    assert run("mix", *inputs(base, [own, folders[1]]), "--out", tmp_path / "m").exit_code == 0
    time.sleep(0.01)
    changed(own, lambda t: t[f"{KEY}.lora_B.weight"].mul_(2))
    out = tmp_path / "out"
    refused(run("export", tmp_path / "m", "--format", "dense", "--out", out), out, "own", "sha256", "--any-digest")
    assert run("export", tmp_path / "m", "--format", "dense", "--out", out, "--any-digest").exit_code == 0


def test_verify_finds_a_changed_byte_a_missing_file_and_a_foreign_one(
    zoo: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, folders = zoo
    assert run("mix", *inputs(base, folders), "--out", tmp_path / "m", "--task", "causal-lm").exit_code == 0
    out = tmp_path / "out"
    assert run("export", tmp_path / "m", "--format", "dense", "--out", out).exit_code == 0
    assert run("verify", "--quick", out).exit_code == 0
    file = out / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run("verify", "--quick", out)
    assert done.exit_code == 1
    assert "model.safetensors" in done.stderr
    file.unlink()
    assert "missing" in run("verify", "--quick", out).stderr
    assert run("verify", tmp_path / "m").exit_code == 1
