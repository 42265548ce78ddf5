"""Every message in docs/troubleshooting.md, met on the command line as a user meets it; CASES are in the order of the page."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support.imports import heavy_imports
from support.models import make_adapter, tiny_bert, tiny_llama
from support.pages import PAGES, blocks, make_place

from wlora_merge.cli.main import main

PAGE = PAGES["docs/troubleshooting.md"]
FIT = "fit --base ./base --adapter a=./a --adapter b=./b --out new"
WITH = "mix --base ./base --adapter b=./b --out new --adapter a=./"
CASES = [
    "mix --base ./bsae --adapter a=./a --out new",
    "mix --base org/name --adapter a=./a --out new",
    "fit --base ./base --adapter a=./a --data shots.jsonl --task causal-lm --out new",
    "mix --base ./picklebase --adapter a=./a --out new",
    *(
        WITH + name
        for name in ("pickle", "base", "ia3", "wide", "bert", "pissa", "strange", "head", "vocab", "zero", "cut")
    ),
    f"{FIT} --data reviews.csv --task text-classification",
    f"{FIT} --data qa.csv --task causal-lm",
    f"{FIT} --data broken.jsonl --task causal-lm",
    f"{FIT} --data quote.csv --task text-classification",
    f"{FIT} --data same.csv --task text-classification",
    f"{FIT} --data shots.jsonl --eval-data shots.jsonl --task causal-lm",
    "mix --base ./base --adapter a=./a --out mixture",
    "export over-gptq --format dense --out new",
    "export with-dora --format lora --out new",
    "export moved/mixture --format dense --out new",
    "export changed/mixture --format dense --out new",
    "export mixture --format lora --rank 600 --for vllm --out new",
    "verify mixture",
    "verify served",
    "run recipe.yaml --set fit.max_stps=3 --check",
]


def copied(place: Path, name: str, like: str) -> Path:
    shutil.copytree(place / like, place / name)
    return place / name


def with_config(folder: Path, **changes: Any) -> None:
    (file,) = [f for f in (folder / "adapter_config.json", folder / "config.json") if f.exists()]
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def done(*words: str) -> None:
    result = CliRunner().invoke(main, list(words))
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stand-ins of the pages, and beside them everything that is wrong in one way."""
    root = make_place(tmp_path_factory.mktemp("trouble"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_HUB_OFFLINE", "1")
        make_broken_adapters(root)
        make_broken_data(root)
        make_broken_exports(root)
        yield root


def make_broken_adapters(place: Path) -> None:
    pickles = copied(place, "picklebase", "base")
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    pickle = copied(place, "pickle", "a")
    (pickle / "adapter_model.safetensors").rename(pickle / "adapter_model.bin")
    with_config(copied(place, "ia3", "a"), peft_type="IA3")
    with_config(copied(place, "pissa", "a"), init_lora_weights="pissa")
    with_config(copied(place, "strange", "a"), some_new_field=3)
    model, of_q = tiny_llama(vocab_size=16), {"r": 2, "target_modules": ["q_proj"]}
    make_adapter(tiny_llama(vocab_size=16, hidden_size=64), place / "wide", 3, **of_q)
    make_adapter(tiny_bert(), place / "bert", 3, r=2, target_modules=["query"])
    make_adapter(model, place / "head", 3, **of_q, modules_to_save=["lm_head"])
    make_adapter(tiny_llama(vocab_size=24), place / "vocab", 3, **of_q, modules_to_save=["lm_head"])
    make_adapter(model, place / "dora", 3, **of_q, use_dora=True)
    make_adapter(model, place / "zero", 3, scale=0.0, **of_q)
    weights = copied(place, "cut", "a") / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def make_broken_data(place: Path) -> None:
    (place / "qa.csv").write_text("question,passage,completion\na gem,x y,z\na bore,x,z\n")
    (place / "broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (place / "quote.csv").write_text('text,label\n"a gem,x\na bore,y\n')
    (place / "same.csv").write_text("text,label\na gem,x\na bore,x\n")


def make_broken_exports(place: Path) -> None:
    done("mix", "--base", "./base", "--adapter", "a=./a", "--adapter", "b=./b", "--out", "mixture")
    done("export", "mixture", "--format", "dense", "--out", "served")
    config = place / "served" / "config.json"
    config.write_text(config.read_text() + " ")
    with_config(copied(place, "gptq", "base"), quantization_config={"quant_method": "gptq", "bits": 4})
    done("mix", "--base", "./gptq", "--adapter", "a=./a", "--out", "over-gptq")
    done("mix", "--base", "./base", "--adapter", "a=./dora", "--out", "with-dora")
    for name in ("moved", "changed"):
        (place / name).mkdir()
        base, adapter = copied(place, f"{name}/base", "base"), copied(place, f"{name}/a", "a")
        done("mix", "--base", str(base), "--adapter", f"a={adapter}", "--out", f"{name}/mixture")
    shutil.rmtree(place / "moved" / "base")
    with_config(place / "changed" / "a", lora_alpha=8)


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_a_message_is_the_one_that_the_page_explains(place: Path, number: int) -> None:
    result = CliRunner().invoke(main, shlex.split(CASES[number]))
    assert result.exit_code in (1, 2), result.output
    message = blocks(PAGE, "text")[number].strip()
    assert message in re.sub(rf"{re.escape(str(place))}(/moved|/changed)?(?=/)", "PLACE", result.output)


NEEDED = {
    "bert": {"torch", "transformers", "scipy", "accelerate"},  # classes may know the module by another name
    "zero": {"torch"},  # all numbers are read
    "same.csv": {"datasets"},
    "--eval-data": {"datasets"},
    "with-dora": {"torch"},  # it is told when the LoRA is written
    "--for vllm": {"torch", "transformers"},  # classes tell which task the model is for
}
"""The mistakes that are told by more than headers, configs, records and data files -> what they may import; others nothing."""


def allowed(case: str) -> set[str]:
    """The packages that a mistake may import."""
    return set().union(*(modules for part, modules in NEEDED.items() if part in case))


@pytest.fixture(scope="module")
def without_imports(place: Path) -> dict[str, tuple[int, set[str]]]:
    """What those that may import nothing do, one after the other: the first that imports something spoils all after it."""
    cases = [case for case in CASES if not allowed(case)]
    return dict(zip(cases, heavy_imports([shlex.split(case) for case in cases], place), strict=True))


@pytest.mark.parametrize("number", range(len(CASES)), ids=CASES)
def test_a_mistake_is_refused_before_what_it_does_not_need_is_imported(
    place: Path, without_imports: dict[str, tuple[int, set[str]]], number: int
) -> None:
    case = CASES[number]
    code, imported = without_imports.get(case) or heavy_imports([shlex.split(case)], place)[0]
    usage = case.startswith(("fit --base ./base --adapter a=./a --data", "run"))
    assert code == (2 if usage else 1)
    assert imported <= allowed(case)


def test_twenty_mistakes_need_neither_torch_nor_transformers() -> None:
    heavy = [part for part, modules in NEEDED.items() if "torch" in modules]
    assert len([case for case in CASES if not any(part in case for part in heavy)]) >= 20


def test_every_message_of_the_page_is_met() -> None:
    assert len(blocks(PAGE, "text")) == len(CASES) >= 20
