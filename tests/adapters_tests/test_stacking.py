"""The adapters' changes side by side over one base: stacks, whole tensors, and what has no exact meaning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import EVERY_LINEAR, make_adapter, tiny_bert, tiny_llama

from wlora_merge.adapters.adapter import Adapter, load_adapter, load_adapters
from wlora_merge.adapters.deltas import ModuleDelta
from wlora_merge.adapters.factors import Factors, numbers
from wlora_merge.adapters.layouts import Layout
from wlora_merge.adapters.modules_to_save import join_changes, stack_tensors
from wlora_merge.adapters.stacking import ModuleChange, _refuse_overlapping_rows, stack
from wlora_merge.adapters.targets import Target, modules_of, tensors_of
from wlora_merge.errors import AdapterError, UnsupportedError, WloraMergeWarning
from wlora_merge.io.hub import Source
from wlora_merge.models.base_model import open_base

EMBED = "model.embed_tokens"


def adapter(
    name: str = "a", tensors: dict[str, torch.Tensor] | None = None, **modules: tuple[int, int, int]
) -> Adapter:
    """An adapter with factors of ones; its modules as name=(out, r, in)."""
    found = {m: Factors(torch.ones(r, i), torch.ones(o, r), 0.5, embedding=False) for m, (o, r, i) in modules.items()}
    return Adapter(name, Source(Path("/nowhere") / name), {}, found, tensors or {})


def square(name: str) -> Target:
    return Target(name, (4, 4))


def test_a_stack_holds_every_adapters_rows_in_mixture_order(llama_zoo: Callable[..., Any]) -> None:
    base, folders = llama_zoo()
    adapters = load_adapters(folders)
    deltas = {d.module: d for d in stack(adapters, modules_of(open_base(base)), model_type="llama")}
    assert set(deltas) == {m for a in adapters for m in a.modules}
    for module, delta in deltas.items():
        at = 0
        for n, each in enumerate(adapters):
            assert bool(delta.present[n]) == (module in each.modules)
            if module not in each.modules:
                continue
            factors, r = each.modules[module], each.modules[module].lora_A.shape[0]
            assert torch.equal(delta.lora_A[at : at + r], factors.lora_A)
            assert torch.equal(delta.lora_B[:, at : at + r], factors.lora_B)
            assert delta.adapter_index[at : at + r].tolist() == [n] * r
            assert delta.scaling[at : at + r].tolist() == [factors.scaling] * r
            at += r
        assert at == delta.R
        assert delta.layout is Layout.LINEAR


def test_modules_stand_in_natural_order() -> None:
    names = {"h.10.q": (4, 1, 4), "h.2.q": (4, 1, 4), "h.2.k": (4, 1, 4)}
    assert [d.module for d in stack([adapter(**names)], square, model_type="")] == ["h.2.k", "h.2.q", "h.10.q"]


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float32, torch.bfloat16], torch.float32),
        ([torch.float64, torch.float16], torch.float64),
    ],
)
def test_a_stack_is_as_wide_as_float32_or_the_widest_adapter(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    adapters = [adapter("a", q=(4, 2, 4)), adapter("b", q=(4, 2, 4))]
    for each, dtype in zip(adapters, dtypes, strict=True):
        each.modules["q"].stored_A = each.modules["q"].lora_A.to(dtype)
        each.modules["q"].stored_B = each.modules["q"].lora_B.to(dtype)
    (delta,) = stack(adapters, square, model_type="")
    assert delta.lora_A.dtype == delta.lora_B.dtype == expected


def test_a_target_module_that_the_base_lacks_is_refused_with_its_name() -> None:
    with pytest.raises(AdapterError, match=r"adapter 'a' \(/nowhere/a\): its target module 'q' is not in the base"):
        stack([adapter(q=(4, 2, 4))], lambda name: None, model_type="")


def test_an_adapter_of_a_wider_base_is_refused_with_its_shapes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    make_adapter(tiny_llama(hidden_size=64), tmp_path / "a", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"adapter 'a' .*q_proj.*\[2, 64\].*\[64, 2\].*\[32, 32\]"):
        stack([load_adapter(tmp_path / "a")], modules_of(open_base(tmp_path / "base")), model_type="llama")


def test_two_names_for_one_module_are_refused() -> None:
    with pytest.raises(AdapterError, match="two of its target modules are 'q'"):
        stack([adapter(**{"q": (4, 2, 4), "x.q": (4, 2, 4)})], lambda name: Target("q", (4, 4)), model_type="")


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("whole_first", [True, False])
def test_a_tensor_that_changes_as_a_whole_and_in_some_rows_is_refused(start: int, whole_first: bool) -> None:
    def change(n: int, start: int | None, rows: int) -> ModuleChange:
        factors = Factors(torch.ones(1, 4), torch.ones(rows, 1), 1.0, embedding=False)
        return ModuleChange(n, "experts", (rows, 4), factors, Layout.LINEAR, start=start)

    both = [change(0, None, 12), change(1, start, 4)]
    ordered = both if whole_first else both[::-1]
    with pytest.raises(UnsupportedError, match="one adapter changes it as a whole, and another rows of it"):
        _refuse_overlapping_rows({("experts", each.start): [each] for each in ordered})
    _refuse_overlapping_rows({("experts", at): [change(0, at, 4)] for at in (0, 4, 8)})


def test_one_module_with_a_zero_delta_is_a_warning() -> None:
    each = adapter(q=(4, 2, 4), k=(4, 2, 4))
    each.modules["k"].lora_B.zero_()
    with pytest.warns(WloraMergeWarning, match="the delta weight of 'k' is zero"):
        assert len(stack([each], square, model_type="")) == 2


# ----------------------------------------------------------------------------------------------- tied embeddings


def embedding_zoo(tmp_path: Path, targets: list[str], **config: Any) -> tuple[Path, Path]:
    model = tiny_llama(**config)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", make_adapter(model, tmp_path / "a", 1, r=2, target_modules=targets)


@pytest.mark.filterwarnings("ignore:.*(tie|tied|embedding).*")
def test_other_modules_of_a_tied_model_are_stacked(tmp_path: Path) -> None:
    base, folder = embedding_zoo(tmp_path, EVERY_LINEAR, tie_word_embeddings=True)
    assert len(stack([load_adapter(folder)], modules_of(open_base(base)), model_type="llama")) == 14


@pytest.mark.filterwarnings("ignore:.*embedding.*")
def test_an_embedding_and_an_output_embedding_that_are_not_tied_are_stacked(tmp_path: Path) -> None:
    base, folder = embedding_zoo(tmp_path, ["embed_tokens", "lm_head"])
    deltas = stack([load_adapter(folder)], modules_of(open_base(base)), model_type="llama")
    assert {d.module: d.layout for d in deltas} == {EMBED: Layout.EMBEDDING, "lm_head": Layout.LINEAR}


def test_the_embedding_of_a_model_without_an_output_embedding_is_stacked(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    folder = make_adapter(model, tmp_path / "a", 1, r=2, target_modules=["word_embeddings"])
    (delta,) = stack([load_adapter(folder)], modules_of(open_base(tmp_path / "base")), model_type="bert")
    assert delta.layout is Layout.EMBEDDING


# -------------------------------------------------------------------------------- the copy of a base embedding


@pytest.mark.filterwarnings("ignore:.*embedding.*")
def test_the_copy_of_the_base_embedding_that_peft_saves_is_accepted_where_it_is_equal(tmp_path: Path) -> None:
    base, folder = embedding_zoo(tmp_path, ["embed_tokens"])
    found = load_adapter(folder)
    assert set(found.tensors) == {f"{EMBED}.weight"}
    for choice in (None, "a", "mix", "drop"):
        assert stack_tensors([found], choice, (), tensors_of(open_base(base))) == ([], {})


@pytest.mark.parametrize("choice", [None, "a", "mix", "drop"])
@pytest.mark.filterwarnings("ignore:.*embedding.*")
def test_a_copy_of_the_base_embedding_that_differs_is_a_delta_whatever_the_choice(
    choice: str | None, tmp_path: Path
) -> None:
    base, folder = embedding_zoo(tmp_path, ["embed_tokens"])
    found = load_adapter(folder)
    find = tensors_of(open_base(base))
    copy = found.tensors[f"{EMBED}.weight"] = numbers(found.tensors[f"{EMBED}.weight"])
    copy.view(torch.int32)[3, 3] ^= 1
    ((delta,), taken) = stack_tensors([found], choice, (), find)
    assert (delta.tensor, taken) == (f"{EMBED}.weight", {})
    found.tensors[f"{EMBED}.weight"] = torch.cat([copy, copy[:1]])
    with pytest.raises(UnsupportedError, match=f"its copy of tensor '{EMBED}.weight' .*resized"):
        stack_tensors([found], choice, (), find)


# ------------------------------------------------------------------------------------------------- whole tensors


def heads() -> list[Adapter]:
    return [adapter(n, {"classifier.weight": torch.full((3, 4), float(i))}) for i, n in enumerate("ab", 1)]


def classifier(name: str) -> Target:
    return Target(name, (3, 4))


def test_a_head_that_nobody_asked_for_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"adapter 'a' .*'classifier.weight': say --modules-to-save"):
        stack_tensors(heads(), None, (), classifier)


def test_a_head_that_a_trained_one_replaces_is_left_out() -> None:
    assert stack_tensors(heads(), None, ["classifier.weight"], classifier) == ([], {})


def test_one_adapters_head_is_taken_as_it_is() -> None:
    deltas, taken = stack_tensors(heads(), "b", (), classifier)
    assert deltas == []
    assert torch.equal(taken["classifier.weight"], torch.full((3, 4), 2.0))


def test_heads_are_mixed_as_deltas_against_the_bases() -> None:
    both = [*heads(), adapter("c", q=(4, 2, 4))]
    ((delta,), taken) = stack_tensors(both, "mix", (), classifier)
    assert taken == {}
    assert (delta.tensor, delta.module, delta.shape, delta.n_adapters) == ("classifier.weight", "classifier", (3, 4), 3)
    assert delta.present.tolist() == [True, True, False]


def test_heads_are_dropped() -> None:
    assert stack_tensors(heads(), "drop", (), classifier) == ([], {})


@pytest.mark.parametrize(
    ("found", "what"), [(None, "is not in the base model"), (Target("x", (5, 4)), r"is \[5, 4\] there")]
)
def test_heads_that_the_base_lacks_or_has_in_another_shape_cannot_be_mixed(found: Target | None, what: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{what}.*cannot be mixed"):
        stack_tensors(heads(), "mix", (), lambda name: found)


def test_a_choice_that_is_no_adapter_is_refused_with_those_there_are() -> None:
    with pytest.raises(AdapterError, match="--modules-to-save x: expected drop, mix, or one of a, b"):
        stack_tensors(heads(), "x", (), classifier)


def test_a_tensor_that_the_base_calls_otherwise_is_not_taken_under_a_second_name() -> None:
    with pytest.raises(UnsupportedError, match=r"is called 'score\.weight' by the base"):
        stack_tensors(heads(), "a", (), lambda name: Target("score.weight", (3, 4)))


def test_a_tensor_that_changes_and_is_replaced_is_refused() -> None:
    deltas: list[ModuleDelta] = stack([adapter(q=(4, 2, 4))], square, model_type="")
    with pytest.raises(UnsupportedError, match=r"tensor 'q\.weight'"):
        join_changes(deltas, [], ["model.q.weight"], lambda name: Target("q.weight", (4, 4)))
    assert join_changes(deltas, [], ["classifier.weight"], lambda name: None) == deltas


def test_a_weight_that_changes_by_a_lora_and_as_a_whole_belongs_to_all_those_adapters() -> None:
    both = [adapter(q=(4, 2, 4)), adapter("b", {"q.weight": torch.ones(4, 4)}), adapter("c", k=(4, 2, 4))]
    tensors, _ = stack_tensors(both, "mix", (), square)
    changes = {
        (type(d).__name__, d.module): d for d in join_changes(stack(both, square, model_type=""), tensors, [], square)
    }
    for kind in ("ModuleDelta", "TensorDelta"):
        assert changes[kind, "q"].present.tolist() == [True, True, False]
    assert changes["ModuleDelta", "k"].present.tolist() == [False, False, True]


def test_a_base_finds_its_modules_and_tensors_under_either_spelling(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    base = open_base(tmp_path)
    name = "encoder.layer.0.output.dense"
    assert modules_of(base)(f"bert.{name}") == Target(name, (32, 48))
    found = tensors_of(base)(f"bert.{name}.bias")
    assert found == Target(f"{name}.bias", (32,))
    assert found.read is not None
    assert torch.equal(found.read(), load_file(tmp_path / "model.safetensors")[f"{name}.bias"])
    assert modules_of(base)("classifier") is None


def test_a_stack_of_a_checkpoint_without_the_prefix_has_the_files_names(tmp_path: Path) -> None:
    from transformers import BertForSequenceClassification

    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    wrapped = BertForSequenceClassification(model.config)
    make_adapter(wrapped, tmp_path / "a", 1, r=2, target_modules=["query"])
    deltas = stack([load_adapter(tmp_path / "a")], modules_of(open_base(tmp_path / "base")), model_type="bert")
    assert [d.module for d in deltas] == [f"encoder.layer.{i}.attention.self.query" for i in range(2)]


def test_a_half_precision_copy_of_a_half_precision_base_is_equal_to_it(tmp_path: Path) -> None:
    embedding = torch.randn(4, 4).to(torch.bfloat16)
    save_file({"e.weight": embedding}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    each = replace(adapter(e=(4, 2, 4)), tensors={"e.weight": embedding.float()})
    assert stack_tensors([each], None, (), tensors_of(open_base(tmp_path))) == ([], {})
