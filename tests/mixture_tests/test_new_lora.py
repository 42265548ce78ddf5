"""A LoRA that a fit trains from zero beside the mixture: what PEFT computes with it, what stays frozen, and where it is kept."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fits import Zoo, fitted
from support.fits import zoo as zoo
from support.models import (
    EVERY_LINEAR,
    assert_equal_but_for_rounding,
    make_adapter,
    peft_changes,
    peft_sum,
    tiny_bert,
    tiny_llama,
)
from support.shots import save_tokenizer

from wlora_merge.adapters.adapter import load_adapter, load_adapters
from wlora_merge.constants import NEW_FOLDER, PARAMETER
from wlora_merge.errors import MixtureError, UnsupportedError
from wlora_merge.exporters.export import export
from wlora_merge.exporters.verify import verify
from wlora_merge.fit_options import fit_options
from wlora_merge.mixture.attach import attach, attach_loaded, detach
from wlora_merge.mixture.mixture import Mixture
from wlora_merge.mixture.new_lora import new_files, new_targets, place_new
from wlora_merge.training.fit import fit


def with_new(zoo: Zoo, out: Path | None = None, **options: Any) -> Mixture:
    return fitted(zoo, out, **({"folds": 0, "new_adapter": 4, "max_steps": 8} | options))


def classifier(zoo: Zoo) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(zoo[0], num_labels=2).eval()


def attached(model: Any, zoo: Zoo) -> None:
    """Attach the adapters to a model whose new head stays as it is."""
    attach_loaded(model, load_adapters(zoo[1]), None, modules_to_save="drop")


def checked(zoo: Zoo, folder: Path) -> float:
    """Between an export and the unmerged mixture; where the new adapter lies is remembered."""
    base, folders, _ = zoo
    done = verify(folder, base=base, adapters=[f"{f.name}={f}" for f in folders])
    assert done.largest_difference is not None
    return done.largest_difference


@pytest.mark.parametrize("normalize", ["none", "all"])
def test_the_dense_export_is_the_sum_of_pefts_merges_the_new_adapters_among_them(
    zoo: Zoo, tmp_path: Path, normalize: str
) -> None:
    mixture = with_new(zoo, tmp_path / "m", normalize=normalize)
    assert mixture.adapter_names == ["a0", "a1", "a2", "new"]
    assert mixture.normalize == "none"
    weights = mixture.mixture_weights
    assert torch.equal(weights[:, 3], torch.ones(len(weights)))
    if normalize == "all":
        given = weights[:, :3].sum(1)[weights[:, :3].any(1)]  # the new adapter alone changes the other modules
        assert len(given) == 4
        assert torch.allclose(given, torch.ones(4))
    model, new = classifier(zoo), tmp_path / "m" / NEW_FOLDER
    assert any(change.abs().max() > 1e-4 for change in peft_changes(model, new).values())
    export(tmp_path / "m", "dense", tmp_path / "dense")
    found = load_file(tmp_path / "dense" / "model.safetensors")
    head = {name: found.pop(name) for name in list(found) if name.startswith("classifier.")}
    assert {name: tuple(t.shape) for name, t in head.items()} == {"classifier.weight": (2, 32), "classifier.bias": (2,)}
    for group, modules in mixture.groups.items():
        row = list(mixture.groups).index(group)
        expected = peft_sum(model, [*zoo[1], new], weights[row].tolist())
        names = [f"bert.{module}.weight" for module in modules]
        assert_equal_but_for_rounding({n: found[n] for n in names}, {n: expected[n] for n in names})
    for kind in ("dense", "lora"):
        if kind == "lora":
            export(tmp_path / "m", kind, tmp_path / kind)
        assert checked(zoo, tmp_path / kind) < 1e-5


def test_the_given_adapters_and_the_base_stay_frozen(zoo: Zoo) -> None:
    model = classifier(zoo)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attached(model, zoo)
    stacks = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parameters = place_new(model, 4, seed=0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and name != PARAMETER]
    assert len(trained) == len(parameters) == 8
    assert all(".wlora_new.lora_" in name for name in trained)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for _ in range(2):  # in the first step lora_B is zero, and lora_A gets no gradient
        optimizer.zero_grad()
        model(input_ids=torch.arange(5, 15).view(2, 5)).logits.square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
    assert all(torch.equal(buffer, stacks[name]) for name, buffer in model.named_buffers())
    place_new(model, 0, seed=0)
    detach(model)
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_it_starts_from_the_mixture_alone_and_the_same_seed_gives_the_same_files(zoo: Zoo) -> None:
    model, ids = classifier(zoo), torch.arange(5, 15).view(2, 5)
    attached(model, zoo)
    with torch.no_grad():
        alone = model(input_ids=ids).logits
        place_new(model, 4, seed=3)
        assert torch.equal(model(input_ids=ids).logits, alone)
    first = new_files(model, "base")
    place_new(model, 4, seed=3)
    assert new_files(model, "base") == first
    place_new(model, 4, seed=4)
    assert new_files(model, "base") != first
    detach(model)
    assert not any("wlora" in name for name, _ in model.named_modules())


def test_half_way_the_new_adapters_change_is_half_of_what_was_trained_and_all_else_as_it_was(
    zoo: Zoo, tmp_path: Path
) -> None:
    for share in (1.0, 0.5):
        mixture = with_new(zoo, tmp_path / f"{share}", new_adapter_interpolation=share)
        assert ("given, 0.5 of the way" in mixture.metrics["note"]) == (share == 0.5)
    (whole, of_whole), (half, of_half) = (
        (
            peft_changes(classifier(zoo), tmp_path / f"{s}" / NEW_FOLDER),
            load_file(tmp_path / f"{s}/mixture.safetensors"),
        )
        for s in (1.0, 0.5)
    )
    assert all(torch.allclose(half[name], whole[name] / 2, rtol=1e-9, atol=1e-12) for name in whole)
    same = [name for name in of_whole if not name.startswith("head.")]  # which is solved on what it sees
    assert all(torch.equal(of_half[name], of_whole[name]) for name in same)


def test_a_mixture_folder_keeps_its_new_adapter_wherever_it_is_moved(zoo: Zoo, tmp_path: Path) -> None:
    in_memory = with_new(zoo)
    export(in_memory, "dense", tmp_path / "from memory")
    with_new(zoo, tmp_path / "m")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "m", tmp_path / "elsewhere" / "m")
    moved = Mixture.load(tmp_path / "elsewhere" / "m")
    assert moved.adapters[3].source == str(tmp_path / "elsewhere" / "m" / NEW_FOLDER)
    assert load_adapter(moved.adapters[3].source).digests() == moved.adapters[3].sha256
    base, folders, _ = zoo
    export(
        moved, "dense", tmp_path / "from disk", base=base, adapters=[f"{f.name}={f}" for f in folders]
    )  # relative paths have moved, too
    for name in ("model.safetensors", "config.json", "README.md", "wlora_merge.json"):
        assert (tmp_path / "from disk" / name).read_bytes() == (tmp_path / "from memory" / name).read_bytes(), name
    in_memory.save(tmp_path / "saved later")
    again = Mixture.load(tmp_path / "saved later")
    assert torch.equal(again.mixture_weights, moved.mixture_weights)
    card = (tmp_path / "from disk" / "README.md").read_text()
    assert "a new adapter of rank 4 (`new`)" in card
    assert "--adapter new=" not in card


def test_a_mixture_with_a_new_adapter_starts_a_fit_that_goes_on_without_it_or_with_it(zoo: Zoo, tmp_path: Path) -> None:
    base, folders, shots = zoo
    with_new(zoo, tmp_path / "m")
    options = {"folds": 0, "max_steps": 1, "initial_logits": str(tmp_path / "m"), "learning_rate": 1e-9}
    given = [*folders, tmp_path / "m" / NEW_FOLDER]
    again = fit(base, [*folders, ("new", given[-1])], shots, "text-classification", **options, new_adapter=0)
    assert torch.allclose(again.mixture_weights, Mixture.load(tmp_path / "m").mixture_weights, atol=1e-6)
    two = fit(base, [*folders, ("new", given[-1])], shots, "text-classification", **options, new_adapter=2)
    assert two.adapter_names == ["a0", "a1", "a2", "new", "new-2"]


def test_gpt2s_conv1d_gets_a_new_adapter_that_peft_merges_as_the_export_does(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [
        make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        for i in range(2)
    ]
    (tmp_path / "shots.jsonl").write_text(
        '{"prompt": "a b", "completion": " c"}\n{"prompt": "b c", "completion": " d"}\n'
    )
    mixture = fit(
        tmp_path / "base",
        folders,
        tmp_path / "shots.jsonl",
        "causal-lm",
        tmp_path / "m",
        folds=0,
        max_steps=3,
        new_adapter=2,
    )
    export(tmp_path / "m", "dense", tmp_path / "dense")
    found, new = load_file(tmp_path / "dense" / "model.safetensors"), tmp_path / "m" / NEW_FOLDER
    assert peft_changes(model, new)
    for row, modules in enumerate(mixture.groups.values()):
        expected = peft_sum(model, [*folders, new], mixture.mixture_weights[row].tolist())
        names = {f"{module}.weight": f"{module}.weight" for module in modules}
        ours = {n: found[n if n in found else n.removeprefix("transformer.")] for n in names}
        theirs = {n: expected[n if n in expected else f"transformer.{n}"] for n in names}
        assert_equal_but_for_rounding(ours, theirs)


def test_where_no_linear_layer_is_changed_none_is_tried_and_one_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    model = tiny_bert()
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["word_embeddings"]) for i in range(2)]
    (tmp_path / "shots.csv").write_text("text,label\na,x\nb,x\nc,y\nd,y\n")
    given: tuple[Any, ...] = (tmp_path / "base", folders, tmp_path / "shots.csv", "text-classification")
    mixture = fit(*given, max_steps=2, folds=2, settings=2)
    assert not any("new adapter" in name for name in mixture.metrics["settings"])
    with pytest.raises(UnsupportedError, match="linear layers that the given adapters change"):
        fit(*given, max_steps=2, folds=0, new_adapter=2)


@pytest.mark.parametrize("options", [{"method": "uniform"}, {"normalize": "present"}])
def test_a_new_adapter_needs_learned_weights_that_can_be_made_free_ones(options: dict[str, Any]) -> None:
    with pytest.raises(MixtureError, match=r"leave (it|--new-adapter 8) out"):
        fit_options({"new_adapter": 8, **options})
    fit_options({"new_adapter": 0, **options})


def test_the_folds_compare_a_new_adapter_and_the_note_says_that_it_was_kept(zoo: Zoo) -> None:
    mixture = fitted(zoo, new_adapter=4, settings=1)
    (setting,) = mixture.metrics["settings"]
    assert setting.startswith("module, normalize none, pull 0, new adapter of rank 4")
    assert mixture.metrics["chosen"]["new_adapter"] == 4
    assert "With a new adapter of rank 4" in mixture.metrics["note"]
    without = fitted(zoo, new_adapter=0, settings=1)
    assert without.adapter_names == ["a0", "a1", "a2"]
    assert "new adapter" not in without.metrics["note"]


def test_one_shot_of_each_class_is_enough_where_the_base_knows_the_classes_and_four_there_are(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    names = ["north", "east", "south", "west"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    config = BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, **labels
    )
    model = BertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    folders = [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=["query", "value"]) for i in range(2)]
    (tmp_path / "shots.csv").write_text("text,label\n" + "".join(f"w{i} w9,{name}\n" for i, name in enumerate(names)))
    mixture = fit(tmp_path / "base", folders, tmp_path / "shots.csv", "text-classification", max_steps=2)
    assert mixture.head == {}
    assert mixture.metrics["chosen"] == {
        "granularity": "module", "normalize": "all", "pull": 0.0, "new_adapter": 8, "interpolation": 1.0,
        "new_adapter_interpolation": 0.5, "steps": 2,
    }  # fmt: skip
    assert mixture.metrics["note"].startswith("Not estimated: nothing was held out.")
    assert mixture.mixture_weights[:, :2].sum(1).tolist() == pytest.approx([1.0] * len(mixture.groups))


def test_a_seed_draws_the_new_adapter_in_the_order_of_the_models_modules(tmp_path: Path) -> None:
    """In another order the same seed would give another fit: q_proj stands before k_proj in a Llama."""
    model = tiny_llama()
    attach(model, [make_adapter(model, tmp_path / f"a{i}", i, r=2, target_modules=EVERY_LINEAR) for i in range(2)])
    order = [name for name, _ in model.named_modules() if name.endswith("_proj")]
    assert new_targets(model) == order
    lora_A = place_new(model, 2, seed=0)[0]
    assert lora_A is dict(model.wlora.new)[order[0]].lora_A
    assert order[0].endswith("q_proj")
