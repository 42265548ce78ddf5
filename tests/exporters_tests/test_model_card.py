"""The model card: metadata that the hub takes, the weights, the load line."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from jinja2 import Environment, Template, meta
from support.cards import card, mixture

from wlora_merge.data.tasks import TASKS, get_task
from wlora_merge.exporters.model_card import TEMPLATE
from wlora_merge.exporters.serving import Exported
from wlora_merge.fit_options import FitOptions
from wlora_merge.mixture.mixture import InputRef

FORMATS = ("dense", "lora", "onnx")


def inputs(root: Path, *fronts: str | None) -> tuple[Path, ...]:
    """Folders whose cards have these front matters; None for a folder without a card."""
    found = []
    for i, front in enumerate(fronts):
        (root / str(i)).mkdir()
        if front is not None:
            (root / str(i) / "README.md").write_text(front)
        found.append(root / str(i))
    return tuple(found)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("task", TASKS)
def test_every_card_is_one_that_the_hub_reads(tmp_path: Path, task: str, kind: str) -> None:
    data = card(tmp_path, mixture(task=task), kind).data
    assert data.pipeline_tag == get_task(task).pipeline_tag
    assert data.library_name == {"dense": "transformers", "lora": "peft", "onnx": "transformers.js"}[kind]
    assert {"merge", "lora", "wlora-merge"} <= set(data.tags)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_has_a_tag_and_a_class(task: str) -> None:
    assert get_task(task).pipeline_tag
    assert get_task(task).auto_class().__name__.startswith("AutoModel")


def test_a_mixture_without_a_task_has_a_card_without_a_tag(tmp_path: Path) -> None:
    assert card(tmp_path, mixture(task=None)).data.pipeline_tag is None


@pytest.mark.parametrize(
    ("kind", "base", "relation"),
    [
        ("dense", ["org/base", "org/a", "org/b"], "merge"),
        ("onnx", ["org/base", "org/a", "org/b"], "merge"),
        ("lora", ["org/base"], "adapter"),
    ],
)
def test_hub_ids_are_listed_as_base_models(tmp_path: Path, kind: str, base: list[str], relation: str) -> None:
    data = card(tmp_path, mixture(), kind).data
    assert data.base_model == base
    assert data.to_dict()["base_model_relation"] == relation


@pytest.mark.parametrize("name", ["base", "/models/org/base", "./org/base"])
def test_local_folders_are_not_listed_as_base_models(tmp_path: Path, name: str) -> None:
    data = card(tmp_path, mixture(("/here/a", "/here/b")), base_name=name).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data


def test_a_license_that_all_inputs_name_is_the_cards(tmp_path: Path) -> None:
    folders = inputs(tmp_path, "---\nlicense: apache-2.0\n---\n", '---\ntags: [x]\nlicense: "apache-2.0"\n---\n', None)
    found = card(tmp_path, mixture(), folders=folders)
    assert found.data.license == "apache-2.0"
    assert "Licenses disagree" not in found.text


def test_licenses_that_disagree_are_named_and_none_is_chosen(tmp_path: Path) -> None:
    folders = inputs(tmp_path, "---\nlicense: apache-2.0\n---\n", "---\nlicense: llama3\n---\n", None)
    found = card(tmp_path, mixture(), folders=folders)
    assert found.data.license is None
    assert "**Licenses disagree**: the inputs name apache-2.0, llama3." in found.text


@pytest.mark.parametrize(
    "front",
    [
        "# A model\nlicense: mit\n",
        "---\ntags: x\n---\nlicense: mit\n",
        "---\nlicense: [\n---\n",
        "---\n- a\n---\n",
        "",
        "---\n",
    ],
)
def test_a_license_is_read_from_the_front_matter_alone_and_a_broken_one_says_nothing(
    tmp_path: Path, front: str
) -> None:
    assert card(tmp_path, mixture(), folders=inputs(tmp_path, front)).data.license is None


def test_the_weights_stand_in_a_table(tmp_path: Path) -> None:
    text = card(tmp_path, mixture()).text
    assert "| a | 0.6250 | 0.5000 | 0.7500 |" in text
    assert "| b | 0.3750 | 0.2500 | 0.5000 |" in text
    assert "Granularity `module` (2 groups)" in text


def test_held_out_metrics_stand_in_a_table_where_there_are_any(tmp_path: Path) -> None:
    metrics = {
        "candidates": {"base": {"loss": 1.5}, "learned": {"loss": 0.25, "accuracy": 0.5}},
        "note": "On 8 examples.",
    }
    text = card(tmp_path, mixture(metrics=metrics)).text
    assert "On 8 examples." in text
    assert "## Metrics: on the shots themselves" in text
    held = mixture(metrics=metrics | {"held_out": {"examples": 8}})
    assert "## Metrics: held out" in card(tmp_path, held).text
    assert "| | accuracy | loss |" in text
    assert "| base |  | 1.5000 |" in text
    assert "## Metrics" not in card(tmp_path, mixture()).text


def test_a_lora_with_a_trained_head_shows_the_load_line_with_its_labels(tmp_path: Path) -> None:
    labels = {"id2label": {"0": "a", "1": "b", "2": "c"}}
    made = mixture(task="text-classification", head={"classifier.weight": torch.ones(3, 4)}, config=labels)
    exported = Exported("lora", "text-classification", "BertForSequenceClassification", rank=4)
    text = card(tmp_path, made, "lora", exported=exported).text
    given = "id2label=id2label, label2id={v: k for k, v in id2label.items()}"
    assert "id2label = {0: 'a', 1: 'b', 2: 'c'}" in text
    assert f'AutoModelForSequenceClassification.from_pretrained("org/base", {given})' in text
    assert f'AutoPeftModelForSequenceClassification.from_pretrained("path/to/this/folder", {given})' in text
    assert "vllm" not in text
    text = card(tmp_path, made, "lora", exported=replace(exported, architecture="LlamaForSequenceClassification")).text
    assert "--max-lora-rank 8 --lora-modules mixture=path/to/this/folder --runner pooling --hf-overrides '{" in text


@pytest.mark.parametrize("task", [t for t in TASKS if t != "image-classification"])
def test_every_class_that_a_card_names_exists(tmp_path: Path, task: str) -> None:
    import re

    import peft
    import transformers

    text = card(tmp_path, mixture(task=task), "lora").text
    names = re.findall(r"Auto\w+", text)
    assert names
    for name in names:
        assert hasattr(peft if name.startswith("AutoPeft") else transformers, name)


def test_the_same_card_gives_the_same_bytes_wherever_the_adapters_lie(tmp_path: Path) -> None:
    cards = []
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        card(tmp_path / name, mixture((f"/{name}/a", f"/{name}/b")), base_name="base")
        cards.append((tmp_path / name / "README.md").read_bytes())
    assert cards[0] == cards[1]


def test_the_data_sets_of_the_adapters_stand_in_the_metadata_and_every_license_with_its_owner(tmp_path: Path) -> None:
    fronts = (
        "---\nlicense: mit\ndatasets: [base/pile]\n---\n",
        "---\nlicense: apache-2.0\ndatasets: [org/one, squad]\n---\n",
        "---\ndatasets: squad\n---\n",
    )
    found = card(tmp_path, mixture(), folders=inputs(tmp_path, *fronts))
    assert found.data.datasets == ["org/one", "squad"]
    assert "- org/base: mit\n- a: apache-2.0\n- 1 of 3 inputs name none" in found.text


def test_a_metric_that_the_hub_knows_stands_in_the_metadata(tmp_path: Path) -> None:
    assert card(tmp_path, mixture(metrics={"metric": "accuracy"})).data.metrics == ["accuracy"]
    assert card(tmp_path, mixture(metrics={"metric": "token overlap"})).data.metrics is None


def test_revisions_stand_in_the_commands(tmp_path: Path) -> None:
    made = mixture(base=InputRef("org/base", "abc", {}))
    assert "--base org/base@abc --adapter a=org/a" in card(tmp_path, made).text


def test_the_command_has_the_columns_the_splits_and_the_adapters_that_were_not_kept(tmp_path: Path) -> None:
    fitted = {
        "method": "best-single", "data": {"name": "set", "split": "dev"}, "columns": {"text": "my body"}, "residual": "a",
        "adapters": {"x": "org/x@abc", "a": "org/a", "b": "org/b"},
        "fit": asdict(FitOptions(method="best-single", initial_logits="start.json")),
    }  # fmt: skip
    metrics = {"held_out": {"from": {"name": "judge.csv", "split": "test"}}}
    text = card(tmp_path, mixture(data=fitted, metrics=metrics)).text
    assert "--adapter x=org/x@abc --adapter a=org/a --adapter b=org/b --task" in text
    assert "--data set --split dev --method best-single --initial-logits start.json" in text
    assert "--column 'text=my body' --eval-data judge.csv --eval-split test --base-is-residual a" in text
    assert "--delta-scale" not in text


def test_the_card_says_how_the_mixture_weights_came_about(tmp_path: Path) -> None:
    one = {"groups": {"all": ["q", "k"]}, "granularity": "global", "mixture_weights": torch.tensor([[0.5, 0.5]])}
    for data, metrics, said in (
        ({"method": "uniform"}, {}, "uniform composition, [Asadi"),
        ({"method": "given"}, {}, "with mixture weights that were given"),
        ({"method": "training loop"}, {}, "learned in a training loop"),
        ({"method": "learned"}, {"kept": "learned"}, "learned composition, [Asadi"),
        ({"method": "learned"}, {"kept": "a"}, "what its fit kept: a)"),
    ):
        text = card(tmp_path, mixture(data=data, metrics=metrics, **one)).text
        assert said in text
        assert "learned and uniform" not in text
        assert "(1 group)," in text


def test_a_mixture_of_a_training_loop_has_no_command_that_does_not_make_it(tmp_path: Path) -> None:
    looped = card(tmp_path, mixture(data={"method": "training loop"})).text
    assert "wlora-merge mix" not in looped
    assert "wlora-merge fit" not in looped
    assert "wlora-merge export mixture --format dense" in looped
    assert "Mixture.from_model(model).save" in looped
    assert "wlora-merge mix" in card(tmp_path, mixture(data={"method": "uniform"})).text


def test_a_local_base_is_said_to_work_beside_its_folder_alone(tmp_path: Path) -> None:
    local, hub = (card(tmp_path, mixture(), "lora", name).text for name in ("base", "org/base"))
    assert "# a local base" in local
    assert "# a local base" not in hub


def test_the_commands_of_a_card_have_every_digit_of_a_number() -> None:
    from wlora_merge.exporters.model_card import _flags

    assert _flags({"weights": [0.123456789, 1.0], "learning_rate": 0.0123456789, "seed": 3, "force": False}) == [
        "--weights", "0.123456789,1", "--learning-rate", "0.0123456789", "--seed", "3",
    ]  # fmt: skip


def test_the_template_asks_for_no_name_that_it_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = set()

    def note_names(template: Template, *positional: object, **names: object) -> str:
        given.update(names)
        return str(real(template, *positional, **names))

    real = Template.render
    monkeypatch.setattr(Template, "render", note_names)
    monkeypatch.setattr("wlora_merge.exporters.model_card._serving", lambda *_: "")
    card(tmp_path, mixture())
    assert meta.find_undeclared_variables(Environment().parse(TEMPLATE.read_text())) <= given


def test_what_looks_like_a_template_stays_as_it_is(tmp_path: Path) -> None:
    metrics = {"candidates": {"{{ 7 * 7 }}": {"loss": 1.0}}, "note": "{% raw %}"}
    text = card(tmp_path, mixture(metrics=metrics), base_name="org/{{ base }}", note="{# note #}").text
    assert all(said in text for said in ("{{ 7 * 7 }}", "{% raw %}", "org/{{ base }}", "{# note #}"))
