"""Which adapters can be mixed on a base: the others are named with the reason and left out."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fits import Zoo
from support.fits import zoo as zoo
from support.models import make_adapter, tiny_llama

from wlora_merge import find_adapters, mixable
from wlora_merge.errors import AdapterError, WloraMergeError, WloraMergeWarning
from wlora_merge.mixture.mix import mix
from wlora_merge.progress import Done, listening


@pytest.fixture
def many(llama_zoo: Callable[..., Any], tmp_path: Path) -> tuple[Path, Path]:
    """A base, and a folder with three adapters that fit, one for a wider base, a broken one, and one with a head."""
    base, folders = llama_zoo()
    for folder in folders:
        shutil.copytree(folder, tmp_path / "zoo" / folder.name)
    make_adapter(tiny_llama(hidden_size=64), tmp_path / "zoo" / "wide", 1, r=2, target_modules=["q_proj"])
    make_adapter(
        tiny_llama(), tmp_path / "zoo" / "head", 1, r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    (tmp_path / "zoo" / "broken").mkdir()
    (tmp_path / "zoo" / "broken" / "adapter_config.json").write_text("{")
    return base, tmp_path / "zoo"


def kept(base: Path, zoo: Path, **options: Any) -> tuple[list[str], dict[str, str]]:
    """Names of those that mix, and why the others do not."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", WloraMergeWarning)
        names = [a.name for a in mixable(base, find_adapters(zoo), **options)]
    said = [str(w.message) for w in found if issubclass(w.category, WloraMergeWarning)]
    return names, {text.split("'")[1]: text.partition(" is left out: ")[2] for text in said}


def test_those_that_cannot_be_mixed_are_left_out_each_with_its_reason(many: tuple[Path, Path]) -> None:
    names, left = kept(*many)
    assert names == ["a0", "a1", "a2"]
    assert set(left) == {"wide", "broken", "head"}
    assert "do not fit the base weight [32, 32]" in left["wide"]
    assert "adapter_config.json" in left["broken"]
    assert "say --modules-to-save NAME" in left["head"]
    assert kept(*many, modules_to_save="drop")[0] == ["a0", "a1", "a2", "head"]


def test_what_is_kept_is_what_mix_takes_with_the_same_options(many: tuple[Path, Path]) -> None:
    base, zoo = many
    for options in ({}, {"modules_to_save": "drop"}, {"modules_to_save": "head"}, {"modules_to_save": "mix"}):
        names, left = kept(base, zoo, **options)
        made = mix(base, [(name, zoo / name) for name in names], **options)
        assert made.adapter_names == names
        for name in left:
            with pytest.raises(WloraMergeError):
                mix(base, [(n, zoo / n) for n in [*names, name]], **options)


def test_opened_adapters_make_the_same_mixture_as_their_paths(many: tuple[Path, Path], tmp_path: Path) -> None:
    base, zoo = many
    with pytest.warns(WloraMergeWarning, match="left out"):
        mix(base, mixable(base, find_adapters(zoo)), tmp_path / "m1")
    mix(base, [(name, zoo / name) for name in ("a0", "a1", "a2")], tmp_path / "m2")
    for file in ("mixture.json", "mixture.safetensors"):
        assert (tmp_path / "m1" / file).read_bytes() == (tmp_path / "m2" / file).read_bytes()


def test_a_later_adapter_that_clashes_with_an_earlier_one_is_left_out_and_the_next_is_taken(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    for i, target in enumerate(("embed_tokens", "lm_head", "embed_tokens")):
        make_adapter(model, tmp_path / "zoo" / f"a{i}", i, r=2, target_modules=[target])
    file = tmp_path / "zoo" / "a1" / "adapter_model.safetensors"
    save_file({k.replace("lm_head", "model.embed_tokens"): v for k, v in load_file(file).items() if "lora_" in k}, file)
    names, left = kept(tmp_path / "base", tmp_path / "zoo")
    assert names == ["a0", "a2"]
    assert "is Linear here and Embedding in another" in left["a1"]


def test_where_none_fits_each_reason_is_told(many: tuple[Path, Path]) -> None:
    base, zoo = many
    for name in ("a0", "a1", "a2", "head"):
        shutil.rmtree(zoo / name)
    with pytest.raises(AdapterError, match="none of the 2 adapters can be mixed") as error:
        mixable(base, find_adapters(zoo))
    assert "wide: " in str(error.value)
    assert "broken: " in str(error.value)


def test_the_same_adapter_under_two_names_is_warned_of(many: tuple[Path, Path]) -> None:
    base, zoo = many
    same = {"one": zoo / "a0", "two": zoo / "a0", "other": zoo / "a1"}
    with pytest.warns(WloraMergeWarning, match="'one' and 'two' are the same .*: its weight counts double"):
        mix(base, list(same.items()))


def test_many_adapters_tell_how_far_they_are_and_read_no_weight_twice_to_say_that_it_is_not_zero(
    many: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wlora_merge.adapters import factors

    base, zoo = many
    told: list[Done] = []
    monkeypatch.setattr(factors, "read_tensor", lambda entry: pytest.fail(f"{entry.name} is read again"))
    with listening(told.append):
        mix(base, [zoo / name for name in ("a0", "a1", "a2")])
    ends = {done.what: done for done in told if done.unit == "adapters"}
    whats = [done.what for done in told]
    assert [what for what, _ in itertools.groupby(whats)][:2] == ["opening adapters", "reading adapters"]
    assert {what: (done.items, done.total_items) for what, done in ends.items()} == {
        "opening adapters": (3, 3),
        "reading adapters": (3, 3),
    }


def test_zeros_are_noted_while_a_file_is_read_as_they_are_when_it_is_read_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from wlora_merge.adapters.adapter import load_adapter
    from wlora_merge.adapters.factors import used_ranks

    folder = make_adapter(tiny_llama(), tmp_path / "a", 1, r=2, target_modules=["q_proj", "v_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.{}.lora_{}.weight"
    tensors[key.format("q_proj", "A")][0] = 0
    tensors[key.format("q_proj", "B")][:, 1] = 0
    save_file(tensors, folder / "adapter_model.safetensors")
    for name, known in load_adapter(folder).modules.items():
        again = bool(used_ranks(known.lora_A, 0) & used_ranks(known.lora_B, 1))
        assert known.is_zero is not again
        assert known.is_zero == (name == "model.layers.0.self_attn.q_proj")
    assert used_ranks(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 1) == 0b10


def test_trying_many_tells_of_itself_and_of_no_step_of_it(many: tuple[Path, Path]) -> None:
    base, zoo = many
    told: list[Done] = []
    with listening(told.append), pytest.warns(WloraMergeWarning, match="left out"):
        mixable(base, find_adapters(zoo))
    assert [what for what, _ in itertools.groupby(done.what for done in told)] == [
        "opening adapters", "trying adapters on the base",
    ]  # fmt: skip
    assert (told[-1].items, told[-1].total_items) == (5, 5)


def test_a_reason_that_holds_for_several_is_told_once(zoo: Zoo) -> None:
    base, folders, _ = zoo
    with pytest.raises(
        AdapterError, match=r"none of the 3 adapters can be mixed on this base \(a0 a1 a2: it carries"
    ) as error:
        mixable(base, folders)
    assert str(error.value).count("it carries its own copy") == 1
